"""The deltas reader: what becomes of LoRA factors when a plan moves their base weights.

In each copy of a plan the batch axes are iterated; every other axis goes out to out and in to in, or crosswise
(`regraft.planning.blocks`). Then a low-rank block ``B A`` lands as ``(P B)(A Q)``, or as ``(P A^T)(B^T Q)``. One rule
for every equation there is.
Ranks add where blocks meet; components that share a factor bit for bit are one; components that a split leaves
without effect are dropped.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import log2
from operator import attrgetter
from typing import Any

import numpy as np
from msgspec import Struct, field

from regraft.adapters.components import Part, Record
from regraft.adapters.form import Array, Factors, Images, Lora, common_dtype, is_finite, rescale
from regraft.adapters.scale import Scale
from regraft.equation.lower import Copy, CopyAxis, Padding
from regraft.errors import Finding, RefusedError
from regraft.names.keys import Ints
from regraft.planning.blocks import Block, Landing, Way, no_image, offsets
from regraft.planning.plan import Entry, walk
from regraft.rules.kinds import BATCH, IN, KINDS, OUT, Kind, lay_out
from regraft.values import replace

_DTYPE = attrgetter("dtype")
_TILE = 32
"""Experts that are turned at a time, so that what is read stays in the cache."""


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
    landed: Sequence[tuple[Landing, Way]],
    factors: Factors,
    sources: Sequence[str],
    record: Record,
    *,
    fast: bool = True,
) -> Iterator[Images]:
    """The LoRA of every tensor that an entry writes, which lands as `landings_of` says.

    ``sources`` are the names of what the factors are of, by their numbers.
    ``record`` says, on a way back, which components were whose, and is told, on a way there, for the next way
    back. ``fast`` allows the path for whole stacks; its results are those of the general path.

    Raises ``RefusedError`` where the equation has no low-rank image.
    """
    if not landed:
        return
    entry = landed[0][0].entry
    rule = str(entry.rule)
    if entry.rule.equation.copies or entry.rule.equation.fills:
        _check_one_sided(entry, factors)
    fast = fast and not record.recorded
    for landing, way in landed:
        keys, kind = landing.keys, landing.kind
        if way == "stays":
            ids = entry.sources[0].reshape(-1).tolist()
            yield Images(keys, "linear", [_as_it_is(number, factors) for number in ids], rule)
            continue
        whole = _Whole(landing) if fast and way == "stacks" else None
        loras: list[Lora | None] = []
        for loop in range(len(entry)):
            for slot in range(landing.slots):
                name = keys.name(loop * landing.slots + slot)
                lora = whole.image(loop, factors, sources, record, name) if whole else None
                loras.append(lora or _image(landing, factors, sources, loop, slot, record, name))
        yield Images(keys, kind, loras, rule)


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
                    raise no_image(
                        entry,
                        f"along {', '.join(entry.rule.equation.copies)} the base has one weight "
                        "several times, and the adapter does not add the same to each",
                    )
    for padding in entry.paddings(written=False):
        term, kind = entry.read[padding.term], entry.read_kinds[padding.term]
        shape = entry.shapes[term]
        steps = lay_out(kind, shape).steps
        cut = {role: _positions(padding, steps[role]) for role in (OUT, IN)}
        for number in entry.sources[padding.term].reshape(-1).tolist():
            if number < 0:
                continue
            a, b = factors.a[number], factors.b[number]
            rows, columns = b[..., cut[OUT], :], a[..., cut[IN]]
            if rows.any() and columns.any():
                raise no_image(entry, "it adds to padding, which the target does not have")


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
    laid = lay_out(entry.read_kinds[number], entry.shapes[entry.read[number]])
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
            role: int(np.dot(laid.steps[role], at))
            + offsets(
                [x for x in inner if _plays(x, other=other, kind=kind, role=role)],
                source=not other,
                steps=laid.steps[role],
            )
            for role in (OUT, IN)
        }
        result.append((a[..., places[IN]], b[..., places[OUT], :], factors.scales[source].exact))
    return result


def _plays(axis: CopyAxis, *, other: bool, kind: Kind, role: str) -> bool:
    place = axis.target if other or not axis.source.step else axis.source
    return kind.role(place.index) == role


def _as_it_is(source: int, factors: Factors) -> Lora | None:
    """The LoRA of a weight that only gets another name: a convolution's, say, whose factors have more dims."""
    if source < 0:
        return None
    return Lora(factors.a[source], factors.b[source], factors.scales[source])


def _image(
    landing: Landing,
    factors: Factors,
    sources: Sequence[str],
    loop: int,
    slot: int,
    record: Record,
    key: str,
) -> Lora | None:
    entry, laid = landing.entry, landing.laid
    batch, out_size, in_size = (laid.sizes[role] for role in (BATCH, OUT, IN))
    given: list[list[_Contribution]] = [[] for _ in range(batch)]
    for block in landing.blocks:
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
                        sources[contribution.source],
                        int(block.source_batch[at]),
                        number,
                        tuple(places),
                        contribution.scale,
                    ),
                )
    b_out = packed.transpose(2, 0, 1)
    if BATCH not in laid.roles:
        a_out, b_out = a_out[0], b_out[0]
    if KINDS[landing.kind].kernel:
        whole = entry.shape(landing.term)
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
    raise RefusedError(
        dataclasses.replace(finding, key=key) for finding in refused.findings
    ) from refused


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
        scale = contribution.scale.exact
        for number in range(rank):
            same_a = by_a[columns, contribution.a[number].tobytes()]
            same_b = by_b[rows, contribution.b[:, number].tobytes(), scale]
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

    landing: Landing
    scratch: dict[tuple[tuple[int, int], np.dtype[Any]], Array] = field(default_factory=dict)

    def image(
        self, loop: int, factors: Factors, sources: Sequence[str], record: Record, key: str
    ) -> Lora | None:
        """The LoRA of one target; ``None`` where something is uneven and the general path is needed."""
        batch, out_size, in_size = (self.landing.laid.sizes[role] for role in (BATCH, OUT, IN))
        parts: list[tuple[Block, list[int], list[Array], list[Array]]] = []
        scale: Scale | None = None
        dtypes: set[np.dtype[np.generic]] = set()
        for block in self.landing.blocks:
            flat = self.landing.entry.sources[block.term][loop].reshape(-1)[block.source_slot]
            if (flat < 0).any():
                return None
            ids = flat.tolist()
            a = [factors.a[i] for i in ids]
            b = [factors.b[i] for i in ids]
            scales = [factors.scales[i] for i in ids]
            first = scales[0]
            if scale is None:
                scale = first
            same = first == scale or first.exact == scale.exact
            if not same or scales.count(first) != len(scales):
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
            keys, places = [sources[i] for i in ids], range(start, start + r)
            record.note_stack(key, keys, places, factors.scales[ids[0]])
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
