"""Strided blocks between files: tiles small enough for memory, large enough for the disk.

A tile is a part of a loop nest. Its source is read in as few segments as its strides allow, moved
in memory, and written in segments. Where the target's elements do not lie side by side (an
interleave), the segment is read, filled and written back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct
from numpy.lib.stride_tricks import as_strided

from regraft.arrays.transpose import copy_strided
from regraft.storage.ranges import Ranges, fill_from

_DENSE = 4
"""A segment may be so many times as long as what is used of it."""
_SHORT = 512
"""Pieces of fewer bytes are read and written together with what lies between them."""


class Side(Struct, frozen=True):
    """How the elements of a tile lie in a file, and in the buffer that holds them."""

    span: int
    """Elements of one segment."""
    gaps: bool
    """Whether a segment has elements that are not the tile's."""
    segments: tuple[int, ...]
    """Where each segment begins, in elements from the tile's first."""
    strides: tuple[int, ...]
    """The buffer's, in elements."""

    @property
    def length(self) -> int:
        """Elements of the buffer."""
        return self.span * len(self.segments)


def measure_side(sizes: Sequence[int], strides: Sequence[int], *, gaps: bool = False) -> Side:
    """How a tile of these sizes is read or written; with ``gaps``, segments may hold other elements, too.

    >>> measure_side((2, 3), (100, 1)).segments
    (0, 100)
    """
    order = sorted(range(len(sizes)), key=lambda i: strides[i])
    span = used = 1
    merged: list[int] = []
    for i in order:
        wider = (sizes[i] - 1) * strides[i] + span
        if wider > (_DENSE if gaps else 1) * used * sizes[i]:
            break
        span, used = wider, used * sizes[i]
        merged.append(i)
    rest = [i for i in range(len(sizes)) if i not in merged]
    starts = tuple(
        sum(at * strides[i] for at, i in zip(point, rest, strict=True))
        for point in product(*(range(sizes[i]) for i in rest))
    )
    buffer = list(strides)
    step = span
    for i in reversed(rest):
        buffer[i] = step
        step *= sizes[i]
    return Side(span, span != used, starts, tuple(buffer))


def tile_of(
    sizes: Sequence[int],
    source_strides: Sequence[int],
    target_strides: Sequence[int],
    budget: int,
) -> tuple[int, ...]:
    """The sizes of a tile of at most ``budget`` elements, long in the inner loops of both sides."""
    tile = [1] * len(sizes)
    orders = [
        sorted(range(len(sizes)), key=lambda i: strides[i])
        for strides in (target_strides, source_strides)
    ]
    grown = True
    while grown:
        grown = False
        for order in orders:
            loop = next((i for i in order if tile[i] < sizes[i]), None)
            if loop is None:
                continue
            wider = min(sizes[loop], tile[loop] * 2)
            if prod(tile) // tile[loop] * wider <= budget:
                tile[loop] = wider
                grown = True
    return tuple(tile)


def has_gaps(sizes: Sequence[int], strides: Sequence[int], item: int) -> bool:
    """Whether a side's elements lie in pieces too short to be read or written one by one.

    >>> has_gaps((100, 100), (200, 2), 2), has_gaps((100, 1000), (2000, 1), 2)
    (True, False)
    """
    run = 1
    for i in sorted(range(len(sizes)), key=lambda i: strides[i]):
        if strides[i] != run:
            break
        run *= sizes[i]
    return run * item < _SHORT and run < prod(sizes)


