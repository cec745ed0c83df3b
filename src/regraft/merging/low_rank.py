"""The best factors of low rank of a matrix, and how good they are.

Sums are in float64, over parts of the matrix, which may be of a narrower type: no wide copy of it is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from regraft.adapters.form import Array
from regraft.arrays.pieces import HELD, Wide

_EXACT = 1 << 18
"""Matrices with so many entries have their singular values computed as such; those of larger ones come from the matrix
times itself, which is several times as fast, and exact to 1e-8 of the largest one."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of a matrix (out, in), largest first, and its left or right vectors."""

    matrix: Array
    values: Wide
    vectors: Wide
    """(size, components)"""
    left: bool
    """Whether the vectors are those of the out side, which is not the longer one."""

    @cached_property
    def norm(self) -> float:
        """The Frobenius norm of the matrix."""
        return float(np.sqrt(sum(float((part**2).sum()) for _, part in self._parts())))

    def rank_within(self, error: float) -> int:
        """The lowest rank whose best approximation is off by at most ``error``, relative to the norm; at least 1."""
        left = np.sqrt(np.cumsum(self.values[::-1] ** 2))[::-1]
        return max(1, int((left > error * self.norm).sum()))

    def mass(self, rank: int) -> float:
        """The share of the sum of singular values that the largest have."""
        whole = float(self.values.sum())
        return float(self.values[:rank].sum()) / whole if whole else 1.0

    def factors(self, rank: int) -> tuple[Wide, Wide]:
        """B (out, rank) and A (rank, in) of the best approximation, of like size."""
        some = self.vectors[:, :rank]
        long = self.matrix.shape[1] if self.left else self.matrix.shape[0]
        other = np.empty((some.shape[1], long))
        for place, part in self._parts():
            other[:, place] = some.T @ part
        roots = np.sqrt(np.linalg.norm(other, axis=1))
        other /= np.where(roots > 0, roots, 1.0)[:, None]
        near = some * roots
        return (near, other) if self.left else (other.T, near.T)

    def lost(self, b: Array, a: Array) -> float:
        """The square of how far factors are off, as they are stored."""
        near, other = (b, a) if self.left else (a.T, b.T)
        near, other = near.astype(np.float64), other.astype(np.float64)
        parts = self._parts()
        return sum(float(((part - near @ other[:, place]) ** 2).sum()) for place, part in parts)

    def _parts(self) -> Iterator[tuple[slice, Wide]]:
        yield from _parts(self.matrix if self.left else self.matrix.T)


def _parts(matrix: Array) -> Iterator[tuple[slice, Wide]]:
    """Some columns at a time, in float64."""
    step = max(1, HELD // matrix.shape[0])
    for first in range(0, matrix.shape[1], step):
        place = slice(first, min(first + step, matrix.shape[1]))
        yield place, matrix[:, place].astype(np.float64)


def spectrum(matrix: Array) -> Spectrum:
    """The singular values of a matrix.

    >>> spectrum(np.diag([3.0, 4.0])).values.tolist()
    [4.0, 3.0]
    """
    left = matrix.shape[0] <= matrix.shape[1]
    if prod(matrix.shape) <= _EXACT:
        u, values, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
        return Spectrum(matrix, values, u if left else v.T, left)
    flat = matrix if left else matrix.T
    square = np.zeros((len(flat), len(flat)))
    for _, part in _parts(flat):
        square += part @ part.T
    squares, vectors = np.linalg.eigh(square)
    values = np.sqrt(np.maximum(squares[::-1], 0.0))
    return Spectrum(matrix, values, vectors[:, ::-1], left)
