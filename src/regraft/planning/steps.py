"""How the copies of an entry are carried out: loop nests inside tensors, and where each of them begins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from regraft.equation.lower import Copy, Nest, Padding, nest_of, strides_of
from regraft.equation.notation import Term
from regraft.names.keys import Ints
from regraft.planning.plan import Entry, walk


class Step(Struct, frozen=True, eq=False):
    """A copy as one loop nest, which is carried out once for every value of the axes that stand in a key.

    The four columns have one row for each of these; they are the same for all loop values of the entry.
    """

    source: int
    """The term that is read."""
    target: int
    """The term that is written; of a demand for equal copies the other term that is read."""
    nest: Nest
    source_slots: Ints
    """Which of the term's tensors."""
    target_slots: Ints
    source_at: Ints
    """In elements, from where the nest begins."""
    target_at: Ints

    places: list[tuple[int, int, int, int]]
    """The columns row by row: source slot, target slot, and the offsets there."""


class Output(Struct, frozen=True, eq=False):
    """What an entry writes, and how."""

    entry: Entry
    names: tuple[list[str], ...]
    """Of each term that is written, loop values first, then stacked indices."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Of each term; none where tensors are only renamed, and keep theirs."""
    steps: tuple[Step, ...] = ()
    """None where tensors are only renamed."""


def output_of(entry: Entry) -> Output:
    """What an entry writes: everything about it that knows nothing of bytes, worked out in one go."""
    if entry.renames:
        return Output(entry, tuple(keys.names() for keys in entry.targets))
    shapes = tuple(entry.shape(term) for term in entry.written)
    steps = tuple(steps_of(entry))
    return Output(entry, tuple(keys.names() for keys in entry.targets), shapes, steps)


def steps_of(entry: Entry) -> list[Step]:
    """What carrying out an entry takes, of which nothing depends on its tensors."""
    return [_step(entry, copy, entry.written) for copy in entry.copies]


class Demands(Struct, frozen=True, eq=False):
    """What an entry demands of the tensors that it reads."""

    compared: list[Step]
    """The pairs of blocks that must be equal."""
    cut: tuple[Padding, ...]
    """What must be padding, since it is cut off."""

    def __bool__(self) -> bool:
        return bool(self.compared or self.cut)


def demands_of(entry: Entry) -> Demands:
    """What an entry demands of the tensors that it reads: nothing, as a rule."""
    compared = [_step(entry, copy, entry.read) for copy in entry.repeats]
    return Demands(compared, entry.paddings(written=False))


def _step(entry: Entry, copy: Copy, targets: Sequence[Term]) -> Step:
    axes = [axis for axis in copy.axes if axis.source.in_key or axis.target.in_key]
    from_slots, from_dims = walk(entry, copy, axes, entry.read, target=False)
    to_slots, to_dims = walk(entry, copy, axes, targets, target=True)
    shapes = entry.shapes[entry.read[copy.source]], entry.shapes[targets[copy.target]]
    nest = nest_of(copy, *shapes)
    from_at, to_at = (
        np.array(strides_of(shape), dtype=np.int64) @ dims
        for shape, dims in zip(shapes, (from_dims, to_dims), strict=True)
    )
    columns = from_slots, to_slots, from_at, to_at
    places = list(zip(*(column.tolist() for column in columns), strict=True))
    return Step(copy.source, copy.target, nest, *columns, places)
