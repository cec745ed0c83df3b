"""The best factors of low rank of a matrix, and how good they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from regraft.arrays.pieces import Wide

_EXACT = 512
"""Up to this size singular values are computed as such; beyond it from the matrix times itself, which is several
times as fast, and exact to 1e-8 of the largest one."""


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """The singular values of a matrix (out, in), largest first, and its left or right vectors."""

    matrix: Wide
    values: Wide
    vectors: Wide
    """(size, components)"""
    left: bool
    """Whether the vectors are those of the out side."""

    @property
    def norm(self) -> float:
        """The Frobenius norm of the matrix."""
        return float(np.linalg.norm(self.matrix))

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
        other = some.T @ self.matrix if self.left else (self.matrix @ some).T
        roots = np.sqrt(np.linalg.norm(other, axis=1))
        safe = np.where(roots > 0, roots, 1.0)
        other = other / safe[:, None]
        near = some * roots
        return (near, other) if self.left else (other.T, near.T)


def spectrum(matrix: Wide) -> Spectrum:
    """The singular values of a matrix.

    >>> spectrum(np.diag([3.0, 4.0])).values.tolist()
    [4.0, 3.0]
    """
    left = matrix.shape[0] <= matrix.shape[1]
    if min(matrix.shape) <= _EXACT:
        u, values, v = np.linalg.svd(matrix, full_matrices=False)
        return Spectrum(matrix, values, u if left else v.T, left)
    square = matrix @ matrix.T if left else matrix.T @ matrix
    squares, vectors = np.linalg.eigh(square)
    values = np.sqrt(np.maximum(squares[::-1], 0.0))
    return Spectrum(matrix, values, vectors[:, ::-1], left)
