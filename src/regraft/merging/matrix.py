"""A matrix that is read some rows at a time, held in memory only where there is room for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from regraft.adapters.form import Array
from regraft.arrays.pieces import HELD, Wide

Read = Callable[[int, int], Wide]
"""Rows of a matrix from a first one to before a last one, in float64."""


class Matrix:
    """A matrix (rows, columns) and products with it, in `dtype`.

    >>> matrix = Matrix.of(np.diag([3.0, 4.0]))
    >>> matrix.times(np.ones((2, 1))).tolist(), matrix.is_tall
    ([[3.0], [4.0]], False)
    """

    def __init__(self, shape: tuple[int, int], dtype: np.dtype[np.floating], read: Read) -> None:
        self.shape = shape
        self.dtype = dtype
        """The type that it is held in, and that products are computed in."""
        self._read = read
        self._held: Array | None = None
        self._owned = False

    @classmethod
    def of(cls, array: Array) -> Matrix:
        """An array, which stays where it is."""
        made = cls(array.shape, array.dtype, lambda first, last: array[first:last].astype(float))
        made._held = array
        return made

    @property
    def is_tall(self) -> bool:
        """Whether it has more rows than columns."""
        return self.shape[0] > self.shape[1]

    @property
    def size(self) -> int:
        """Its bytes where it is held; those of an array that it was made of are its owner's."""
        given = self._held is not None and not self._owned
        return 0 if given else self.dtype.itemsize * self.shape[0] * self.shape[1]

    def hold(self) -> None:
        """Read all of it once."""
        if self._held is None:
            held = np.empty(self.shape, self.dtype)
            for place, rows in self.blocks():
                held[place] = rows
            self._held, self._owned = held, True

    def let_go(self) -> None:
        """Hold it no longer."""
        if self._owned:
            self._held, self._owned = None, False

    def blocks(self, size: int = HELD) -> Iterator[tuple[slice, Wide]]:
        """Some rows at a time, in float64; ``size`` is in elements."""
        step = max(1, size // max(1, self.shape[1]))
        for first in range(0, self.shape[0], step):
            last = min(first + step, self.shape[0])
            held = self._held
            yield (
                slice(first, last),
                (self._read(first, last) if held is None else held[first:last].astype(float)),
            )

    def times(self, vectors: Array) -> Array:
        """Its product with columns of vectors (columns, count)."""
        if self._held is not None:
            return self._held @ vectors.astype(self.dtype, copy=False)
        vectors = vectors.astype(self.dtype, copy=False)
        made = np.empty((self.shape[0], vectors.shape[1]), self.dtype)
        for place, rows in self.blocks():
            np.matmul(rows.astype(self.dtype, copy=False), vectors, out=made[place])
        return made

    def back(self, vectors: Array) -> Array:
        """Its transpose's product with columns of vectors (rows, count)."""
        vectors = vectors.astype(self.dtype, copy=False)
        if self._held is not None:
            return self._held.T @ vectors
        made = np.zeros((self.shape[1], vectors.shape[1]), self.dtype)
        for place, rows in self.blocks():
            add_product(made, rows.astype(self.dtype, copy=False), vectors[place])
        return made

    def squares(self) -> float:
        """The sum of the squares of its elements."""
        return sum(float((rows**2).sum()) for _, rows in self.blocks())

    def gram(self) -> Wide:
        """The products of its shorter side's vectors with one another (side, side)."""
        side = min(self.shape)
        made = np.zeros((side, side))
        if self.is_tall:
            for _, rows in self.blocks():
                add_product(made, rows, rows)
            return made
        # Rows far apart meet, too: some are kept, and the others are read again.
        some = max(HELD, self.shape[0] * self.shape[1] // 8)
        for place, kept in self.blocks(some):
            for other, more in self.blocks():
                if other.start < place.stop:
                    made[other, place] = more @ kept.T
                    made[place, other] = made[other, place].T
        return made


def add_product(total: Array, left: Array, right: Array) -> None:
    """Add ``left.T @ right``, with a small product in memory at a time."""
    step = max(1, HELD // max(1, right.shape[1]))
    for first in range(0, len(total), step):
        part = slice(first, first + step)
        total[part] += left[:, part].T @ right
