"""What a plan moves, in columns: contiguous runs of bytes, and strided blocks.

The bytes reader of a plan. It knows where every tensor's bytes are and what the plan says, and
nothing of rules or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress
from math import prod

import numpy as np
from msgspec import Struct, field

from regraft.checkpoints.source import Tensors
from regraft.equation.lower import Nest
from regraft.errors import Finding, RefusedError
from regraft.names.keys import Ints
from regraft.planning.plan import Carried, Entry
from regraft.planning.rows import index_grid
from regraft.planning.slices import Slicer
from regraft.planning.steps import Output
from regraft.storage.dtypes import DTYPES

LONG_RUN = 1 << 16
"""Runs of so many bytes are worth a system call each; shorter ones are gathered in memory."""


class Runs(Struct, frozen=True, eq=False):
    """Contiguous runs, one a row. Bytes are counted in the source's type."""

    sources: Ints
    """Rows of the source's tensors."""
    source_at: Ints
    """Bytes from the tensor's start."""
    targets: Ints
    target_at: Ints
    sizes: Ints


class Strided(Struct, frozen=True, eq=False):
    """One loop nest at many places. Sizes and strides count elements, offsets bytes of the source's type."""

    sizes: tuple[int, ...]
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]
    sources: Ints
    source_at: Ints
    targets: Ints
    target_at: Ints


class Moves(Struct, eq=False):
    """The result's tensors, and what they are made of."""

    names: list[str] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    runs: list[Runs] = field(default_factory=list)
    strided: list[Strided] = field(default_factory=list)
    first: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """For every target the first of its sources: the one that stands first in the source's files."""
    dtypes: list[str] = field(default_factory=list)
    sizes: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """In bytes of the source's type."""
    whole: bool = True
    """Whether every target is one source's bytes."""
    kept: dict[str, str] = field(default_factory=dict)
    """For every tensor that stays whole and is renamed, its new name."""
    made: list[tuple[Entry, list[int]]] = field(default_factory=list)
    """Entries that cut or join, with the first target of each of their terms."""
    wholes: list[tuple[int, Ints]] = field(default_factory=list)
    """Targets that are sources as they are: the number of the first, and the sources' rows."""
    aliases: dict[str, str | None] = field(default_factory=dict)
    """For every name that the metadata has for another tensor its new one; ``None`` where it is a tensor now."""

    def add(self, names: Iterable[str], shape: tuple[int, ...], count: int) -> int:
        """Add targets of one shape; the number of the first."""
        at = len(self.names)
        self.names += names
        self.shapes += [shape] * count
        return at

    def add_whole(self, names: Sequence[str], ids: Ints, tensors: Tensors) -> None:
        """Add targets that are sources as they are."""
        at = len(self.names)
        self.names += names
        self.shapes += [tensors.shapes[i] for i in ids.tolist()]
        none = np.zeros(len(ids), dtype=np.int64)
        targets = at + np.arange(len(ids), dtype=np.int64)
        self.runs.append(Runs(ids, none, targets, none, tensors.sizes[ids]))
        self.wholes.append((at, ids))
        for i, name in zip(ids.tolist(), names, strict=True):
            if tensors.names[i] != name:
                self.kept[tensors.names[i]] = name


def identity(tensors: Tensors) -> Moves:
    """Every tensor as it is."""
    moves = Moves()
    moves.add_whole(tensors.names, np.arange(len(tensors), dtype=np.int64), tensors)
    return finish(moves, tensors)


def moves_of(outputs: Sequence[Output], carried: Sequence[Carried], tensors: Tensors) -> Moves:
    """What the entries of a plan write, and what it carries; not finished, so that more can be added.

    Rows beyond the tensors stand for weights whose bytes are in other tensors.

    Raises ``RefusedError`` where tensors of packed elements would be cut or joined.
    """
    moves = Moves()
    findings: list[Finding] = []
    for output in outputs:
        if output.entry.renames:
            ids = output.entry.sources[0].reshape(-1)
            moves.add_whole(*_real(output.names[0], ids, tensors), tensors)
        else:
            findings += _check_packed(output.entry, tensors)
            if not findings:
                add_output(moves, output, tensors)
    if findings:
        raise RefusedError(findings)
    for each in carried:
        moves.add_whole(*_real(each.group.names(), each.group.ids, tensors), tensors)
    return moves


def _real(names: list[str], ids: Ints, tensors: Tensors) -> tuple[list[str], Ints]:
    real = ids < len(tensors)
    return names if real.all() else list(compress(names, real.tolist())), ids[real]


