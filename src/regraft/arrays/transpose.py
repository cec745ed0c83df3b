"""Strided copies that mind the cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_ROWS, _COLUMNS = 512, 128
"""A block of a transpose; its target and its source fit into the first two caches."""
_WIDE = np.dtype(np.uint32)


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
    wide = _widen(target, source)
    for j in range(0, columns, _COLUMNS):
        for i in range(0, rows, _ROWS):
            part = (slice(i, i + _ROWS), slice(j, j + _COLUMNS))
            if wide is None or rows - i < _ROWS or columns - j < _COLUMNS:
                target[part] = source[part]
            else:
                _transpose_wide(target[part], wide, i, j)


def _widen(target: npt.NDArray[Any], source: npt.NDArray[Any]) -> npt.NDArray[np.uint32] | None:
    """The source as 32-bit words, each with several elements of a column, where it can be seen so."""
    item = source.dtype.itemsize
    if item not in (1, 2) or target.dtype != source.dtype or source.dtype.kind != "u":
        return None
    step = _WIDE.itemsize // item
    if (
        source.strides[0] != item
        or source.strides[1] % _WIDE.itemsize
        or source.ctypes.data % _WIDE.itemsize
    ):
        return None
    whole = source.shape[0] // step * step
    return source[:whole].T.view(_WIDE).T


def _transpose_wide(target: npt.NDArray[Any], wide: npt.NDArray[np.uint32], i: int, j: int) -> None:
    """Transpose words, and take them apart: half the steps from place to place."""
    item = target.dtype.itemsize
    step = _WIDE.itemsize // item
    words = np.ascontiguousarray(wide[i // step : (i + _ROWS) // step, j : j + _COLUMNS])
    shift = np.uint32(8 * item)
    for number in range(step):
        np.copyto(target[number::step], words, casting="unsafe")
        if number < step - 1:
            np.right_shift(words, shift, out=words)
