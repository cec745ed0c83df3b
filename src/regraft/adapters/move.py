"""The deltas reader: what becomes of LoRA factors when a plan moves their base weights.

In each copy of a plan the batch axes are iterated; every other axis goes out to out and in to in, or crosswise. Then
a low-rank block ``B A`` lands as ``(P B)(A Q)``, or as ``(P A^T)(B^T Q)``. One rule for every equation there is.
Ranks add where blocks meet; components that share a factor bit for bit are one; components that a split leaves
without effect are dropped.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from math import log2, prod
from operator import attrgetter
from typing import Any

import numpy as np
from msgspec import Struct, field

from regraft.adapters.components import Part, Record
from regraft.adapters.form import Array, Factors, Images, Lora, common_dtype, is_finite, rescale
from regraft.adapters.scale import Scale
from regraft.equation.lower import Copy, CopyAxis, Padding
from regraft.equation.notation import Term
from regraft.errors import Finding, RefusedError
from regraft.names.keys import Ints
from regraft.planning.plan import Entry, walk
from regraft.rules.kinds import BATCH, IN, KINDS, NONE, OUT, Kind
from regraft.values import replace

_DTYPE = attrgetter("dtype")
_TILE = 32
"""Experts that are turned at a time, so that what is read stays in the cache."""


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


def blocks_of(entry: Entry, target: int) -> list[Block]:
    """The blocks that land in one term of the side that is written.

    Raises ``RefusedError`` where an axis goes from out to a batch or from one matrix's in to both: such an
    equation has no low-rank image.
    """
    return [_block(entry, copy) for copy in entry.copies if copy.target == target]


def _role(axis: CopyAxis, *, source: bool, kinds: tuple[str, str]) -> str:
    place = axis.source if source else axis.target
    if not place.in_key and not place.step:
        source = not source  # one element for all of them: out or in as on the other side
        place = axis.target
    return BATCH if place.in_key else KINDS[kinds[not source]].role(place.index)


def _block(entry: Entry, copy: Copy) -> Block:
    read, written = entry.read[copy.source], entry.written[copy.target]
    kinds = entry.read_kinds[copy.source], entry.written_kinds[copy.target]
    iterated, straight, crossed = [], [], []
    for axis in copy.axes:
        roles = _role(axis, source=True, kinds=kinds), _role(axis, source=False, kinds=kinds)
        if axis.size == 1 and BATCH not in roles:
            continue
        if BATCH in roles:
            iterated.append(axis)
        elif NONE in roles:
            raise _no_image(entry, f"{axis.name} is neither an out nor an in axis")
        elif roles[0] == roles[1]:
            straight.append(axis)
        else:
            crossed.append(axis)
    if straight and crossed:
        raise _no_image(
            entry,
            f"{straight[0].name} keeps its side and {crossed[0].name} changes it, "
            "so a low-rank block does not stay one",
        )
    cross = bool(crossed)
    shapes = entry.flat_shape(read), entry.flat_shape(written)
    sides = [
        _Walked.of(entry, copy, iterated, target=bool(target), kind=kind, shape=shape)
        for target, (kind, shape) in enumerate(zip(kinds, shapes, strict=True))
    ]
    here, there = sides
    inner = straight or crossed
    target_out = [a for a in inner if _role(a, source=False, kinds=kinds) == OUT]
    target_in = [a for a in inner if _role(a, source=False, kinds=kinds) == IN]
    steps = [
        {role: KINDS[kind].steps(shape, role) for role in (OUT, IN)}
        for kind, shape in zip(kinds, shapes, strict=True)
    ]
    out_role, in_role = (IN, OUT) if cross else (OUT, IN)
    rows_from = (here.in_at if cross else here.out_at)[:, None] + _offsets(
        target_out, source=True, steps=steps[0][out_role]
    )
    columns_from = (here.out_at if cross else here.in_at)[:, None] + _offsets(
        target_in, source=True, steps=steps[0][in_role]
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
        there.out_at[:, None] + _offsets(target_out, source=False, steps=steps[1][OUT]),
        columns_from,
        there.in_at[:, None] + _offsets(target_in, source=False, steps=steps[1][IN]),
        given < prod(shapes[0]),
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
        *,
        target: bool,
        kind: str,
        shape: tuple[int, ...],
    ) -> _Walked:
        slot, moved = walk(
            entry, copy, axes, entry.written if target else entry.read, target=target
        )
        start = np.array(copy.target_start if target else copy.source_start, dtype=np.int64)
        index = moved + start.reshape(-1, 1)

        def along(role: str) -> Ints:
            return np.array(KINDS[kind].steps(shape, role), dtype=np.int64) @ index

        return _Walked(slot, along(BATCH), along(OUT), along(IN))


def _offsets(axes: Iterable[CopyAxis], *, source: bool, steps: Sequence[int]) -> Ints:
    """Positions of a role at every point of some axes; ``steps`` are those of the dims."""
    offsets = np.zeros(1, dtype=np.int64)
    for axis in axes:
        place = axis.source if source else axis.target
        step = place.step * steps[place.index] if place.step else 0
        offsets = (offsets[:, None] + np.arange(axis.size) * step).reshape(-1)
    return offsets


def _no_image(entry: Entry, why: str) -> RefusedError:
    return RefusedError(
        Finding(
            "no-image",
            f"a LoRA has no exact equivalent under this equation: {why}",
            rule=str(entry.rule),
            fix="merge the adapter into its base and convert the base",
        )
    )


class _Contribution(Struct):
    source: int
    a: Array
    b: Array
    scale: Scale
    block: Block
    at: int
    """The iteration of the block."""


class _Component(Struct):
    rows: set[int]
    columns: set[int]


class _Stack(Struct):
    """The components of one matrix of a target."""

    rank: int = 0
    placed: list[tuple[_Contribution, list[int]]] = field(default_factory=list)


def images(
    entry: Entry, factors: Factors, record: Record, *, fast: bool = True
) -> Iterator[Images]:
    """The LoRA of every tensor that an entry writes.

    ``record`` says, on a way back, which components were whose, and is told, on a way there, for the next way
    back. ``fast`` allows the path for whole stacks; its results are those of the general path.

    Raises ``RefusedError`` where the equation has no low-rank image.
    """
    for number, (term, kind) in enumerate(zip(entry.written, entry.written_kinds, strict=True)):
        keys = entry.keys(term)
        slots = prod(entry.stack(term))
        loras: list[Lora | None] = []
        if all((ids < 0).all() for ids in entry.sources):
            continue
        _check_one_sided(entry, factors)
        if kind == "any" and entry.moves_nothing:
            yield Images(
                keys, "linear", [_as_it_is(int(i), factors) for i in entry.sources[0].flat]
            )
            continue
        if fast and not record.recorded and _only_renames(entry, kind):
            yield Images(keys, kind, [_as_it_is(int(i), factors) for i in entry.sources[0].flat])
            continue
        blocks = blocks_of(entry, number)
        shape = entry.flat_shape(term)
        whole = _Whole.of(entry, blocks, shape, kind) if fast and not record.recorded else None
        for loop in range(len(entry)):
            for slot in range(slots):
                row = loop * slots + slot
                lora = whole.image(loop, factors, record, keys.name(row)) if whole else None
                if lora is None:
                    lora = _image(
                        entry, factors, blocks, loop, slot, term, kind, record, keys.name(row)
                    )
                loras.append(lora)
        yield Images(keys, kind, loras)


def _check_one_sided(entry: Entry, factors: Factors) -> None:
    """What stands on the side that is read only must add the same everywhere (copies), and nothing to padding.

    Raises ``RefusedError``.
    """
    for copy in entry.repeats:
        for loop in range(len(entry)):
            for one, other in zip(
                *(_read_at(entry, factors, copy, loop, other=bool(end)) for end in range(2)),
                strict=True,
            ):
                same = (one is None) == (other is None)
                if same and one is not None and other is not None:
                    same = one[2] == other[2] and all(map(np.array_equal, one[:2], other[:2]))
                if not same:
                    raise _no_image(
                        entry,
                        f"along {', '.join(entry.rule.equation.copies)} the base has one weight "
                        "several times, and the adapter does not add the same to each",
                    )
    for padding in entry.paddings(written=False):
        term, kind = entry.read[padding.term], KINDS[entry.read_kinds[padding.term]]
        shape = entry.flat_shape(term)
        cut = {role: _positions(padding, kind.steps(shape, role)) for role in (OUT, IN)}
        for number in entry.sources[padding.term].reshape(-1).tolist():
            if number < 0:
                continue
            a, b = factors.a[number], factors.b[number]
            rows, columns = b[..., cut[OUT], :], a[..., cut[IN]]
            if rows.any() and columns.any():
                raise _no_image(entry, "it adds to padding, which the target does not have")


def _positions(padding: Padding, steps: Sequence[int]) -> Ints:
    """The positions of a role that padding takes."""
    at = np.zeros(1, dtype=np.int64) + sum(
        start * step for start, step in zip(padding.start, steps, strict=True)
    )
    for size, place in padding.axes:
        step = 0 if place.in_key else place.step * steps[place.index]
        if step:
            at = (at[:, None] + np.arange(size) * step).reshape(-1)
    return at


def _read_at(
    entry: Entry, factors: Factors, copy: Copy, loop: int, *, other: bool
) -> list[tuple[Array, Array, Fraction] | None]:
    """The factors at one end of a copy between tensors that are read, for each tensor on the way."""
    number = copy.target if other else copy.source
    kind = KINDS[entry.read_kinds[number]]
    shape = entry.flat_shape(entry.read[number])
    keyed = [axis for axis in copy.axes if axis.source.in_key or axis.target.in_key]
    slots, moved = walk(entry, copy, keyed, entry.read, target=other)
    start = np.array(copy.target_start if other else copy.source_start).reshape(-1, 1) + moved
    inner = [axis for axis in copy.axes if axis not in keyed]
    result: list[tuple[Array, Array, Fraction] | None] = []
    for slot, at in zip(slots.tolist(), start.T, strict=True):
        source = int(entry.sources[number][loop].reshape(-1)[slot])
        if source < 0:
            result.append(None)
            continue
        a, b = factors.a[source], factors.b[source]
        if kind.kernel:
            a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
        places = {
            role: int(np.dot(kind.steps(shape, role), at))
            + _offsets(
                [x for x in inner if _plays(x, other=other, kind=kind, role=role)],
                source=not other,
                steps=kind.steps(shape, role),
            )
            for role in (OUT, IN)
        }
        result.append((a[..., places[IN]], b[..., places[OUT], :], factors.scales[source].exact))
    return result


def _plays(axis: CopyAxis, *, other: bool, kind: Kind, role: str) -> bool:
    place = axis.target if other or not axis.source.step else axis.source
    return kind.role(place.index) == role


def _only_renames(entry: Entry, kind: str) -> bool:
    """Whether matrices only get another name, so that their factors are what they were."""
    alone = len(entry.read) == len(entry.written) == 1 and entry.moves_nothing
    return alone and kind == entry.read_kinds[0] == "linear"


def _as_it_is(source: int, factors: Factors) -> Lora | None:
    """The LoRA of a weight that only gets another name: a convolution's, say, whose factors have more dims."""
    if source < 0:
        return None
    return Lora(factors.a[source], factors.b[source], factors.scales[source])


