"""How the copies of an entry are carried out: loop nests inside tensors, and where each of them begins."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from msgspec import Struct

from regraft.equation.lower import Copy, Nest, nest_of, strides_of
from regraft.equation.notation import Term
from regraft.names.keys import Ints
from regraft.planning.plan import Entry, walk


class Step(Struct, frozen=True, eq=False, dict=True):
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

    @cached_property
    def places(self) -> list[tuple[int, int, int, int]]:
        """The columns row by row: source slot, target slot, and the offsets there."""
        columns = self.source_slots, self.target_slots, self.source_at, self.target_at
        return list(zip(*(column.tolist() for column in columns), strict=True))


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
        return Output(entry, (entry.keys(entry.written[0]).names(),))
    steps = tuple(steps_of(entry))
    shapes = tuple(entry.shape(term) for term in entry.written)
    keys = [entry.keys(term) for term in entry.written]
    return Output(entry, tuple(each.names() for each in keys), shapes, steps)


def steps_of(entry: Entry) -> list[Step]:
    """What carrying out an entry takes, of which nothing depends on its tensors."""
    return [_step(entry, copy, entry.written) for copy in entry.copies]


def compared(entry: Entry) -> list[Step]:
    """The pairs of blocks that must be equal among the tensors that an entry reads."""
    return [_step(entry, copy, entry.read) for copy in entry.repeats]


def _step(entry: Entry, copy: Copy, targets: Sequence[Term]) -> Step:
    shapes = entry.flat_shape(entry.read[copy.source]), entry.flat_shape(targets[copy.target])
    nest = nest_of(copy, *shapes)
    strides = [np.array(strides_of(shape), dtype=np.int64) for shape in shapes]
    axes = [axis for axis in copy.axes if axis.source.in_key or axis.target.in_key]
    from_slots, from_dims = walk(entry, copy, axes, entry.read, target=False)
    to_slots, to_dims = walk(entry, copy, axes, targets, target=True)
    at = strides[0] @ from_dims, strides[1] @ to_dims
    return Step(copy.source, copy.target, nest, from_slots, to_slots, *at)
