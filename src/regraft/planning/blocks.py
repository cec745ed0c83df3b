"""A plan seen as blocks of matrices: for every copy where rows and columns come from, and where they go.

In each copy the batch axes are iterated; every other axis goes out to out and in to in, or crosswise. What moves
something that is bound to rows and columns, as the factors of a LoRA are, needs to know no more of an equation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from math import prod
from typing import Literal

import numpy as np
from msgspec import Struct

from regraft.equation.lower import Copy, CopyAxis
from regraft.equation.notation import Term
from regraft.errors import Finding, RefusedError
from regraft.names.keys import Group, Ints
from regraft.planning.plan import Entry, Plan, walk
from regraft.rules.kinds import BATCH, IN, NONE, OUT, Laid, lay_out


class Block(Struct, frozen=True, eq=False):
    """A copy seen as blocks of matrices: one for each value of the iterated axes.

    Rows are the target's out index, columns its in index. Crosswise, rows come from the source's in index.
    """

    term: int
    cross: bool
    source_slot: Ints
    source_batch: Ints
    target_slot: Ints
    target_batch: Ints
    rows_from: Ints
    """(iterations, rows): indices along the source's out (crosswise: in)."""
    rows_to: Ints
    columns_from: Ints
    columns_to: Ints
    splits: bool
    """Whether a source tensor gives only a part of itself to one target."""


Way = Literal["stays", "stacks", "blocks"]
"""How the tensors of a term come about: each is one of the source under another name, is a stack of whole ones, or is
made up of blocks."""


class Landing(Struct, frozen=True, dict=True, eq=False):
    """A term that an entry writes, as what lands there sees it."""

    entry: Entry
    number: int
    """Which term of the side that is written it is."""
    term: Term
    kind: str
    keys: Group
    """The keys of its tensors: for each value of the loops as many as ``slots``."""
    slots: int

    @cached_property
    def laid(self) -> Laid:
        """The dims of its tensors, by their roles."""
        return lay_out(self.kind, self.entry.shapes[self.term])

    @property
    def stays(self) -> bool:
        """Whether every tensor only gets another name."""
        return self.entry.moves_nothing

    @cached_property
    def blocks(self) -> list[Block]:
        """The blocks that land in it.

        Raises ``RefusedError`` where an axis goes from out to a batch or from one matrix's in to both: such an
        equation has no low-rank image.
        """
        here = (copy for copy in self.entry.copies if copy.target == self.number)
        return [_block(self.entry, copy, self.laid) for copy in here]

    @cached_property
    def way(self) -> Way:
        """How its tensors come about, as matrices; raises as `blocks` does."""
        if self.stays and self.kind in ("any", "linear"):
            return "stays"
        return "stacks" if _are_whole(self.blocks, self.laid) else "blocks"


def _are_whole(blocks: Iterable[Block], laid: Laid) -> bool:
    """Whether experts that stand in keys become whole stacks, each of them in one run of rows and columns."""
    if BATCH not in laid.roles:
        return False
    order = np.arange(laid.sizes[BATCH])
    for block in blocks:
        if block.cross or block.splits or block.source_batch.any() or block.target_slot.any():
            return False
        if not np.array_equal(block.target_batch, order):
            return False
        places = (block.rows_to, block.columns_to, block.rows_from, block.columns_from)
        if not all(map(_is_one_run, places)):
            return False
    return True


def _is_one_run(places: Ints) -> bool:
    """Whether positions are the same at every iteration, and count up by one."""
    first = places[0, 0]
    return bool((places == np.arange(first, first + places.shape[1])).all())


def landings_of(plan: Plan) -> list[list[tuple[Landing, Way]]]:
    """What lands by each entry of a plan, and how; nothing by one that reads nothing.

    Raises ``RefusedError`` where an equation has no low-rank image.
    """
    there = [any((ids >= 0).any() for ids in entry.sources) for entry in plan.entries]
    return [
        [(landing, landing.way) for landing in landings(entry)] if reads else []
        for entry, reads in zip(plan.entries, there, strict=True)
    ]


def landings(entry: Entry) -> list[Landing]:
    """All terms that an entry writes."""
    found = []
    for number, (term, kind) in enumerate(zip(entry.written, entry.written_kinds, strict=True)):
        slots = prod(entry.stack(term))
        found.append(Landing(entry, number, term, kind, entry.keys(term), slots))
    return found


