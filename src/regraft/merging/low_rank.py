"""The best factors of low rank of a matrix, and how good they are.

The few largest singular values of a large matrix come from blocks of vectors that are multiplied with it and its
transpose (block Lanczos with full orthogonalisation, from random vectors: Halko, Martinsson and Tropp 2011), at the
cost of those products. Of small matrices, and for ranks near the full one, all of them come from the products of the
shorter side's vectors with one another. How far factors are off is never concluded from either: it is measured, on the
factors as they are stored.

What either holds is known before, and the first way is taken that stays within a bound: the matrix held, or read again
for each product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from regraft.adapters.form import Array, cast_down
from regraft.arrays.pieces import HELD, Wide
from regraft.merging.matrix import Matrix, add_product

_SMALL = 192
"""Matrices with a side no longer than this have all their singular values computed."""
_FEW = 5
"""So many times the rank a side must be long, or all its singular values are computed."""
_MORE = 10
"""Vectors of a block beyond the rank, at least."""
_BLOCKS = 12
_WIDE = 1024
"""So many vectors are held of any matrix, and of a larger one a quarter of its shorter side's."""
_SETTLED = 1e-4
"""The blocks end when another one lowers the square of what is lost by no more than this part of it."""
_ROUNDING = 1e-15
"""What is lost of a matrix is known to this part of it, in squares."""
_DOUBLE, _SINGLE = np.dtype(np.float64), np.dtype(np.float32)