def _image(
    entry: Entry,
    factors: Factors,
    blocks: list[Block],
    loop: int,
    slot: int,
    term: Term,
    kind: str,
    record: Record,
    key: str,
) -> Lora | None:
    shape = entry.flat_shape(term)
    roles = [KINDS[kind].role(dim) for dim in range(len(shape))]
    batch = shape[roles.index(BATCH)] if BATCH in roles else 1
    out_size, in_size = (KINDS[kind].size(shape, role) for role in (OUT, IN))
    given: list[list[_Contribution]] = [[] for _ in range(batch)]
    for block in blocks:
        for at in np.flatnonzero(block.target_slot == slot).tolist():
            source = int(entry.sources[block.term][loop].reshape(-1)[block.source_slot[at]])
            if source < 0:
                continue
            a, b = factors.a[source], factors.b[source]
            if KINDS[entry.read_kinds[block.term]].kernel:
                a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
            if a.ndim == 3:
                a, b = a[block.source_batch[at]], b[block.source_batch[at]]
            rows, columns = block.rows_from[at], block.columns_from[at]
            if block.cross:
                a, b = b[columns].T, a[:, rows].T
            else:
                a, b = a[:, columns], b[rows]
            contribution = _Contribution(source, a, b, factors.scales[source], block, at)
            given[block.target_batch[at]].append(contribution)
    flat = [c for each in given for c in each]
    part = record.part(key, sum(c.a.shape[0] for c in flat))
    given = [
        [_without_effectless(c, part) if c.block.splits else c for c in each] for each in given
    ]
    flat = [c for each in given for c in each]
    if not any(c.a.shape[0] for c in flat):
        return None
    stacks = [_stack(each) for each in given]
    for stack in stacks:
        _check_mixing(stack, out_size, in_size, key)
    rank = max(stack.rank for stack in stacks)
    if part is not None:
        rank = max(rank, part.scale.rank)
    scale, scaled, lossy = _share_scale(flat, rank, part, key)
    a_out = np.zeros((batch, rank, in_size), common_dtype({c.a.dtype for c in flat}))
    packed = np.zeros((out_size, rank, batch), common_dtype({s.dtype for s in scaled.values()}))
    for number, stack in enumerate(stacks):
        for contribution, places in stack.placed:
            block, at = contribution.block, contribution.at
            if not places:
                continue
            a_out[number][_box(places, block.columns_to[at])] = contribution.a
            packed[:, :, number][_box(block.rows_to[at], places)] = scaled[id(contribution)]
            if not block.splits:
                record.note(
                    key,
                    Part(
                        factors.headers.name(contribution.source),
                        int(block.source_batch[at]),
                        number,
                        tuple(places),
                        contribution.scale,
                    ),
                )
    b_out = packed.transpose(2, 0, 1)
    if BATCH not in roles:
        a_out, b_out = a_out[0], b_out[0]
    if KINDS[kind].kernel:
        whole = entry.shape(term)
        a_out = a_out.reshape(rank, *whole[1:])
        b_out = b_out.reshape(out_size, rank, *(1 for _ in whole[2:]))
    changed = {
        c.source
        for c in flat
        if (c.a.dtype, c.b.dtype) != (a_out.dtype, b_out.dtype) or c.source in lossy
    }
    return Lora(a_out, b_out, scale.at_rank(rank), not lossy, tuple(sorted(changed)))


