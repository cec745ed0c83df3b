"""Two plans, one after the other, as one plan: the layout between them is never made.

    a -> b    o i == (h d) i         split into heads
    b -> c    (h d) i == i (h d)     transposed
    a -> c    every element moves once, from a's tensors to c's

An element of a tensor in the middle has one index for each dim, and each axis of a copy stands in one dim (or in the
key). So what becomes of an element falls apart, dim by dim: for each index of a dim, where the first plan takes it
from, and where the second puts it. Such a table is made of few loops, and the loops of all dims are a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any

import numpy as np
from msgspec import Struct

from regraft.equation.lower import Copy, CopyAxis, Padding, Place, flat_shapes
from regraft.equation.notation import Axis, Equation, Key, Term
from regraft.errors import Finding, RefusedError
from regraft.layouts.graph import Edge
from regraft.names.keys import Group, Ints, group_names
from regraft.planning.build import build_plan
from regraft.planning.plan import Carried, Dropped, Entry, Headers, Plan, entry_of, walk
from regraft.planning.slices import as_copy, without_rest
from regraft.rules.book import Rule
from regraft.rules.direction import Direction
from regraft.values import replace

_NONE = np.zeros((1, 0), dtype=np.int64)


def plan_along(headers: Headers, steps: Sequence[Sequence[Edge]], **options: Any) -> Plan:
    """The plan of whole tensors along a route, step by step and composed; ``options`` are those of `build_plan`.

    Raises what `build_plan` and `compose` raise.
    """
    plan = build_plan(headers, steps[0], **options)
    for edges in steps[1:]:
        middle = middle_of(plan)
        plan = compose(plan, middle, build_plan(middle.headers, edges, **options))
    return plan


class _Made(Struct, frozen=True):
    """A tensor in the middle that an entry of the first plan makes: which term, loop value, and slot of its key."""

    entry: Entry
    term: int
    loop: int
    slot: int


_Origin = int | _Made
"""Where a tensor in the middle comes from: the source that it is as it stands, or what makes it."""


class Middle(Struct, frozen=True):
    """What the first plan makes, for the second one to read."""

    headers: Headers
    origins: tuple[_Origin, ...]


def middle_of(plan: Plan) -> Middle:
    """The headers of a plan's result, and where each of its tensors comes from."""
    names: list[str] = []
    shapes: list[tuple[int, ...]] = []
    origins: list[_Origin] = []
    for entry in plan.entries:
        for number, term in enumerate(entry.written):
            keys = entry.keys(term).names()
            names += keys
            shapes += [entry.shape(term)] * len(keys)
            if entry.renames:
                origins += entry.sources[0].reshape(-1).tolist()
                continue
            each = len(keys) // len(entry)
            origins += (_Made(entry, number, i // each, i % each) for i in range(len(keys)))
    for carried in plan.carried:
        ids = carried.group.ids.tolist()
        names += carried.group.names()
        shapes += [tuple(plan.headers.shapes[i]) for i in ids]
        origins += ids
    dtypes = [plan.headers.dtypes[_first(origin)] for origin in origins]
    return Middle(Headers(group_names(names), shapes, dtypes), tuple(origins))


def compose(first: Plan, middle: Middle, second: Plan) -> Plan:
    """The plan that does what ``first`` does and then ``second``, which was made from ``middle``.

    What the first plan demands of what it reads is kept.

    Raises ``RefusedError`` where the second one demands something of a tensor that the first one makes: padding to cut
    off, or copies that must be equal.
    """
    origins, of = middle.origins, first.headers.shapes
    whole = np.array([o if isinstance(o, int) else -1 for o in origins], dtype=np.int64)
    entries: list[Entry] = []
    carried: list[Carried] = []
    for entry in second.entries:
        if all((whole[ids] >= 0).all() for ids in entry.sources):
            entries.append(replace(entry, sources=tuple(whole[ids] for ids in entry.sources)))
        else:
            entries += (_composed(entry, loop, middle, of) for loop in range(len(entry)))
    for item in second.carried:
        stays = whole[item.group.ids] >= 0
        if stays.any():
            part = item.group.take(stays)
            carried.append(Carried(replace_ids(part, whole[part.ids]), item.carry))
        for number in item.group.ids[~stays].tolist():
            origin = origins[number]
            assert isinstance(origin, _Made)
            entries.append(_alone(origin, middle.headers.name(number), of))
    dropped = [
        Dropped(replace_ids(d.group.take(kept), whole[d.group.ids[kept]]), d.drop)
        for d in second.dropped
        if (kept := whole[d.group.ids] >= 0).any()
    ]
    return Plan(
        (*first.edges, *second.edges),
        first.headers,
        tuple(entries),
        tuple(carried),
        (*first.dropped, *dropped),
        (
            *first.demands,
            *(e for e in first.entries if e.repeats or e.paddings(written=False) or e.cut),
        ),
    )


def replace_ids(group: Group, ids: Ints) -> Group:
    """A group with other ids."""
    return Group(group.template, ids, group.numbers)


def _first(origin: _Origin) -> int:
    if isinstance(origin, int):
        return origin
    return int(origin.entry.sources[0][origin.loop].reshape(-1)[0])


class _Block(Struct, frozen=True):
    """Elements of one tensor that go to one place of another, dim by dim of the first."""

    other: int
    """The tensor at the other end: an id, or the number of a target."""
    start: tuple[int, ...]
    other_start: tuple[int, ...]
    axes: tuple[tuple[int, int, int, int, int], ...]
    """Size, dim and step, and dim and step at the other end."""


def _blocks(
    entry: Entry, copy: Copy, loop: int, slot: int, *, from_source: bool
) -> Iterator[_Block]:
    """What a copy does to one of its tensors, a source of it or a target."""
    copy = without_rest(copy, entry.rest)
    keyed = [axis for axis in copy.axes if axis.source.in_key or axis.target.in_key]
    flat = replace(copy, axes=tuple(axis for axis in copy.axes if axis not in keyed))
    ends = [_stand(entry, copy, keyed, target=target) for target in (False, True)]
    starts = [copy.source_start, copy.target_start]
    here, there = (ends[0], ends[1]) if from_source else (ends[1], ends[0])
    start, other_start = starts if from_source else starts[::-1]
    axes = []
    for axis in flat.axes:
        one, other = (axis.source, axis.target) if from_source else (axis.target, axis.source)
        axes.append((axis.size, one.index, one.step, other.index, other.step))
    for point in np.flatnonzero(here[0] == slot).tolist():
        number = int(there[0][point])
        if not from_source:
            number = int(entry.sources[copy.source][loop].reshape(-1)[number])
        yield _Block(
            number,
            tuple(s + int(d) for s, d in zip(start, here[1][:, point], strict=True)),
            tuple(s + int(d) for s, d in zip(other_start, there[1][:, point], strict=True)),
            tuple(axes),
        )


def _stand(
    entry: Entry, copy: Copy, keyed: Sequence[CopyAxis], *, target: bool
) -> tuple[Ints, Ints]:
    slots, dims = walk(entry, copy, keyed, entry.written if target else entry.read, target=target)
    starts = copy.target_start if target else copy.source_start
    full = np.zeros((len(starts), len(slots)), dtype=np.int64)
    full[: len(dims)] = dims
    return slots, full


def _composed(entry: Entry, loop: int, middle: Middle, of: Sequence[tuple[int, ...]]) -> Entry:
    """One loop value of an entry of the second plan, read from the first plan's sources."""
    _check_undemanding(entry)
    origins = middle.origins
    padded: list[Padding] = []
    sources: dict[int, int] = {}
    copies: list[Copy] = []
    names: list[str] = []
    shapes: list[tuple[int, ...]] = []
    first: list[int] = []
    for term in entry.written:
        keys = entry.keys(term).names()
        each = len(keys) // len(entry)
        first.append(len(names))
        names += keys[loop * each : (loop + 1) * each]
        shapes += [entry.shape(term)] * each
    for copy in entry.copies:
        ids = entry.sources[copy.source][loop].reshape(-1)
        for slot, number in enumerate(ids.tolist()):
            into = list(_blocks(entry, copy, loop, slot, from_source=True))
            into = [replace(block, other=block.other + first[copy.target]) for block in into]
            dims = len(middle.headers.shapes[number])
            for block in _out_of(origins[number], middle.headers.shapes[number]):
                for target in into:
                    at = sources.setdefault(block.other, len(sources))
                    copies += _join(block, target, at, dims)
            for value, block in _padding_of(origins[number]):
                for target in into:
                    padded += (_padding(copy, value) for copy in _join(block, target, 0, dims))
    for padding in entry.paddings(written=True):
        padded += _own_padding(entry, padding, first[padding.term])
    made = [o for ids in entry.sources for i in ids[loop].reshape(-1).tolist() if (o := origins[i])]
    rules = dict.fromkeys(o.entry.rule.name for o in made if isinstance(o, _Made))
    name = ", then ".join([*rules, entry.rule.name])
    made_of = [of[i] for i in sources]
    return _literal(entry, name, list(sources), names, shapes, copies, made_of, padded)


def _out_of(origin: _Origin, shape: Sequence[int]) -> Iterator[_Block]:
    """The blocks that a tensor in the middle is made of."""
    if isinstance(origin, int):
        none = (0,) * len(shape)
        yield _Block(origin, none, none, tuple((n, d, 1, d, 1) for d, n in enumerate(shape)))
        return
    for copy in origin.entry.copies:
        if copy.target == origin.term:
            yield from _blocks(origin.entry, copy, origin.loop, origin.slot, from_source=False)


def _padding_of(origin: _Origin) -> Iterator[tuple[float, _Block]]:
    """The padding of a tensor in the middle: values, and blocks that come from nowhere."""
    if isinstance(origin, int):
        return
    for padding in origin.entry.paddings(written=True):
        if padding.term != origin.term:
            continue
        copy = as_copy(origin.entry, padding)
        for block in _blocks(origin.entry, copy, origin.loop, origin.slot, from_source=False):
            yield padding.value, block


def _padding(copy: Copy, value: float) -> Padding:
    """Where a copy writes, as padding."""
    axes = tuple((axis.size, axis.target) for axis in copy.axes)
    return Padding(copy.target, axes, copy.target_start, (), value)


def _own_padding(entry: Entry, padding: Padding, first: int) -> Iterator[Padding]:
    """The padding of one entry as that of single tensors, whose terms begin at a number."""
    copy = as_copy(entry, padding)
    for slot in range(prod(entry.stack(entry.written[padding.term]))):
        for block in _blocks(entry, copy, 0, slot, from_source=False):
            axes = tuple(
                (size, Place(in_key=False, index=dim, step=step))
                for size, dim, step, _, _ in block.axes
            )
            yield Padding(first + slot, axes, block.start, (), padding.value)


def _check_undemanding(entry: Entry) -> None:
    if entry.repeats or entry.paddings(written=False):
        raise RefusedError(
            Finding(
                "no-image",
                "it cuts off padding, or needs equal copies, in the middle of a way over several layouts",
                rule=str(entry.rule),
                fix="convert step by step, from layout to layout",
            )
        )


def _join(one: _Block, other: _Block, source: int, dims: int) -> Iterator[Copy]:
    """The copies of what two blocks of one tensor have in common."""
    tables = []
    for dim in range(dims):
        ends = [
            (tuple(axis for axis in block.axes if axis[1] == dim), block.start[dim])
            for block in (one, other)
        ]
        found = _common(*ends[0], *ends[1])
        if not found:
            return
        tables.append(found)
    for choice in product(*tables):
        start, goal = list(one.other_start), list(other.other_start)
        axes: list[CopyAxis] = []
        for (there, here), loops in choice:
            for d, by in there:
                start[d] += by
            for d, by in here:
                goal[d] += by
            for size, (a, step), (b, stride) in loops:
                name = f"a{len(axes)}"
                axes.append(
                    CopyAxis(
                        name,
                        size,
                        Place(in_key=False, index=a, step=step),
                        Place(in_key=False, index=b, step=stride),
                    )
                )
        yield Copy(source, other.other, tuple(axes), tuple(start), tuple(goal), (), ())


_Offset = tuple[tuple[int, int], ...]
"""How far each dim at the other end moves: dims and distances."""
_Loop = tuple[int, tuple[int, int], tuple[int, int]]
"""Size, and the dim and the step at either end."""


_Axes = tuple[tuple[int, int, int, int, int], ...]
_Row = tuple[_Offset, _Offset]


@lru_cache(maxsize=4096)
def _common(
    one: _Axes, start: int, other: _Axes, other_start: int
) -> tuple[tuple[_Row, tuple[_Loop, ...]], ...]:
    """The indices of a dim that are in two blocks, as loops."""
    from_here, to_there = _positions(one, start), _positions(other, other_start)
    rows = [(from_here[index], to_there[index]) for index in from_here if index in to_there]
    return tuple(_loops(rows))


def _positions(axes: _Axes, start: int) -> dict[int, _Offset]:
    """For each index of a dim that is in a block, where it stands at the other end."""
    found: dict[int, _Offset] = {}
    for point in product(*(range(size) for size, *_ in axes)):
        index = start + sum(i * a[2] for i, a in zip(point, axes, strict=True))
        moved: dict[int, int] = {}
        for i, axis in zip(point, axes, strict=True):
            moved[axis[3]] = moved.get(axis[3], 0) + i * axis[4]
        found[index] = tuple(sorted(moved.items()))
    return dict(sorted(found.items()))


def _loops(
    rows: Sequence[tuple[_Offset, _Offset]],
) -> Iterator[tuple[tuple[_Offset, _Offset], tuple[_Loop, ...]]]:
    """Rows of a table as loops: where each begins, and its sizes and steps."""
    items: list[tuple[tuple[_Offset, _Offset], tuple[_Loop, ...]]] = [(row, ()) for row in rows]
    while True:
        merged: list[tuple[tuple[_Offset, _Offset], tuple[_Loop, ...]]] = []
        at = 0
        while at < len(items):
            row, loops = items[at]
            end, step = at + 1, None
            while end < len(items) and items[end][1] == loops:
                found = _step(items[end - 1][0], items[end][0])
                if found is None or (step is not None and found != step):
                    break
                step, end = found, end + 1
            merged.append((row, loops if step is None else (*loops, (end - at, *step))))
            at = end
        if len(merged) == len(items):
            yield from items
            return
        items = merged


def _step(
    one: tuple[_Offset, _Offset], other: tuple[_Offset, _Offset]
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The step from a row to the next, where it moves one dim at either end."""
    steps = []
    for before, after in zip(one, other, strict=True):
        was, now = dict(before), dict(after)
        moved = [(d, by) for d in now if (by := now[d] - was.get(d, 0))]
        if len(moved) != 1 or moved[0][1] < 0:
            return None
        steps.append(moved[0])
    return steps[0], steps[1]


def _alone(origin: _Made, name: str, of: Sequence[tuple[int, ...]]) -> Entry:
    """A tensor in the middle that stays what it is."""
    entry = origin.entry
    shape = entry.shape(entry.written[origin.term])
    none = (0,) * len(shape)
    whole = _Block(0, none, none, tuple((n, d, 1, d, 1) for d, n in enumerate(shape)))
    sources: dict[int, int] = {}
    copies: list[Copy] = []
    for block in _out_of(origin, shape):
        at = sources.setdefault(block.other, len(sources))
        copies += _join(block, whole, at, len(shape))
    padded = [
        _padding(copy, value)
        for value, block in _padding_of(origin)
        for copy in _join(block, whole, 0, len(shape))
    ]
    made_of = [of[i] for i in sources]
    return _literal(entry, entry.rule.name, list(sources), [name], [shape], copies, made_of, padded)


def _literal(
    like: Entry,
    name: str,
    sources: Sequence[int],
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    copies: Sequence[Copy],
    of_sources: Sequence[tuple[int, ...]],
    padded: Sequence[Padding],
) -> Entry:
    """An entry whose terms are single tensors by name."""
    sizes: dict[str, int] = {}

    def term(letter: str, number: int, key: str, shape: Sequence[int]) -> Term:
        axes = tuple(f"{letter}{number}_{dim}" for dim in range(len(shape)))
        sizes.update(zip(axes, shape, strict=True))
        return Term(Key((key,)), tuple(map(Axis, axes)), 0)

    read = tuple(term("s", i, f"source {i}", shape) for i, shape in enumerate(of_sources))
    written = tuple(
        term("t", i, key, shape) for i, (key, shape) in enumerate(zip(names, shapes, strict=True))
    )
    rule = Rule(
        name,
        Equation(f"{name}: over several layouts", read, written, ()),
        ("any",) * len(read),
        ("any",) * len(written),
        like.rule.book,
        like.rule.where,
    )
    ids = tuple(np.array([number], dtype=np.int64) for number in sources)
    way = rule.ways[Direction.FORWARD]
    here = flat_shapes((*read, *written), sizes)
    return entry_of(way, (), _NONE, sizes, here, (), ids, tuple(copies), tuple(padded))
