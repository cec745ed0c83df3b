"""Strided copies that mind the cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_ROWS, _BYTES = 512, 512
"""A block of a transpose: so many rows of the source, and bytes of each; it fits into the second cache."""
_APART = 64
"""Bytes between the rows in the buffer. A distance of a power of two would leave most of the cache unused."""

_SMALL = 1 << 17
"""Bytes of a matrix that is turned as fast without blocks."""


def copy_strided(target: npt.NDArray[Any], source: npt.NDArray[Any]) -> None:
    """Copy an array onto another of the same shape, in blocks where one of them is transposed.

    >>> target = np.zeros((2, 3), np.uint16)
    >>> copy_strided(target, np.arange(6, dtype=np.uint16).reshape(3, 2).T)
    >>> target.tolist()
    [[0, 2, 4], [1, 3, 5]]
    """
    if target.ndim < 2 or target.nbytes <= _SMALL:
        target[...] = source
        return
    to = min(range(target.ndim), key=lambda i: (abs(target.strides[i]), -target.shape[i]))
    of = min(range(target.ndim), key=lambda i: (abs(source.strides[i]), -target.shape[i]))
    if to == of:
        target[...] = source
        return
    target, source = (np.moveaxis(array, (of, to), (-2, -1)) for array in (target, source))
    item = source.itemsize
    if target[..., 0, 0].size * _SMALL >= target.nbytes:
        target[...] = source
        return
    buffer = np.empty((_ROWS, (_BYTES + _APART) // item), source.dtype)[:, : _BYTES // item]
    for index in np.ndindex(target.shape[:-2]):
        _transpose(target[index], source[index], buffer)


def _transpose(
    target: npt.NDArray[Any], source: npt.NDArray[Any], buffer: npt.NDArray[Any]
) -> None:
    """Copy a matrix whose target is contiguous along rows and whose source along columns.

    The source's runs go into the buffer one by one, and are turned there.
    """
    rows, columns = target.shape
    wide, high = buffer.shape
    for i in range(0, rows, high):
        for j in range(0, columns, wide):
            part = (slice(i, i + high), slice(j, j + wide))
            turned = source[part].T
            block = buffer[: turned.shape[0], : turned.shape[1]]
            block[...] = turned
            target[part] = block.T
