"""The work of one file in small units, always the same ones, so that a journal can name them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
from msgspec import Struct

from regraft.checkpoints.moves import Moves, Strided, slicer_of
from regraft.checkpoints.sharding import OutFile
from regraft.checkpoints.source import Tensors
from regraft.checkpoints.tiles import Block, has_gaps
from regraft.names.keys import Ints
from regraft.storage.dtypes import DTYPES

UNIT = 1 << 25
"""How many bytes a unit has, about."""
_PADDED = 1 << 20
"""Elements of padding that are written at once."""
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Run(Struct, frozen=True):
    """A contiguous run: bytes from a place in one file to a place in another."""

    file: int
    source_at: int
    target_at: int
    size: int
    """Bytes that are read."""
    read: np.dtype[Any] | None = None
    """The element type, where it is cast."""
    written: np.dtype[Any] | None = None


Op = Run | tuple[int, Block]
"""A run, or a source file's number and a block to read from it."""


class Cutter:
    """Cuts the moves of a result into units, file by file."""

    def __init__(self, moves: Moves, dtypes: Sequence[str], tensors: Tensors) -> None:
        self.moves, self.dtypes, self.tensors = moves, dtypes, tensors
        self.cast = np.array(
            [a != b for a, b in zip(moves.dtypes, dtypes, strict=True)], dtype=np.bool_
        )
        self.runs = _join(moves)
        self.gaps = np.zeros(len(moves.names), dtype=np.bool_)
        for part in moves.strided:
            for target in np.unique(part.targets).tolist():
                item = DTYPES[dtypes[target]].bits // 8
                self.gaps[target] |= has_gaps(part.sizes, part.target_strides, item)

    def units(self, file: OutFile) -> Iterator[list[Op]]:
        """The units of one file; no two of them write to one place."""
        mine = np.zeros(len(self.moves.names), dtype=np.bool_)
        mine[file.targets] = True
        place = np.zeros(len(self.moves.names), dtype=np.int64)
        place[file.targets] = file.starts
        unit: list[Op] = []
        size = 0
        for op in self._runs(mine & ~self.gaps, place):
            unit.append(op)
            size += op.size
            if size >= UNIT or len(unit) >= 4096:
                yield unit
                unit, size = [], 0
        if unit:
            yield unit
        for part in self.moves.strided:
            for row in np.flatnonzero((mine & ~self.gaps)[part.targets]).tolist():
                number, block = self._block(part, row, place)
                for piece in split_block(block):
                    yield [(number, piece)]
        # Where tiles write back what lies between their elements, nobody else may write meanwhile.
        for target in np.flatnonzero(mine & self.gaps).tolist():
            only = np.zeros_like(mine)
            only[target] = True
            unit = [*self._runs(only, place)]
            for part in self.moves.strided:
                rows = np.flatnonzero(part.targets == target).tolist()
                unit += [self._block(part, row, place) for row in rows]
            yield unit

    def padding(self, file: OutFile, *, zeros: bool = False) -> Iterator[tuple[int, memoryview]]:
        """The padding of one file, zeros only where asked for: places, and bytes to write before anything else."""
        made = [
            (base + number, entry)
            for entry, bases in self.moves.made
            for padding in entry.paddings(written=True)
            if padding.value or zeros
            for base in bases[padding.term : padding.term + 1]
            for number in range(len(entry) * prod(entry.stack(entry.written[padding.term])))
        ]
        padded = {target for target, _ in made} & set(file.targets.tolist())
        slicer = slicer_of(self.moves, self.tensors) if padded else None
        for target, at in zip(file.targets.tolist(), file.starts.tolist(), strict=True):
            if slicer is None or target not in padded:
                continue
            read, written = self._types(target)
            for strips in slicer.padding(self.moves.names[target], zeros=zeros):
                element = np.frombuffer(strips.bits, read).astype(written)
                _, _, places, run = strips.runs()
                for place in places.tolist():
                    for done in range(0, run, _PADDED):
                        data = np.repeat(element, min(_PADDED, run - done)).view(np.uint8)
                        yield at + (place + done) * written.itemsize, data.data

    def _block(self, part: Strided, row: int, place: Ints) -> tuple[int, Block]:
        source, target = int(part.sources[row]), int(part.targets[row])
        read, written = self._types(target)
        at = int(part.target_at[row]) // read.itemsize * written.itemsize
        block = Block(
            part.sizes,
            part.source_strides,
            part.target_strides,
            int(self.tensors.starts[source] + part.source_at[row]),
            int(place[target]) + at,
            read,
            written,
        )
        return int(self.tensors.files[source]), block

    def _runs(self, mine: np.ndarray[Any, Any], place: Ints) -> Iterator[Run]:
        sources, source_at, targets, target_at, sizes = self.runs
        rows = np.flatnonzero(mine[targets] & (sizes > 0))
        if not len(rows):
            return
        files = self.tensors.files[sources[rows]]
        start = self.tensors.starts[sources[rows]] + source_at[rows]
        cast = self.cast[targets[rows]]
        to = place[targets[rows]] + _scaled(self, targets[rows], target_at[rows], cast)
        size = sizes[rows]
        order = np.argsort(to, kind="stable")
        files, start, to, size = (column[order] for column in (files, start, to, size))
        cast, targets = cast[order], targets[rows][order]
        fresh = np.ones(len(order), dtype=np.bool_)
        fresh[1:] = (
            (files[1:] != files[:-1])
            | (start[1:] != start[:-1] + size[:-1])
            | (to[1:] != to[:-1] + size[:-1])
            | cast[1:]
            | cast[:-1]
        )
        heads = np.flatnonzero(fresh)
        total = np.add.reduceat(size, heads)
        for head, whole in zip(heads.tolist(), total.tolist(), strict=True):
            file, at, place_at = int(files[head]), int(start[head]), int(to[head])
            read, written = self._types(int(targets[head])) if cast[head] else (None, None)
            ratio = (read.itemsize, written.itemsize) if read and written else (1, 1)
            for done in range(0, whole, UNIT):
                part = min(UNIT, whole - done)
                yield Run(
                    file, at + done, place_at + done // ratio[0] * ratio[1], part, read, written
                )

    def _types(self, target: int) -> tuple[np.dtype[Any], np.dtype[Any]]:
        one, other = self.moves.dtypes[target], self.dtypes[target]
        if one != other:
            return DTYPES[one].numpy, DTYPES[other].numpy
        word = np.dtype(_WORDS[DTYPES[one].bits // 8])
        return word, word


def _join(moves: Moves) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    none = np.zeros(0, dtype=np.int64)
    columns = [(r.sources, r.source_at, r.targets, r.target_at, r.sizes) for r in moves.runs]
    joined = [np.concatenate([none, *parts]) for parts in zip(*columns, strict=True)]
    return (*joined,) if joined else (none,) * 5  # type: ignore[return-value]


def _scaled(cutter: Cutter, targets: Ints, at: Ints, cast: np.ndarray[Any, Any]) -> Ints:
    if not cast.any():
        return at
    items = np.array(
        [
            (DTYPES[cutter.moves.dtypes[t]].bits // 8, DTYPES[cutter.dtypes[t]].bits // 8)
            for t in targets.tolist()
        ],
        dtype=np.int64,
    )
    return np.where(cast, at // items[:, 0] * items[:, 1], at)


def split_block(block: Block, size: int = UNIT) -> Iterator[Block]:
    """A large block in parts along the loop that is outermost in the target."""
    total = block.written.itemsize
    for count in block.sizes:
        total *= count
    loop = max(range(len(block.sizes)), key=lambda i: block.target_strides[i])
    step = max(1, block.sizes[loop] * size // max(total, 1))
    for start in range(0, block.sizes[loop], step):
        sizes = list(block.sizes)
        sizes[loop] = min(step, block.sizes[loop] - start)
        yield Block(
            tuple(sizes),
            block.source_strides,
            block.target_strides,
            block.source_at + start * block.source_strides[loop] * block.read.itemsize,
            block.target_at + start * block.target_strides[loop] * block.written.itemsize,
            block.read,
            block.written,
        )