def _role(axis: CopyAxis, sides: tuple[Laid, Laid], *, source: bool) -> str:
    place = axis.source if source else axis.target
    if not place.in_key and not place.step:
        source = not source  # one element for all of them: out or in as on the other side
        place = axis.target
    return BATCH if place.in_key else sides[not source].roles[place.index]


def _block(entry: Entry, copy: Copy, written: Laid) -> Block:
    shape = entry.shapes[entry.read[copy.source]]
    read = lay_out(entry.read_kinds[copy.source], shape)
    laid = read, written
    iterated, straight, crossed = [], [], []
    for axis in copy.axes:
        roles = _role(axis, laid, source=True), _role(axis, laid, source=False)
        if axis.size == 1 and BATCH not in roles:
            continue
        if BATCH in roles:
            iterated.append(axis)
        elif NONE in roles:
            raise no_image(entry, f"{axis.name} is neither an out nor an in axis")
        elif roles[0] == roles[1]:
            straight.append(axis)
        else:
            crossed.append(axis)
    if straight and crossed:
        raise no_image(
            entry,
            f"{straight[0].name} keeps its side and {crossed[0].name} changes it, "
            "so a low-rank block does not stay one",
        )
    cross = bool(crossed)
    here = _Walked.of(entry, copy, iterated, read, target=False)
    there = _Walked.of(entry, copy, iterated, written, target=True)
    inner = straight or crossed
    target_out = [a for a in inner if _role(a, laid, source=False) == OUT]
    target_in = [a for a in inner if _role(a, laid, source=False) == IN]
    out_role, in_role = (IN, OUT) if cross else (OUT, IN)
    rows_from = (here.in_at if cross else here.out_at)[:, None] + offsets(
        target_out, source=True, steps=read.steps[out_role]
    )
    columns_from = (here.out_at if cross else here.in_at)[:, None] + offsets(
        target_in, source=True, steps=read.steps[in_role]
    )
    per_target = Counter(zip(here.slot.tolist(), there.slot.tolist(), strict=True))
    given = min(per_target.values()) * rows_from.shape[1] * columns_from.shape[1]
    return Block(
        copy.source,
        cross,
        here.slot,
        here.batch,
        there.slot,
        there.batch,
        rows_from,
        there.out_at[:, None] + offsets(target_out, source=False, steps=written.steps[OUT]),
        columns_from,
        there.in_at[:, None] + offsets(target_in, source=False, steps=written.steps[IN]),
        given < prod(shape),
    )


class _Walked(Struct, frozen=True, eq=False):
    """One side of a copy at every value of the iterated axes: key slot, batch index, out and in index."""

    slot: Ints
    batch: Ints
    out_at: Ints
    in_at: Ints

    @staticmethod
    def of(
        entry: Entry,
        copy: Copy,
        axes: list[CopyAxis],
        laid: Laid,
        *,
        target: bool,
    ) -> _Walked:
        slot, moved = walk(
            entry, copy, axes, entry.written if target else entry.read, target=target
        )
        start = np.array(copy.target_start if target else copy.source_start, dtype=np.int64)
        index = moved + start.reshape(-1, 1)
        batch, out, into = (
            np.array([laid.steps[role] for role in (BATCH, OUT, IN)], dtype=np.int64) @ index
        )
        return _Walked(slot, batch, out, into)


def offsets(axes: Iterable[CopyAxis], *, source: bool, steps: Sequence[int]) -> Ints:
    """Positions of a role at every point of some axes; ``steps`` are those of the dims."""
    offsets = np.zeros(1, dtype=np.int64)
    for axis in axes:
        place = axis.source if source else axis.target
        step = place.step * steps[place.index] if place.step else 0
        offsets = (offsets[:, None] + np.arange(axis.size) * step).reshape(-1)
    return offsets


def no_image(entry: Entry, why: str) -> RefusedError:
    """Why what is bound to rows and columns cannot follow a rule."""
    return RefusedError(
        Finding(
            "no-image",
            f"a LoRA has no exact equivalent under this equation: {why}",
            rule=str(entry.rule),
            fix="merge the adapter into its base and convert the base",
        )
    )