def _box(rows: Sequence[int] | Ints, columns: Sequence[int] | Ints) -> Any:
    """An index of some rows and columns: slices where both are runs, which is much faster."""
    runs = _run(rows), _run(columns)
    return runs if None not in runs else np.ix_(np.asarray(rows), np.asarray(columns))


def _run(index: Sequence[int] | Ints) -> slice | None:
    """The slice that an index is, if it counts up by one."""
    if not len(index):
        return None
    first, last = int(index[0]), int(index[-1])
    if last - first != len(index) - 1 or (np.diff(index) != 1).any():
        return None
    return slice(first, last + 1)


def _without_effectless(contribution: _Contribution, part: Part | None) -> _Contribution:
    a, b = contribution.a, contribution.b
    alive = (a != 0).any(axis=1) & (b != 0).any(axis=0)
    if not (is_finite(a) and is_finite(b)):  # zero times NaN has an effect
        alive |= ~(np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=0))
    keep: Ints = np.flatnonzero(alive)
    if part is not None and all(place < len(alive) for place in part.places):
        told = np.array(part.places, dtype=np.int64)
        if set(keep.tolist()) <= set(part.places):
            keep = told
    if np.array_equal(keep, np.arange(len(alive))):
        return contribution
    return replace(contribution, a=a[keep], b=b[:, keep])


