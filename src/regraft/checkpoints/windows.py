"""Windows of output files: bytes [start, stop), made in memory from ranged reads of the source alone.

The unit of work beyond one machine. A window is a pure function of the conversion: it reads back nothing of the
result, so two workers may make the same one, even after the result is complete, and both make the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regraft.checkpoints.gather import (
    Bytes,
    Files,
    Fill,
    byte_runs,
    covered,
    fill_slices,
    reads_of,
)
from regraft.checkpoints.moves import Moves, size_of, slicer_of
from regraft.checkpoints.sharding import OutFile
from regraft.checkpoints.slices import strips_of
from regraft.checkpoints.source import Tensors
from regraft.checkpoints.units import Run
from regraft.planning.slices import Strips, region_of
from regraft.planning.windows import cut_strips
from regraft.storage.dtypes import DTYPES

_SHORT = 1 << 16
"""Bytes of a run that are worth an operation of the system by itself."""
_NOTHING = np.zeros(0, np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """The part of one tensor that lies in a window."""

    strips: list[Strips]
    item: int
    """Bytes of an element that is read."""
    count: int
    """Elements."""
    written: np.dtype[Any] | None
    """The type that they become, where they are cast."""
    read: np.dtype[Any] | None
    skip: int
    """Bytes of the first element that lie before the window."""
    at: int
    """In the window, in bytes."""
    size: int
    """In bytes."""


class Windows:
    """Makes windows of a conversion's files; holds no file open and no data."""

    def __init__(self, moves: Moves, dtypes: Sequence[str], tensors: Tensors) -> None:
        self.moves, self.dtypes, self.tensors = moves, dtypes, tensors
        self.slicer = slicer_of(moves, tensors)

    def read(self, files: Files, file: OutFile, start: int, stop: int, jobs: int = 1) -> Bytes:
        """The bytes of an output file from ``start`` up to ``stop``; ``jobs`` of its reads go on at a time.

        Raises ``BadInputError`` where a source file changed.
        """
        out = np.zeros(stop - start, np.uint8)
        head = np.frombuffer(file.head, np.uint8)[start:stop]
        out[: len(head)] = head
        parts = self._parts(file, start, stop)
        buffers = [
            out[part.at : part.at + part.size]
            if part.written is None and not part.skip and part.size == part.count * part.item
            else np.empty(part.count * part.item, np.uint8)
            for part in parts
        ]
        fills = [
            Fill(buffer, part.strips, part.item)
            for buffer, part in zip(buffers, parts, strict=True)
        ]
        fill_slices(fills, self.tensors, files, jobs)
        for buffer, part in zip(buffers, parts, strict=True):
            if np.shares_memory(buffer, out):
                continue
            if part.written is not None and part.read is not None:
                with np.errstate(all="ignore"):
                    buffer = buffer.view(part.read).astype(part.written).view(np.uint8)
            out[part.at : part.at + part.size] = buffer[part.skip : part.skip + part.size]
        return out

    def runs(self, file: OutFile, start: int, stop: int) -> list[Run] | None:
        """The runs that fill a window of a file but for its header, if it is made of long ones that stay as they are.

        ``None`` where elements are cast, transposed or made up, or runs are so short that memory is the better way.
        """
        parts, fills = self._parts(file, start, stop), []
        for part in parts:
            same = part.written is None and not part.skip and part.size == part.count * part.item
            made_up = any(strips.bits for strips in part.strips)
            if not same or made_up or covered(part.strips) * part.item != part.size:
                return None
            fills.append(Fill(_NOTHING, part.strips, part.item))
        reads, tiled = reads_of(fills, self.tensors)
        if tiled or len(reads) * _SHORT > stop - start:
            return None
        begins = np.array([start + part.at for part in parts], dtype=np.int64)
        columns = (
            reads.files,
            reads.source_at,
            reads.target_at + begins[reads.fills],
            reads.sizes,
        )
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [Run(*row) for row in rows]

    def sources(self, file: OutFile, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Which bytes of which source files a window reads: file, from where, how many."""
        return [
            run
            for part in self._parts(file, start, stop)
            for run in byte_runs(part.strips, self.tensors, part.item)
        ]

    def _parts(self, file: OutFile, start: int, stop: int) -> list[_Part]:
        names, shapes = self.moves.names, self.moves.shapes
        parts = []
        sizes = [size_of(self.dtypes[t], shapes[t]) for t in file.targets.tolist()]
        first = int(np.searchsorted(file.starts + np.array(sizes, dtype=np.int64), start, "right"))
        for place in range(first, len(file.targets)):
            target, at = int(file.targets[place]), int(file.starts[place])
            if at >= stop:
                break
            low, high = max(start, at) - at, min(stop, at + sizes[place]) - at
            if low >= high:
                continue
            read, written = DTYPES[self.moves.dtypes[target]], DTYPES[self.dtypes[target]]
            packed = bool(read.bits % 8)
            item, out_item = (1, 1) if packed else (read.bits // 8, written.bits // 8)
            begin, end = low // out_item, -(-high // out_item)
            region = region_of(tuple((0, size) for size in shapes[target]))
            strips = strips_of(self.slicer, names[target], shapes[target], read.name, region)
            cast = read is not written
            parts.append(
                _Part(
                    cut_strips(strips, begin, end),
                    item,
                    end - begin,
                    written.numpy if cast else None,
                    read.numpy if cast else None,
                    low - begin * out_item,
                    at + low - start,
                    high - low,
                )
            )
        return parts
