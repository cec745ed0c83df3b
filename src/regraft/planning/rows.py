"""Rows of whole numbers: all points of a grid of indices, and the distinct ones among some rows."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from regraft.names.keys import Ints


def index_grid(sizes: Sequence[int]) -> Ints:
    """All indices of a grid, (axes, points), row major.

    >>> index_grid((2, 2)).tolist()
    [[0, 0, 1, 1], [0, 1, 0, 1]]
    """
    return np.indices(tuple(sizes), dtype=np.int64).reshape(len(sizes), prod(sizes))


def distinct_rows(rows: Ints) -> tuple[Ints, Ints]:
    """The distinct rows in ascending order: where each stands first, and for every row which of them it is.

    As `numpy.unique` along the first axis, but each row is sorted as one number, which is several times as fast.

    >>> first, which = distinct_rows(np.array([[2, 0], [1, 5], [2, 0]]))
    >>> first.tolist(), which.tolist()
    ([1, 0], [1, 0, 1])
    """
    if not rows.size:
        return np.arange(min(len(rows), 1)), np.zeros(len(rows), dtype=np.int64)
    if (rows == rows[0]).all():
        return np.zeros(1, dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    least = rows.min(axis=0)
    limits = rows.max(axis=0) - least + 1
    if np.prod(limits.astype(float)) < 2**62:
        flat = np.ravel_multi_index(tuple((rows - least).T), tuple(limits.tolist()))
        _, first, which = np.unique(flat, return_index=True, return_inverse=True)
    else:
        _, first, which = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return first, which.reshape(-1)