def _share_scale(
    contributions: list[_Contribution], rank: int, part: Part | None, key: str
) -> tuple[Scale, dict[int, Array], set[int]]:
    """One scale for all components of a target, every contribution's B at that scale, and the sources that rounded.

    Raises ``RefusedError`` where there is no scale at which all numbers stay in the range of their dtype.
    """
    refused: RefusedError | None = None
    for scale in _common_scales(contributions, part):
        try:
            scale.at_rank(rank)
            scaled: dict[int, Array] = {}
            lossy = set()
            for contribution in contributions:
                ratio = contribution.scale.ratio_to(scale)
                scaled[id(contribution)], same = rescale(contribution.b, ratio)
                if not same:
                    lossy.add(contribution.source)
        except RefusedError as error:
            refused = refused or error
            continue
        return scale, scaled, lossy
    assert refused is not None
    raise RefusedError(replace(finding, key=key) for finding in refused.findings) from refused


def _common_scales(contributions: list[_Contribution], part: Part | None) -> Iterator[Scale]:
    """Scales to try: the recorded one, those of the most components first, then one in between.

    So as few components as possible are rescaled. A scale of zero is tried only where there is no other: nothing
    could be folded back from it.
    """
    if part is not None and (part.scale.alpha or not any(c.scale.alpha for c in contributions)):
        yield part.scale
    if len(contributions) == 1:
        yield contributions[0].scale
    else:
        counts: Counter[Fraction] = Counter()
        first: dict[Fraction, Scale] = {}
        for c in [c for c in contributions if c.scale.alpha] or contributions:
            counts[c.scale.exact] += c.a.shape[0]
            first.setdefault(c.scale.exact, c.scale)
        for exact, _ in counts.most_common():
            yield first[exact]
    between = _scale_between(contributions)
    if between is not None:
        yield between


