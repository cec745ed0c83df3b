"""How one tensor is made of others, found by the content of rows and columns alone.

A *whole* is searched for the first row of every *part*, as it lies and turned; where one is found, the part is compared
there bit by bit. The parts that tile the whole are its blocks: stacked, one below the other, or side by side.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from regraft.learning.content import Bits, Tensor

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Block:
    """A part and where it lies in the whole."""

    part: str
    lead: int | None
    """The index in the whole's first dim, where parts are stacked there."""
    size: int
    """How far it goes along the dim in which parts are joined; 1 where nothing is."""
    turned: bool
    """Whether it is transposed there."""


@dataclass(frozen=True, slots=True)
class Made:
    """A whole and its blocks, in order."""

    whole: str
    blocks: tuple[Block, ...]
    along: str
    """``rows``, ``columns``: along which of its last two dims parts are joined; ``first``: its first dim;
    ``last``: its only or last dim; ``none``: parts are stacked or whole."""


def natural(name: str) -> tuple[object, ...]:
    """A sorting key that counts: w2 before w10."""
    return tuple(
        (0, int(piece)) if piece.isdigit() else (1, piece) for piece in re.split(r"([0-9]+)", name)
    )


class Finder:
    """Finds how wholes are made of some parts; a part is used once."""

    def __init__(self, parts: Iterable[Tensor]) -> None:
        usable = [p for p in parts if p.whole and p.size and len(p.shape)]
        self.parts = {part.name: part for part in sorted(usable, key=lambda p: natural(p.name))}
        self.used: set[str] = set()
        self.rows: dict[tuple[str, int], dict[int, list[tuple[str, bool]]]] = defaultdict(
            lambda: defaultdict(list)
        )
        self.flat: dict[str, list[str]] = defaultdict(list)
        for part in self.parts.values():
            self._index(part)

    def _index(self, part: Tensor) -> None:
        if len(part.shape) == 1:
            self.flat[part.dtype].append(part.name)
            return
        if len(part.shape) == 2:
            for turned in (False, True):
                view = part.bits.T if turned else part.bits
                mark = int(_marks(view[:1])[0])
                self.rows[part.dtype, view.shape[1]][mark].append((part.name, turned))
        else:
            for row in (part.bits[:1].reshape(1, -1), part.bits.reshape(1, -1)):
                mark = int(_marks(row)[0])
                self.rows[part.dtype, row.shape[1]][mark].append((part.name, False))

    def find(self, whole: Tensor) -> Made | None:
        """The blocks of a whole; ``None`` where parts do not tile it."""
        if not whole.whole or not whole.size:
            return None
        for way in self._ways(whole):
            if way is not None and (len(way.blocks) > 1 or way.blocks[0].lead is not None):
                self.used.update(block.part for block in way.blocks)
                return way
        return None

    def _ways(self, whole: Tensor) -> Iterator[Made | None]:
        dims = len(whole.shape)
        if dims in (1, 2):
            yield self._vectors(whole)
        if dims in (2, 3):
            yield self._matrices(whole, columns=False)
            yield self._matrices(whole, columns=True)
        if dims >= 3:
            yield self._slabs(whole)

    def _matrices(self, whole: Tensor, *, columns: bool) -> Made | None:
        """Parts with two dims, joined along rows or columns, stacked where the whole has three dims."""
        bits = whole.bits.swapaxes(-1, -2) if columns else whole.bits
        height = bits.shape[-2]
        stacked = bits.ndim == 3
        known = self.rows.get((whole.dtype, bits.shape[-1]))
        if not known:
            return None
        blocks: list[Block] = []
        taken: set[str] = set()
        for lead in range(bits.shape[0] if stacked else 1):
            slab = bits[lead] if stacked else bits
            hits = self._hits(slab, known)
            at = 0
            while at < height:
                block = self._place(slab, at, hits.get(at, ()), taken, lead if stacked else None)
                if block is None:
                    return None
                blocks.append(block)
                taken.add(block.part)
                at += block.size
        joined = any(block.size != height for block in blocks)
        return Made(
            whole.name, tuple(blocks), ("columns" if columns else "rows") if joined else "none"
        )

    def _hits(
        self, slab: Bits, known: Mapping[int, list[tuple[str, bool]]]
    ) -> dict[int, list[tuple[str, bool]]]:
        marks = _marks(slab)
        wanted = np.fromiter(known, dtype=np.uint64, count=len(known))
        rows = np.flatnonzero(np.isin(marks, wanted))
        return {int(row): known[int(marks[row])] for row in rows.tolist()}

    def _place(
        self,
        slab: Bits,
        at: int,
        candidates: Sequence[tuple[str, bool]],
        taken: set[str],
        lead: int | None,
    ) -> Block | None:
        for name, turned in candidates:
            if name in self.used or name in taken or len(self.parts[name].shape) != 2:
                continue
            bits = self.parts[name].bits
            view = bits.T if turned else bits
            if np.array_equal(slab[at : at + len(view)], view):
                return Block(name, lead, len(view), turned)
        return None

    def _slabs(self, whole: Tensor) -> Made | None:
        """Parts with three dims or more, joined along the first dim or stacked."""
        flat = whole.bits.reshape(len(whole.bits), -1)
        known = self.rows.get((whole.dtype, flat.shape[1]))
        if not known:
            return None
        hits = self._hits(flat, known)
        blocks: list[Block] = []
        taken: set[str] = set()
        stack: bool | None = None
        at = 0
        while at < len(flat):
            for name, _ in hits.get(at, ()):
                part = self.parts[name]
                if name in self.used or name in taken or len(part.shape) < 3:
                    continue
                is_stack = part.shape == whole.shape[1:]
                if not is_stack and part.shape[1:] != whole.shape[1:]:
                    continue
                size = 1 if is_stack else part.shape[0]
                rows = part.bits.reshape(size, -1)
                if stack in (None, is_stack) and np.array_equal(flat[at : at + size], rows):
                    stack = is_stack
                    blocks.append(Block(name, at if is_stack else None, size, turned=False))
                    taken.add(name)
                    at += size
                    break
            else:
                return None
        return Made(whole.name, tuple(blocks), "none" if stack else "first")

    def _vectors(self, whole: Tensor) -> Made | None:
        """Parts with one dim, one after the other, stacked where the whole has two dims."""
        names = self.flat.get(whole.dtype)
        if not names:
            return None
        stacked = len(whole.shape) == 2
        width = whole.shape[-1]
        fitting = [n for n in names if n not in self.used and self.parts[n].shape[0] <= width]
        by_first: dict[int, list[str]] = defaultdict(list)
        for name in fitting:
            by_first[int(self.parts[name].bits[0])].append(name)
        blocks: list[Block] = []
        taken: set[str] = set()
        for lead, row in enumerate(whole.bits.reshape(-1, width)):
            at = 0
            while at < width:
                for name in by_first.get(int(row[at]), ()):
                    part = self.parts[name].bits
                    if name not in taken and np.array_equal(row[at : at + len(part)], part):
                        blocks.append(
                            Block(name, lead if stacked else None, len(part), turned=False)
                        )
                        taken.add(name)
                        at += len(part)
                        break
                else:
                    return None
        joined = any(block.size != width for block in blocks)
        return Made(whole.name, tuple(blocks), "last" if joined else "none")


def _marks(rows: Bits) -> Bits:
    """A number for each row that equal rows share; others hardly ever do."""
    count, width = rows.shape
    factors = np.random.default_rng(width).integers(1, 2**63, width, dtype=np.uint64) | np.uint64(1)
    marks = np.empty(count, dtype=np.uint64)
    step = max(1, _CHUNK // max(width, 1))
    for start in range(0, count, step):
        part = rows[start : start + step].astype(np.uint64)
        # A zero says nothing of where it stands, so one is added to every element.
        marks[start : start + step] = ((part + np.uint64(1)) * factors).sum(axis=1, dtype=np.uint64)
    return marks