def add_output(moves: Moves, output: Output, tensors: Tensors) -> None:
    """Add what an entry writes."""
    entry = output.entry
    count = len(entry)
    loops = np.arange(count, dtype=np.int64)[:, None]
    moves.whole = False
    bases, slots = [], []
    for shape, names in zip(output.shapes, output.names, strict=True):
        bases.append(moves.add(names, shape, len(names)))
        slots.append(len(names) // count)
    moves.made.append((entry, bases))
    for step in output.steps:
        ids = entry.sources[step.source].reshape(count, -1)[:, step.source_slots]
        targets = bases[step.target] + loops * slots[step.target] + step.target_slots[None, :]
        rows = ids.reshape(-1), np.tile(step.source_at, count), targets.reshape(-1)
        _add_nest(moves, step.nest, *rows, np.tile(step.target_at, count), tensors)


def _add_nest(
    moves: Moves,
    nest: Nest,
    ids: Ints,
    from_at: Ints,
    targets: Ints,
    to_at: Ints,
    tensors: Tensors,
) -> None:
    bits = {dtype: DTYPES[dtype].bits for dtype in set(tensors.dtypes)}
    items = np.array([bits[tensors.dtypes[i]] // 8 for i in ids.tolist()], dtype=np.int64)
    source_at = (from_at + nest.source_offset) * items
    target_at = (to_at + nest.target_offset) * items
    if 0 in nest.sizes:
        return
    run, outer = 1, len(nest.sizes)
    if outer and nest.source_strides[-1] == nest.target_strides[-1] == 1:
        run, outer = nest.sizes[-1], outer - 1
    if outer == 0:
        moves.runs.append(Runs(ids, source_at, targets, target_at, run * items))
        return
    if run * int(items.max(initial=1)) < LONG_RUN:
        strides = nest.source_strides, nest.target_strides
        moves.strided.append(Strided(nest.sizes, *strides, ids, source_at, targets, target_at))
        return
    grid = index_grid(nest.sizes[:outer])
    steps: list[Ints] = [
        np.array(strides[:outer], dtype=np.int64) @ grid
        for strides in (nest.source_strides, nest.target_strides)
    ]
    points = grid.shape[1]
    ids, source_at, targets, target_at, items = (
        np.repeat(column, points) for column in (ids, source_at, targets, target_at, items)
    )
    rows = len(ids) // points
    moves.runs.append(
        Runs(
            ids,
            source_at + np.tile(steps[0], rows) * items,
            targets,
            target_at + np.tile(steps[1], rows) * items,
            run * items,
        )
    )


def finish(moves: Moves, tensors: Tensors) -> Moves:
    """Work out dtypes, sizes and the first source of every target.

    Raises ``RefusedError`` where tensors of several dtypes would become one.
    """
    codes = {dtype: code for code, dtype in enumerate(dict.fromkeys(tensors.dtypes))}
    of_source = np.array([codes[dtype] for dtype in tensors.dtypes], dtype=np.int64)
    place = np.empty(len(tensors), dtype=np.int64)
    order = np.lexsort((tensors.starts, tensors.files))
    place[order] = np.arange(len(tensors))
    count = len(moves.names)
    first = np.full(count, len(tensors), dtype=np.int64)
    low = np.full(count, len(codes), dtype=np.int64)
    high = np.full(count, -1, dtype=np.int64)
    parts: list[Runs | Strided] = [*moves.runs, *moves.strided]
    for part in parts:
        np.minimum.at(first, part.targets, place[part.sources])
        np.minimum.at(low, part.targets, of_source[part.sources])
        np.maximum.at(high, part.targets, of_source[part.sources])
    mixed = np.flatnonzero((low != high) & (high >= 0))
    names = list(codes)
    if len(mixed):
        raise RefusedError(
            Finding(
                "mixed-dtypes",
                f"tensors of {names[int(low[i])]} and {names[int(high[i])]} would become this one",
                key=moves.names[int(i)],
                fix="cast them to one dtype first",
            )
            for i in mixed[:20].tolist()
        )
    empty = first == len(tensors)
    if empty.any():
        low[empty] = 0
        first[empty] = 0
    moves.first = order[first]
    moves.dtypes = [names[code] for code in low.tolist()]
    moves.sizes = np.array(
        [size_of(d, s) for d, s in zip(moves.dtypes, moves.shapes, strict=True)], dtype=np.int64
    )
    return moves


def slicer_of(moves: Moves, tensors: Tensors) -> Slicer:
    """The slicer of everything that moves make: what rules make, what stays whole, and what belongs to weights."""
    slicer = Slicer(tensors.shapes, tensors.dtypes)
    for entry, bases in moves.made:
        names = []
        for term, base in zip(entry.written, bases, strict=True):
            count = len(entry) * prod(entry.stack(term))
            names.append(moves.names[base : base + count])
        slicer.add_entry(entry, names)
    for base, rows in moves.wholes:
        slicer.add_whole(moves.names[base : base + len(rows)], rows)
    return slicer


def pairs_from(moves: Moves, start: int, tensors: Tensors) -> list[tuple[str, str]]:
    """Which source each of the targets from a number on is made of, and which target: their names."""
    pairs: dict[tuple[str, str], None] = {}
    parts: list[Runs | Strided] = [*moves.runs, *moves.strided] if start < len(moves.names) else []
    for part in parts:
        late = part.targets >= start
        for source, target in zip(
            part.sources[late].tolist(), part.targets[late].tolist(), strict=True
        ):
            pairs[tensors.names[source], moves.names[target]] = None
    return list(pairs)


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """How many bytes a tensor has."""
    count = DTYPES[dtype].bits
    for size in shape:
        count *= size
    return count // 8


def _check_packed(entry: Entry, tensors: Tensors) -> list[Finding]:
    used = {int(i) for ids in entry.sources for i in ids.reshape(-1)[:1]}
    if any(i >= len(tensors) for i in used):
        key = entry.keys(entry.written[0]).name(0)
        message = "it is packed, and its weight would be cut or joined"
        fix = "convert the model before it is quantised"
        return [Finding("packed", message, key=key, rule=str(entry.rule), fix=fix)]
    return [
        Finding(
            "packed",
            f"its elements are packed ({tensors.dtypes[i]}), and it would be cut or joined",
            key=tensors.names[i],
            rule=str(entry.rule),
            fix="convert the model before it is quantised",
        )
        for i in used
        if DTYPES[tensors.dtypes[i]].bits % 8
    ]
