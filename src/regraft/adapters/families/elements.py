"""Single elements that are added to a matrix: what SHiRA and SuperTuning train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from regraft.adapters.families.base import Wide, each, joined
from regraft.adapters.form import Array
from regraft.names.keys import Ints


@dataclass(frozen=True, slots=True, eq=False)
class Elements:
    """Values (n,) at places (2, n), rows and columns, of a matrix (out, in).

    >>> some = Elements(np.array([[0, 1], [2, 0]]), np.array([5.0, 7.0]), 2, 3)
    >>> some.take(np.array([1]), None).dense().tolist()
    [[7.0, 0.0, 0.0]]
    """

    places: Ints
    values: Array
    out: int
    into: int

    def take(self, rows: Ints | None, columns: Ints | None) -> Elements:
        """The elements of some rows and columns, in some order; ``None`` stands for all as they are."""
        places, values, sizes = self.places, self.values, [self.out, self.into]
        for axis, index in enumerate((rows, columns)):
            if index is None:
                continue
            new = np.full(sizes[axis], -1, places.dtype)
            new[index] = np.arange(len(index))
            sizes[axis] = len(index)
            kept = new[places[axis]] >= 0
            places, values = places[:, kept], values[kept]
            places = np.stack([new[p] if a == axis else p for a, p in enumerate(places)])
        return Elements(places, values, *sizes)

    def turn(self) -> Elements:
        """The elements of the transposed matrix."""
        return Elements(self.places[::-1], self.values, self.into, self.out)

    def padded(self, count: int) -> Elements:
        """As many as are asked for: zeros at places that are free."""
        flat = self.places[0].astype(np.int64) * self.into + self.places[1]
        free = np.setdiff1d(np.arange(self.out * self.into), flat)[: count - len(self.values)]
        more = np.stack(np.divmod(free, self.into)).astype(self.places.dtype)
        zeros = np.zeros(len(free), self.values.dtype)
        return replace(
            self,
            places=np.concatenate([self.places, more], axis=1),
            values=np.concatenate([self.values, zeros]),
        )

    def dense(self) -> Wide:
        """The matrix, zero elsewhere."""
        made = np.zeros((self.out, self.into))
        np.add.at(made, tuple(self.places), self.values.astype(np.float64))
        return made


def join_below(parts: Sequence[Elements | None], outs: Sequence[int]) -> Elements:
    """The elements of matrices one below the other; ``None`` where there are none."""
    there = [part for part in parts if part is not None]
    places, start = [], 0
    for part, out in zip(parts, outs, strict=True):
        if part is not None:
            places.append(part.places + np.array([[start], [0]], part.places.dtype))
        start += out
    values = joined([part.values for part in there])
    return Elements(np.concatenate(places, axis=1), values, start, there[0].into)


def join_beside(parts: Sequence[Elements | None], intos: Sequence[int]) -> Elements:
    """The elements of matrices side by side; ``None`` where there are none."""
    return join_below(each(Elements.turn, parts), intos).turn()
