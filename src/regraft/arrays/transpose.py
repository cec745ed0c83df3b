"""Strided copies that mind the cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_ROWS, _COLUMNS = 64, 512


def copy_strided(target: npt.NDArray[Any], source: npt.NDArray[Any]) -> None:
    """Copy an array onto another of the same shape, in blocks where one of them is transposed.

    >>> target = np.zeros((2, 3), np.uint16)
    >>> copy_strided(target, np.arange(6, dtype=np.uint16).reshape(3, 2).T)
    >>> target.tolist()
    [[0, 2, 4], [1, 3, 5]]
    """
    if target.ndim < 2 or target.size < _ROWS * _COLUMNS:
        target[...] = source
        return
    to = min(range(target.ndim), key=lambda i: (abs(target.strides[i]), -target.shape[i]))
    of = min(range(target.ndim), key=lambda i: (abs(source.strides[i]), -target.shape[i]))
    if to == of:
        target[...] = source
        return
    target, source = (np.moveaxis(array, (of, to), (-2, -1)) for array in (target, source))
    for index in np.ndindex(target.shape[:-2]):
        _transpose(target[index], source[index])


def _transpose(target: npt.NDArray[Any], source: npt.NDArray[Any]) -> None:
    """Copy a matrix whose target is contiguous along rows and whose source along columns."""
    rows, columns = target.shape
    for i in range(0, rows, _COLUMNS):
        for j in range(0, columns, _ROWS):
            part = (slice(i, i + _COLUMNS), slice(j, j + _ROWS))
            target[part] = source[part]