def _scale_between(contributions: list[_Contribution]) -> Scale | None:
    """A power of two as the scale at which every contribution's B has normal numbers in float32; if there is one."""
    lowest, highest = -125.0, 126.0
    like = contributions[0].scale
    for c in contributions:
        sizes = np.abs(c.b[c.b != 0].astype(np.float64))
        sizes = sizes[np.isfinite(sizes)]
        if c.scale.alpha and len(sizes):
            value = _log2(Fraction(c.scale.alpha)) - log2(c.scale.divisor)
            lowest = max(lowest, value + log2(sizes.max()) - 127)
            highest = min(highest, value + log2(sizes.min()) + 126)
    if lowest > highest:
        return None
    exponent = round((lowest + highest) / 2)
    return Scale(like.rank, like.divisor * 2.0**exponent, like.rslora)


def _log2(value: Fraction) -> float:
    return log2(abs(value.numerator)) - log2(value.denominator)


def _check_mixing(stack: _Stack, out_size: int, in_size: int, key: str) -> None:
    """Refuse NaN and infinity that would spread over numbers of the target that the source leaves finite.

    A component adds its column of B times its row of A. Zeros fill both where its block does not reach, and zero
    times NaN is NaN.
    """
    rows: dict[int, set[int]] = defaultdict(set)
    columns: dict[int, set[int]] = defaultdict(set)
    for c, places in stack.placed:
        if is_finite(c.a) and is_finite(c.b):
            continue
        for number, place in enumerate(places):
            if not np.isfinite(c.a[number]).all():
                rows[place].update(c.block.rows_to[c.at].tolist())
            if not np.isfinite(c.b[:, number]).all():
                columns[place].update(c.block.columns_to[c.at].tolist())
    if any(len(found) < out_size for found in rows.values()) or any(
        len(found) < in_size for found in columns.values()
    ):
        raise RefusedError(not_finite(key))