def parts_of(
    sizes: Sequence[int], tile: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The tiles of a nest: their sizes, and their first indices."""
    for start in product(*(range(0, n, t) for n, t in zip(sizes, tile, strict=True))):
        part = tuple(min(t, n - at) for t, n, at in zip(tile, sizes, start, strict=True))
        yield part, start


class Block(Struct, frozen=True):
    """A loop nest between two files; offsets in bytes, the rest in elements."""

    sizes: tuple[int, ...]
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]
    source_at: int
    target_at: int
    read: np.dtype[Any]
    """The element type that is read; unsigned integers where only bits move."""
    written: np.dtype[Any]

    @property
    def has_gaps(self) -> bool:
        """Whether writing it takes reading what lies between its elements."""
        return has_gaps(self.sizes, self.target_strides, self.written.itemsize)


class Mover:
    """Moves blocks through two buffers of its own."""

    def __init__(self, buffer_bytes: int) -> None:
        self.size = buffer_bytes
        self.sides: dict[tuple[tuple[int, ...], tuple[int, ...], bool], Side] = {}
        self._buffers: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]] | None = None

    def budget(self, block: Block) -> int:
        """How many elements a tile may have: with gaps it may take four times its room."""
        item = max(block.read.itemsize, block.written.itemsize)
        gaps = block.has_gaps or has_gaps(block.sizes, block.source_strides, block.read.itemsize)
        return max(1, self.size // (_DENSE if gaps else 1) // item)

    def buffers(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """The two buffers, made when they are first needed."""
        if self._buffers is None:
            self._buffers = (np.empty(self.size, np.uint8), np.empty(self.size, np.uint8))
        return self._buffers

    def side(self, sizes: tuple[int, ...], strides: tuple[int, ...], *, gaps: bool) -> Side:
        """`measure_side`, remembered."""
        key = (sizes, strides, gaps)
        if key not in self.sides:
            if len(self.sides) > 64:
                self.sides.clear()
            self.sides[key] = measure_side(sizes, strides, gaps=gaps)
        return self.sides[key]

    def move(self, block: Block, source: Ranges, target: int) -> None:
        """Move one block from one open file to another.

        Raises ``EOFError`` where the source ends early, ``OSError`` as the system says.
        """
        for side, data, at in self.tiles(block, source, target):
            size = side.span * block.written.itemsize
            view = data.data
            for number, start in enumerate(side.segments):
                part = view[number * size : (number + 1) * size]
                write_all(target, part, at + start * block.written.itemsize)

    def tiles(
        self, block: Block, source: Ranges, target: int | Ranges
    ) -> Iterator[tuple[Side, npt.NDArray[np.uint8], int]]:
        """Every tile as the target should have it: its side, the bytes of its segments, and its place."""
        first, second = self.buffers()
        read, written = block.read.itemsize, block.written.itemsize
        tile = tile_of(block.sizes, block.source_strides, block.target_strides, self.budget(block))
        gaps = block.has_gaps
        loose = has_gaps(block.sizes, block.source_strides, block.read.itemsize)
        for part, start in parts_of(block.sizes, tile):
            here = self.side(part, block.source_strides, gaps=loose)
            there = self.side(part, block.target_strides, gaps=gaps)
            at = block.source_at + read * _dot(start, block.source_strides)
            to = block.target_at + written * _dot(start, block.target_strides)
            data = first[: here.length * read]
            result = second[: there.length * written]
            _read(source, here, data, at, read)
            if there.gaps:
                _read(target, there, result, to, written)
            copy_strided(
                as_strided(result.view(block.written), part, [s * written for s in there.strides]),
                as_strided(data.view(block.read), part, [s * read for s in here.strides]),
            )
            yield there, result, to


def _dot(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(a * b for a, b in zip(one, other, strict=True))


def _read(file: int | Ranges, side: Side, data: npt.NDArray[np.uint8], at: int, item: int) -> None:
    size = side.span * item
    view = data.data
    for number, start in enumerate(side.segments):
        read_into(file, view[number * size : (number + 1) * size], at + start * item)


def read_into(file: int | Ranges, view: memoryview, at: int) -> None:
    """Fill a buffer from a file.

    Raises ``EOFError`` where the file ends before it is full.
    """
    if not view:
        return
    if isinstance(file, int):
        fill_from(file, [view], at)
    else:
        file.fill([view], at)


def write_all(file: int, view: memoryview, at: int) -> None:
    """Write the whole of a buffer to a place in a file."""
    while view:
        count = os.pwrite(file, view, at)
        view = view[count:]
        at += count
