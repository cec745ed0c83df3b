"""The best factors of low rank of a matrix, and how good they are.

The few largest singular values of a large matrix come from blocks of vectors that are multiplied with it and its
transpose (block Lanczos with full orthogonalisation, from random vectors: Halko, Martinsson and Tropp 2011), at the
cost of those products. Small matrices, and ranks near the full one, go through LAPACK's decompositions. How far
factors are off is never concluded from either: it is measured, on the factors as they are stored.

The factors and their error are computed in float64, over parts of the matrix, which may be of a narrower type: no wide
copy of it is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from regraft.adapters.form import Array
from regraft.arrays.pieces import HELD, Wide

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


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The largest singular values of a matrix (out, in), and the vectors of its shorter side."""

    matrix: Array
    norm: float
    """The Frobenius norm of the matrix."""
    values: Wide
    """Largest first."""
    vectors: Wide
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

    def factors(self, rank: int) -> tuple[Wide, Wide]:
        """B (out, rank) and A (rank, in) of the best approximation, of like size."""
        short = self.vectors[:, :rank]
        flat = _flat(self.matrix)
        long = np.empty((flat.shape[1], short.shape[1]))
        for place, part in _parts(flat):
            np.matmul(part.T, short, out=long[place])
        roots = np.sqrt(np.linalg.norm(long, axis=0))
        long /= np.where(roots > 0, roots, 1.0)
        short = short * roots
        return (short, long.T) if _is_flat(self.matrix) else (long, short.T)

    def lost(self, b: Array, a: Array) -> float:
        """The square of how far factors are off, as they are stored."""
        short, long = (b, a.T) if _is_flat(self.matrix) else (a.T, b)
        short, long = short.astype(np.float64), long.astype(np.float64)
        parts = _parts(_flat(self.matrix))
        return sum(float(((part - short @ long[place].T) ** 2).sum()) for place, part in parts)


def spectrum(matrix: Array, rank: int) -> Spectrum:
    """The largest singular values of a matrix, at least ``rank`` of them where it has so many.

    >>> spectrum(np.diag([3.0, 4.0]), 1).values.tolist()
    [4.0, 3.0]
    """
    flat = _flat(matrix)
    side = len(flat)
    total = sum(float((part**2).sum()) for _, part in _parts(flat))
    every = side <= max(_SMALL, _FEW * rank)
    values, vectors = _all(flat) if every else _largest(flat, rank, total)
    return Spectrum(matrix, float(np.sqrt(total)), values, vectors)


def spectrum_within(matrix: Array, error: float) -> tuple[Spectrum, int]:
    """As many singular values as factors need that are off by no more than ``error``, and their rank."""
    guess = 16
    while True:
        found = spectrum(matrix, guess)
        rank = found.rank_within(error)
        if rank is not None:
            return found, rank
        guess *= 2


def _all(flat: Array) -> tuple[Wide, Wide]:
    """All singular values of a matrix, and the vectors of its rows.

    They are those of the triangle R of its transpose's decomposition Q R, which is made a part at a time.
    """
    triangle = _triangle(part.T for _, part in _parts(flat))
    _, values, vectors = np.linalg.svd(triangle, full_matrices=False)
    return values, vectors.T


def _largest(flat: Array, rank: int, total: float) -> tuple[Wide, Wide]:
    """The largest singular values of a matrix whose squares sum to ``total``, and the vectors of its rows.

    Orthonormal vectors of the rows are found block by block, each from what the matrix and its transpose make of the
    one before. What the matrix makes of them all, their images, has nearly its largest singular values.
    """
    side, long = flat.shape
    count = rank + max(_MORE, rank // 4)
    limit = min(side, max(3 * count, side // 4, _WIDE))
    block = np.random.default_rng(0).standard_normal((long, count))
    basis, images, squares = np.empty((side, 0)), list[Array](), np.empty((0, 0))
    kept = 0.0
    for _ in range(_BLOCKS):
        directions = np.linalg.qr(block)[0][:, : limit - basis.shape[1]]
        more = _orthonormal((flat @ directions.astype(flat.dtype)).astype(np.float64), basis)
        image = flat.T @ more.astype(flat.dtype)
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


def _triangle(parts: Iterable[Array]) -> Wide:
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


def _is_flat(matrix: Array) -> bool:
    """Whether it has no more rows than columns."""
    return bool(matrix.shape[0] <= matrix.shape[1])


def _flat(matrix: Array) -> Array:
    return matrix if _is_flat(matrix) else matrix.T


def _parts(flat: Array) -> Iterator[tuple[slice, Wide]]:
    """Some columns at a time, in float64."""
    step = max(1, 2 * HELD // len(flat))
    for first in range(0, flat.shape[1], step):
        place = slice(first, min(first + step, flat.shape[1]))
        yield place, flat[:, place].astype(np.float64)