class NoRoomError(Exception):
    """No way to the factors of a matrix stays within the bound; ``needed`` bytes would do."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The largest singular values of a matrix (out, in), and the vectors of its shorter side."""

    matrix: Matrix
    norm: float
    """The Frobenius norm of the matrix."""
    values: Wide
    """Largest first."""
    vectors: Array
    """(shorter side, components)"""

    def rank_within(self, error: float) -> int | None:
        """The lowest rank that is off by at most ``error``, relative to the norm; ``None`` where these are too few."""
        most = (error * self.norm) ** 2
        if len(self.values) == min(self.matrix.shape):
            lost = np.cumsum(self.values[::-1] ** 2)[::-1]
            return max(1, int((lost > most).sum()))
        lost = self.norm**2 - np.cumsum(self.values**2)
        enough = np.flatnonzero(lost <= most)
        return int(enough[0]) + 1 if len(enough) else None

    def factors(self, rank: int, dtype: np.dtype[np.generic] = _DOUBLE) -> tuple[Array, Array]:
        """B (out, rank) and A (rank, in) of the best approximation, of like size.

        Raises ``RefusedError`` where a number leaves the range of the type.
        """
        short = self.vectors[:, :rank]
        roots = np.sqrt(self.values[:rank])
        roots = np.where(roots > 0, roots, 1.0)
        own = cast_down(short * roots, dtype)
        if self.matrix.is_tall:
            over = (short / roots).astype(_DOUBLE, copy=False)
            long = np.empty((self.matrix.shape[0], over.shape[1]), dtype)
            for place, rows in self.matrix.blocks():
                long[place] = cast_down(rows @ over, dtype)
            return long, own.T
        wide = np.zeros((self.matrix.shape[1], short.shape[1]), np.result_type(dtype, _SINGLE))
        for place, rows in self.matrix.blocks():
            add_product(wide, rows, short[place] / roots)
        return own, cast_down(wide, dtype).T

    def lost(self, b: Array, a: Array) -> float:
        """The square of how far factors are off, as they are stored."""
        right = a.astype(self.matrix.dtype, copy=False)
        step = max(1, HELD // max(1, a.shape[1]))
        found = 0.0
        for place, rows in self.matrix.blocks():
            for first in range(0, len(rows), step):
                some = slice(place.start + first, min(place.start + first + step, place.stop))
                made = b[some].astype(right.dtype, copy=False) @ right
                found += float(((rows[first : first + step] - made) ** 2).sum())
        return found


def spectrum(matrix: Array | Matrix, rank: int, room: int | None = None) -> Spectrum:
    """The largest singular values of a matrix, at least ``rank`` of them where it has so many.

    ``room`` is how many bytes may be held, factors included; ``None`` for as many as it takes.

    Raises ``NoRoomError`` where that is not enough.

    >>> spectrum(np.diag([3.0, 4.0]), 1).values.tolist()
    [4.0, 3.0]
    """
    matrix = matrix if isinstance(matrix, Matrix) else Matrix.of(matrix)
    way = _way(matrix, rank, room)
    if way.held:
        matrix.hold()
    total = matrix.squares()
    values, vectors = _largest(matrix, rank, total) if way.few else _all(matrix)
    return Spectrum(matrix, float(np.sqrt(total)), values, vectors)


def spectrum_within(
    matrix: Array | Matrix, error: float, room: int | None = None
) -> tuple[Spectrum, int]:
    """As many singular values as factors need that are off by no more than ``error``, and their rank.

    Raises ``NoRoomError`` as `spectrum` does.
    """
    guess = 16
    while True:
        found = spectrum(matrix, guess, room)
        rank = found.rank_within(error)
        if rank is not None:
            return found, rank
        guess *= 2


# -- what it takes


@dataclass(frozen=True, slots=True)
class _Way:
    """How singular values are computed."""

    few: bool
    """The largest ones only."""
    held: bool
    """Whether the matrix is in memory, and not read again for each product."""


WAYS = (
    _Way(few=True, held=True),
    _Way(few=True, held=False),
    _Way(few=False, held=True),
    _Way(few=False, held=False),
)
"""The first one that stays within the room is taken; a few values are taken of matrices that have many more."""


def _way(matrix: Matrix, rank: int, room: int | None) -> _Way:
    """The first way that stays within the room."""
    few = min(matrix.shape) > max(_SMALL, _FEW * rank)
    ways = [way for way in WAYS if few or not way.few]
    if room is None:
        return ways[0]
    sizes = [needed(matrix, rank, way) for way in ways]
    found = next((way for way, size in zip(ways, sizes, strict=True) if size <= room), None)
    if found is None:
        raise NoRoomError(min(sizes))
    return found


def needed(matrix: Matrix, rank: int, way: _Way) -> int:
    """The most bytes that a way holds at a time, counted on what the functions below make."""
    short, long = sorted(matrix.shape)
    own = matrix.dtype.itemsize
    rank = min(rank, short)
    held = (matrix.size if way.held else 0) + 4 * 8 * HELD
    factors = held + 3 * 8 * short * rank + 4 * (short + long) * rank
    factors += 4 * long * rank * (not matrix.is_tall)
    if not way.few:
        # The products, a copy of them and what LAPACK works with (1 + 2 squares), or the vectors in its place.
        return max(held + 5 * 8 * short**2, factors + 8 * short**2)
    count, limit = _sizes(short, rank)
    basis, images = 8 * short * limit, own * long * limit
    block = 8 * count * (3 * long + 2 * short)
    return max(held + 2 * basis + images + max(block, 9 * 8 * limit**2), factors)


def _sizes(side: int, rank: int) -> tuple[int, int]:
    """How many vectors a block has, and how many all blocks together have at most."""
    count = rank + max(_MORE, rank // 4)
    return count, min(side, max(3 * count, side // 4, _WIDE))


# -- singular values


def _all(matrix: Matrix) -> tuple[Wide, Wide]:
    """All singular values of a matrix, and the vectors of its shorter side; of large ones to 1e-8 of the largest."""
    size = matrix.shape[0] * matrix.shape[1]
    if min(matrix.shape) <= _SMALL and (matrix.is_tall or size <= HELD):
        rows = matrix.blocks()
        triangle = _triangle(part if matrix.is_tall else part.T for _, part in rows)
        _, found, right = np.linalg.svd(triangle, full_matrices=False)
        return found, right.T
    squares, vectors = np.linalg.eigh(matrix.gram())
    values = np.sqrt(np.maximum(squares[::-1], 0.0))
    return values, vectors[:, ::-1]


def _largest(matrix: Matrix, rank: int, total: float) -> tuple[Wide, Wide]:
    """The largest singular values of a matrix whose squares sum to ``total``, and the vectors of its shorter side.

    Orthonormal vectors of that side are found block by block, each from what the matrix and its transpose make of the
    one before. What the matrix makes of them all, their images, has nearly its largest singular values.
    """
    short, long = sorted(matrix.shape)
    over, back = (matrix.back, matrix.times) if matrix.is_tall else (matrix.times, matrix.back)
    count, limit = _sizes(short, rank)
    block = np.random.default_rng(0).standard_normal((long, count))
    basis, images, squares = np.empty((short, 0)), list[Array](), np.empty((0, 0))
    kept = 0.0
    for _ in range(_BLOCKS):
        directions = np.linalg.qr(block)[0][:, : limit - basis.shape[1]]
        more = _orthonormal(over(directions).astype(np.float64), basis)
        image = back(more)
        block = image.astype(np.float64)
        cross = np.vstack([np.empty((0, block.shape[1])), *(before.T @ block for before in images)])
        squares = np.block([[squares, cross], [cross.T, block.T @ block]])
        basis, images = np.hstack([basis, more]), [*images, image]
        before, kept = kept, float(np.linalg.eigvalsh(squares)[-rank:].sum())
        settled = kept - before <= _SETTLED * max(total - kept, 0.0) + _ROUNDING * total
        if settled or basis.shape[1] == limit:
            break
    step = max(1, HELD // basis.shape[1])
    rows = (slice(first, first + step) for first in range(0, long, step))
    triangle = _triangle(np.hstack([image[some] for image in images]) for some in rows)
    _, values, vectors = np.linalg.svd(triangle, full_matrices=False)
    return values[:rank], basis @ vectors[:rank].T


def _triangle(parts: Iterator[Array]) -> Wide:
    """The R of the decomposition Q R of a matrix that comes some rows at a time."""
    made: Wide | None = None
    for part in parts:
        rows = part if made is None else np.concatenate([made, part])
        made = np.asarray(np.linalg.qr(rows.astype(np.float64), mode="r"))
    assert made is not None
    return made


def _orthonormal(vectors: Wide, before: Wide) -> Wide:
    """An orthonormal basis of vectors, orthogonal to an earlier one; twice, for what rounding leaves the first time."""
    for _ in range(2):
        vectors = np.linalg.qr(vectors - before @ (before.T @ vectors))[0]
    return vectors
