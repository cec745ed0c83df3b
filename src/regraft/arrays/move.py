"""Strided copies between arrays: bits move, values are never read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from regraft.arrays.transpose import copy_strided
from regraft.equation.lower import Nest

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def as_words(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same memory as unsigned integers, flat and contiguous, so that no dtype's arithmetic is touched."""
    flat = np.ascontiguousarray(array).reshape(-1)
    word = _WORDS.get(flat.dtype.itemsize)
    return flat if word is None else flat.view(word)


def view_of(
    array: npt.NDArray[Any], sizes: Sequence[int], strides: Sequence[int], offset: int
) -> npt.NDArray[Any]:
    """The bits of some elements of an array; strides and offset count elements of its contiguous form."""
    words = as_words(array)
    return as_strided(words[offset:], sizes, [s * words.dtype.itemsize for s in strides])


def move(
    nest: Nest,
    source: npt.NDArray[Any],
    target: npt.NDArray[Any],
    source_offset: int = 0,
    target_offset: int = 0,
) -> None:
    """Copy one nest; offsets count elements and come on top of the nest's own. ``target`` is contiguous."""
    read, write = as_words(source), as_words(target)
    size = read.dtype.itemsize
    here = read[nest.source_offset + source_offset :]
    there = write[nest.target_offset + target_offset :]
    copy_strided(
        as_strided(there, nest.sizes, [s * size for s in nest.target_strides]),
        as_strided(here, nest.sizes, [s * size for s in nest.source_strides], writeable=False),
    )