def not_finite(key: str | None = None) -> Finding:
    """Why factors that hold NaN or infinities are not joined with others."""
    return Finding(
        "not-finite",
        "one of the tensors that become this one holds NaN or infinite values, and they would spread to the others",
        key=key,
        fix="take the damaged module out of the adapter, or restore it from another checkpoint of the training",
    )


def _stack(contributions: list[_Contribution]) -> _Stack:
    """Give every component of one matrix its place; equal factors in disjoint blocks share one."""
    stack = _Stack()
    components: list[_Component] = []
    by_a: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    by_b: dict[tuple[int, bytes, Fraction], list[int]] = defaultdict(list)
    regions: dict[bytes, int] = {}
    alone = len(contributions) < 2
    for contribution in contributions:
        rank = contribution.a.shape[0]
        if alone:
            stack.placed.append((contribution, list(range(rank))))
            stack.rank = rank
            continue
        block, at = contribution.block, contribution.at
        rows = regions.setdefault(b"r" + block.rows_to[at].tobytes(), len(regions))
        columns = regions.setdefault(b"c" + block.columns_to[at].tobytes(), len(regions))
        places = []
        for number in range(rank):
            same_a = by_a[columns, contribution.a[number].tobytes()]
            same_b = by_b[rows, contribution.b[:, number].tobytes(), contribution.scale.exact]
            shared = [
                place
                for place in same_a
                if rows not in components[place].rows and len(components[place].columns) == 1
            ] or [
                place
                for place in same_b
                if columns not in components[place].columns and len(components[place].rows) == 1
            ]
            if shared:
                place = shared[0]
                components[place].rows.add(rows)
                components[place].columns.add(columns)
            else:
                place = len(components)
                components.append(_Component({rows}, {columns}))
            same_a.append(place)
            same_b.append(place)
            places.append(place)
        stack.placed.append((contribution, places))
    if not alone:
        stack.rank = len(components)
    return stack


class _Whole(Struct, frozen=True, eq=False):
    """The fast path: experts that stand in keys on one side and are a whole stack on the other."""

    entry: Entry
    blocks: list[Block]
    shape: tuple[int, ...]
    roles: list[str]
    scratch: dict[tuple[tuple[int, int], np.dtype[Any]], Array] = field(default_factory=dict)

    @staticmethod
    def of(entry: Entry, blocks: list[Block], shape: tuple[int, ...], kind: str) -> _Whole | None:
        roles = [KINDS[kind].role(dim) for dim in range(len(shape))]
        if BATCH not in roles:
            return None
        batch = shape[roles.index(BATCH)]
        order = np.arange(batch)
        for block in blocks:
            if block.cross or block.splits or block.source_batch.any() or block.target_slot.any():
                return None
            if not np.array_equal(block.target_batch, order):
                return None
            for index in (block.rows_to, block.columns_to, block.rows_from, block.columns_from):
                if (index != index[0]).any() or (np.diff(index[0]) != 1).any():
                    return None
        return _Whole(entry, blocks, shape, roles)

    def image(self, loop: int, factors: Factors, record: Record, key: str) -> Lora | None:
        """The LoRA of one target; ``None`` where something is uneven and the general path is needed."""
        batch = self.shape[self.roles.index(BATCH)]
        out_size, in_size = self.shape[self.roles.index(OUT)], self.shape[self.roles.index(IN)]
        parts: list[tuple[Block, list[int], list[Array], list[Array]]] = []
        scale: Scale | None = None
        dtypes: set[np.dtype[np.generic]] = set()
        for block in self.blocks:
            flat = self.entry.sources[block.term][loop].reshape(-1)[block.source_slot]
            if (flat < 0).any():
                return None
            ids = flat.tolist()
            a = [factors.a[i] for i in ids]
            b = [factors.b[i] for i in ids]
            scales = [factors.scales[i] for i in ids]
            first = scales[0]
            if scale is None:
                scale = first
            if first.exact != scale.exact or scales.count(first) != len(scales):
                return None
            if len({x.shape for x in a}) > 1 or len({x.shape for x in b}) > 1 or a[0].ndim != 2:
                return None
            dtypes.update(map(_DTYPE, a), map(_DTYPE, b))
            parts.append((block, ids, a, b))
        if scale is None or len(dtypes) > 1:
            return None
        rank = sum(a[0].shape[0] for _, _, a, _ in parts)
        dtype = dtypes.pop()
        whole_in = all(a[0].shape[1] == in_size for _, _, a, _ in parts)
        if whole_in:
            in_order = [x for each in zip(*(a for _, _, a, _ in parts), strict=True) for x in each]
            a_out = np.concatenate(in_order).reshape(batch, rank, in_size)
        else:
            a_out = np.zeros((batch, rank, in_size), dtype)
        packed = (np.empty if len(parts) == 1 else np.zeros)((out_size, rank, batch), dtype)
        at = 0
        spans = []
        for block, _, a, b in parts:
            r = a[0].shape[0]
            columns = slice(int(block.columns_to[0, 0]), int(block.columns_to[0, -1]) + 1)
            rows = slice(int(block.rows_to[0, 0]), int(block.rows_to[0, -1]) + 1)
            if not whole_in:
                a_out[:, at : at + r, columns] = np.concatenate(a).reshape(batch, r, -1)
            stacked = self._gather(b).reshape(batch, -1, r)
            for first in range(0, batch, _TILE):
                some = slice(first, first + _TILE)
                packed[rows, at : at + r, some] = stacked[some].transpose(1, 2, 0)
            spans.append((at, r, columns, rows))
            at += r
        # Zeros beside NaN have an effect, and the whole is looked at in a fraction of the time of its many parts.
        if len(parts) > 1 and not (is_finite(a_out) and is_finite(packed)):
            return None
        if len(parts) > 1 and self._may_share(a_out, packed, spans):
            return None
        for (_, ids, _, _), (start, r, _, _) in zip(parts, spans, strict=True):
            record.note_stack(
                key, factors.headers, ids, range(start, start + r), factors.scales[ids[0]]
            )
        return Lora(a_out, packed.transpose(2, 0, 1), scale.at_rank(rank))

    def _gather(self, arrays: list[Array]) -> Array:
        """The arrays one below the other, in memory that is used again for the next target."""
        shape = (len(arrays) * len(arrays[0]), arrays[0].shape[1])
        kind = (shape, arrays[0].dtype)
        if kind not in self.scratch:
            self.scratch[kind] = np.empty(*kind)
        return np.concatenate(arrays, out=self.scratch[kind])

    @staticmethod
    def _may_share(a: Array, packed: Array, spans: list[tuple[int, int, slice, slice]]) -> bool:
        """Whether two parts could have a component in common, by the first numbers of their factors."""
        for number, (start, r, columns, rows) in enumerate(spans):
            for other, other_r, other_columns, other_rows in spans[:number]:
                mine = a[:, start : start + r, columns.start]
                theirs = a[:, other : other + other_r, other_columns.start]
                if (mine[:, :, None] == theirs[:, None, :]).any():
                    return True
                if rows == other_rows:
                    mine, theirs = (
                        packed[rows.start, start : start + r],
                        packed[rows.start, other : other + other_r],
                    )
                    if (mine[:, None] == theirs[None]).any():
                        return True
        return False
