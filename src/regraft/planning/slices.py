"""Which elements of which sources a slice of a target is made of: what one rank of many has to read.

The slices reader of a plan. A dim of a target is a number with mixed radix whose digits are the axes of a copy, so a
range of it falls apart into a few boxes of axes: one that is whole in the middle, and at most two rests for each
digit. Nothing here knows of files, processes or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import numpy as np
from msgspec import Struct

from regraft.equation.lower import Copy, CopyAxis, Padding, Place, strides_of
from regraft.equation.notation import REST
from regraft.names.keys import Ints
from regraft.planning.plan import Entry, Plan
from regraft.planning.rows import index_grid
from regraft.storage.dtypes import DTYPES
from regraft.values import replace

Box = tuple[tuple[int, int], ...]
"""A range of indices for each dim: from, and up to but without."""
Region = tuple[tuple[tuple[int, int], ...], ...]
"""Ranges of indices for each dim, side by side in the slice: a rank's part of a fused tensor has one of each half."""


def shape_of_region(region: Region) -> tuple[int, ...]:
    """The shape of a slice.

    >>> shape_of_region((((0, 2), (4, 6)), ((0, 3),)))
    (4, 3)
    """
    return tuple(sum(high - low for low, high in ranges) for ranges in region)


def region_of(box: Box) -> Region:
    """A box as a region."""
    return tuple((span,) for span in box)


def _boxes_of(region: Region) -> Iterator[tuple[Box, tuple[int, ...]]]:
    """The boxes of a region, and where each of them begins in the slice."""
    dims = []
    for ranges in region:
        at, spans = 0, []
        for low, high in ranges:
            if low < high:
                spans.append(((low, high), at))
            at += high - low
        dims.append(spans)
    for choice in product(*dims):
        yield tuple(span for span, _ in choice), tuple(at for _, at in choice)


class Strips(Struct, frozen=True, eq=False):
    """One loop nest at several places: strided copies out of sources into a slice.

    Sizes, strides and offsets count elements; a slice is row major and holds nothing but its box. Row i copies from
    ``source_at[i]`` of the source with the id ``sources[i]`` to ``target_at[i]``.
    """

    sizes: tuple[int, ...]
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]
    sources: Ints
    source_at: Ints
    target_at: Ints
    bits: bytes = b""
    """The element that padding holds everywhere: then nothing is read, and the sources say nothing."""

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def run(self) -> int:
        """How many elements lie side by side on either side, in each turn of the loops around them."""
        if not self.sizes:
            return 1
        return self.sizes[-1] if self.source_strides[-1] == self.target_strides[-1] == 1 else 1

    def take(self, rows: Ints) -> Strips:
        """Some of the places."""
        return replace(
            self,
            sources=self.sources[rows],
            source_at=self.source_at[rows],
            target_at=self.target_at[rows],
        )

    def with_sources(self, sources: Ints) -> Strips:
        """The same out of other sources, one for each place."""
        return replace(self, sources=sources)

    def moved(self, by: int) -> Strips:
        """The same further on in the slice."""
        return replace(self, target_at=self.target_at + by)

    def runs(self) -> tuple[Ints, Ints, Ints, int]:
        """Every run by itself: sources, where it begins there and in the slice, and how long each of them is."""
        run = self.run
        outer = len(self.sizes) - (run > 1)
        if not outer:
            return self.sources, self.source_at, self.target_at, run
        grid = index_grid(self.sizes[:outer])
        there, here = (
            np.array(strides[:outer], dtype=np.int64) @ grid
            for strides in (self.source_strides, self.target_strides)
        )
        return (
            np.repeat(self.sources, len(there)),
            (self.source_at[:, None] + there).reshape(-1),
            (self.target_at[:, None] + here).reshape(-1),
            run,
        )


class Making(Struct, frozen=True, eq=False):
    """How one target comes about: a term of an entry, at one value of its loops and one slot of its key."""

    entry: Entry
    term: int
    loop: int
    slot: int


class Slicer:
    """Cuts the targets of a plan, one after another.

    What a slice of one layer's tensor needs is worked out once; its siblings in other layers differ in ids alone.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str] | None = None
    ) -> None:
        """``shapes`` and ``dtypes`` are those of the sources, by id; padding other than zeros needs the latter."""
        self._shapes, self._dtypes = shapes, dtypes
        self._made: dict[str, Making | int] = {}
        self._cut: dict[tuple[int, int, int, Region], list[tuple[int, Strips]]] = {}

    @staticmethod
    def of(plan: Plan) -> Slicer:
        """The slicer of everything that a plan makes."""
        slicer = Slicer(plan.headers.shapes, plan.headers.dtypes)
        for entry in plan.entries:
            slicer.add_entry(entry, [entry.keys(term).names() for term in entry.written])
        for carried in plan.carried:
            slicer.add_whole(carried.group.names(), carried.group.ids)
        return slicer

    def add_entry(self, entry: Entry, names: Sequence[Sequence[str]]) -> None:
        """Add what an entry makes; ``names`` are those of each term, loops first, then slots."""
        for term, keys in enumerate(names):
            slots = len(keys) // len(entry)
            for at, name in enumerate(keys):
                self._made[name] = Making(entry, term, at // slots, at % slots)

    def add_whole(self, names: Sequence[str], ids: Ints) -> None:
        """Add targets that are sources as they are."""
        self._made.update(zip(names, ids.tolist(), strict=True))

    @property
    def made(self) -> Mapping[str, Making | int]:
        """Every target, with how it is made; the id of a source that it is as it stands."""
        return self._made

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a whole target."""
        made = self._made[name]
        if isinstance(made, int):
            return tuple(self._shapes[made])
        return made.entry.shape(made.entry.written[made.term])

    def first(self, name: str) -> int:
        """The id of one of a target's sources; all of them are of one type."""
        made = self._made[name]
        if isinstance(made, int):
            return made
        copy = next(c for c in made.entry.copies if c.target == made.term)
        return int(made.entry.sources[copy.source][made.loop].reshape(-1)[0])

    def strips(self, name: str, region: Region | None = None) -> list[Strips]:
        """What fills a region of a target, or all of it: each element of the slice once, and no padding with zeros."""
        if region is None:
            region = region_of(tuple((0, size) for size in self.shape(name)))
        made = self._made[name]
        if isinstance(made, int):
            return cut_whole(made, self.shape(name), region)
        key = (id(made.entry), made.term, made.slot, region)
        if key not in self._cut:
            found = list(cut_entry(made.entry, made.term, made.slot, region))
            self._cut[key] = found + [
                (-1, strips) for strips in self.padding(name, zeros=False, region=region)
            ]
        result = []
        for source, strips in self._cut[key]:
            if source < 0:
                result.append(strips)
                continue
            ids = made.entry.sources[source][made.loop].reshape(-1)[strips.sources]
            result.append(strips.with_sources(ids))
        return result

    def padding(self, name: str, *, zeros: bool, region: Region | None = None) -> list[Strips]:
        """The padding in a region of a target, or in all of it; zeros only where asked for."""
        made = self._made[name]
        if isinstance(made, int):
            return []
        region = region or region_of(tuple((0, size) for size in self.shape(name)))
        return [
            replace(strips, bits=self._bits(value, name))
            for value, strips in cut_padding(made.entry, made.term, made.slot, region)
            if value or zeros
        ]

    def _bits(self, value: float, name: str) -> bytes:
        assert self._dtypes is not None
        dtype = DTYPES[self._dtypes[self.first(name)]].numpy
        return np.array([value]).astype(dtype).tobytes()


def cut_entry(entry: Entry, term: int, slot: int, region: Region) -> Iterator[tuple[int, Strips]]:
    """What fills a region of one target of an entry, as terms that are read and strips of their tensors.

    In place of ids, the strips' sources are slots of the term that is read.
    """
    into = strides_of(shape_of_region(region))
    for copy in entry.copies:
        if copy.target != term:
            continue
        copy = without_rest(copy, entry.rest)
        for box, corner in _boxes_of(region):
            for ranges in _ranges(copy, box):
                strips = _strips(entry, copy, slot, ranges, into)
                if len(strips):
                    start = [at - low for at, (low, _) in zip(corner, box, strict=True)]
                    yield copy.source, strips.moved(_dot(start, into))


def cut_padding(
    entry: Entry, term: int, slot: int, region: Region
) -> Iterator[tuple[float, Strips]]:
    """The padding in a region of one target of an entry: values, and strips without sources."""
    for padding in entry.paddings(written=True):
        if padding.term != term:
            continue
        copy = as_copy(entry, padding)
        into = strides_of(shape_of_region(region))
        for box, corner in _boxes_of(region):
            for ranges in _ranges(copy, box):
                strips = _strips(entry, copy, slot, ranges, into)
                if len(strips):
                    start = [at - low for at, (low, _) in zip(corner, box, strict=True)]
                    same = replace(
                        strips.moved(_dot(start, into)), source_strides=strips.target_strides
                    )
                    yield padding.value, same


def as_copy(entry: Entry, padding: Padding) -> Copy:
    """Padding as a copy that reads one element again and again."""
    written = entry.written[padding.term]
    last = len(padding.start) - 1
    nowhere = Place(in_key=False, index=0, step=0)
    axes: list[CopyAxis] = []
    start = padding.start
    for number, (size, place) in enumerate(padding.axes):
        if written.ends_open and not place.in_key and place.index == last:
            axes += [
                CopyAxis(f"{REST}{n}", rest, nowhere, Place(in_key=False, index=last + n, step=1))
                for n, rest in enumerate(entry.rest)
            ]
            start = (*start[:-1], *(0 for _ in entry.rest))
        else:
            axes.append(CopyAxis(f"p{number}", size, nowhere, place))
    read = entry.read[0]
    none = (0,) * len(entry.shape(read)), (0,) * len(entry.stack(read))
    return Copy(0, padding.term, tuple(axes), none[0], start, none[1], padding.key_start)


def _strips(
    entry: Entry,
    copy: Copy,
    slot: int,
    ranges: Mapping[str, tuple[int, int]],
    into: Sequence[int],
) -> Strips:
    """Some ranges of a copy's axes as strips; offsets in the slice count from the target's beginning."""
    read, written = entry.read[copy.source], entry.written[copy.target]
    out_of = strides_of(entry.shape(read))
    keyed = [axis for axis in copy.axes if axis.source.in_key or axis.target.in_key]
    there, here = _dot(copy.source_start, out_of), _dot(copy.target_start, into)
    loops = []
    for axis in copy.axes:
        if axis in keyed:
            continue
        low, high = ranges[axis.name]
        source = axis.source.step and axis.source.step * out_of[axis.source.index]
        target = axis.target.step * into[axis.target.index]
        there += low * source
        here += low * target
        loops.append((high - low, source, target))
    spans = [ranges.get(axis.name, (0, axis.size)) for axis in keyed]
    grid = index_grid([high - low for low, high in spans])
    grid = grid + np.array([low for low, _ in spans], dtype=np.int64).reshape(-1, 1)
    from_slots, from_at = _stand(
        keyed, grid, copy.source_key_start, entry.stack(read), out_of, there, target=False
    )
    to_slots, to_at = _stand(
        keyed, grid, copy.target_key_start, entry.stack(written), into, here, target=True
    )
    rows = np.flatnonzero(to_slots == slot)
    return Strips(*merge_loops(loops), from_slots[rows], from_at[rows], to_at[rows])


def _stand(
    axes: Sequence[CopyAxis],
    grid: Ints,
    key_start: Sequence[int],
    stack: Sequence[int],
    strides: Sequence[int],
    start: int,
    *,
    target: bool,
) -> tuple[Ints, Ints]:
    """The slot of the key and the offset in the tensor, on one side, at every point of the axes that stand in keys."""
    holes = np.zeros((len(stack), grid.shape[1]), dtype=np.int64)
    holes += np.array(key_start, dtype=np.int64).reshape(-1, 1)
    at = np.full(grid.shape[1], start, dtype=np.int64)
    for row, axis in zip(grid, axes, strict=True):
        place = axis.target if target else axis.source
        if place.in_key:
            holes[place.index] += row * place.step
        elif place.step:
            at += row * (place.step * strides[place.index])
    slots = np.zeros(grid.shape[1], dtype=np.int64)
    for hole, size in zip(holes, stack, strict=True):
        slots = slots * size + hole
    return slots, at


def without_rest(copy: Copy, rest: Sequence[int]) -> Copy:
    """The copy with an axis for each dim that ``...`` stands for, so that a box may cut any of them."""
    if all(axis.name != REST for axis in copy.axes):
        return copy
    axes: list[CopyAxis] = []
    for axis in copy.axes:
        if axis.name != REST:
            axes.append(axis)
            continue
        for number, size in enumerate(rest):
            source, target = (
                Place(in_key=False, index=place.index + number, step=1)
                for place in (axis.source, axis.target)
            )
            axes.append(CopyAxis(f"{REST}{number}", size, source, target))
    more = (0,) * len(rest)
    return Copy(
        copy.source,
        copy.target,
        tuple(axes),
        (*copy.source_start[:-1], *more),
        (*copy.target_start[:-1], *more),
        copy.source_key_start,
        copy.target_key_start,
    )


def _ranges(copy: Copy, box: Box) -> Iterator[dict[str, tuple[int, int]]]:
    """The boxes of a copy's axes that fall into a box of the target, as a range for each axis in a dim of it."""
    dims: list[list[dict[str, tuple[int, int]]]] = []
    for dim, (low, high) in enumerate(box):
        axes = [a for a in copy.axes if not a.target.in_key and a.target.index == dim]
        axes.sort(key=lambda axis: -axis.target.step)
        digits = [(axis.size, axis.target.step) for axis in axes]
        dims.append(
            [
                dict(zip([axis.name for axis in axes], ranges, strict=True))
                for ranges in cut_range(digits, copy.target_start[dim], low, high)
            ]
        )
    for choice in product(*dims):
        yield {name: span for part in choice for name, span in part.items()}


def cut_range(
    digits: Sequence[tuple[int, int]], base: int, low: int, high: int
) -> Iterator[tuple[tuple[int, int], ...]]:
    """The boxes of digits whose numbers, ``base + sum(digit * step)``, lie in a range; each number is in one box.

    ``digits`` are sizes and steps, outermost first. All that the inner ones span is less than an outer one's step.

    >>> list(cut_range([(3, 4), (4, 1)], 0, 2, 9))
    [((1, 2), (0, 4)), ((0, 1), (2, 4)), ((2, 3), (0, 1))]
    """
    if not digits:
        if low <= base < high:
            yield ()
        return
    (size, step), rest = digits[0], digits[1:]
    reach = sum((count - 1) * inner for count, inner in rest)
    touched = range(
        max(0, -((base + reach - low) // step)), min(size, (high - 1 - base) // step + 1)
    )
    inside = range(
        max(touched.start, -((base - low) // step)),
        min(touched.stop, (high - 1 - reach - base) // step + 1),
    )
    if not touched:
        return
    cut: Sequence[int] = touched
    if inside:
        yield ((inside.start, inside.stop), *((0, count) for count, _ in rest))
        cut = [*range(touched.start, inside.start), *range(inside.stop, touched.stop)]
    for value in cut:
        for ranges in cut_range(rest, base + value * step, low, high):
            yield ((value, value + 1), *ranges)


def merge_loops(
    loops: Sequence[tuple[int, int, int]],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Sizes, source strides and target strides of loops, outermost in the target first; loops that agree made one.

    >>> merge_loops([(3, 20, 10), (10, 2, 1), (1, 7, 7)])
    ((30,), (2,), (1,))
    """
    merged: list[tuple[int, int, int]] = []
    for size, source, target in sorted(loops, key=lambda loop: (-loop[2], -loop[1])):
        if size == 1:
            continue
        if merged:
            outer, outer_source, outer_target = merged[-1]
            if outer_source == source * size and outer_target == target * size:
                merged[-1] = (outer * size, source, target)
                continue
        merged.append((size, source, target))
    sizes, sources, targets = zip(*merged, strict=True) if merged else ((), (), ())
    return sizes, sources, targets


def cut_whole(number: int, shape: tuple[int, ...], region: Region | None = None) -> list[Strips]:
    """What fills a region of a source as it stands, or all of it."""
    if region is None:
        region = region_of(tuple((0, size) for size in shape))
    strides, into = strides_of(shape), strides_of(shape_of_region(region))
    one = np.array([number], dtype=np.int64)
    found = []
    for box, corner in _boxes_of(region):
        loops = [
            (high - low, source, target)
            for (low, high), source, target in zip(box, strides, into, strict=True)
        ]
        at = _dot([low for low, _ in box], strides)
        here = _dot(corner, into)
        found.append(Strips(*merge_loops(loops), one, np.full(1, at), np.full(1, here)))
    return found


def _dot(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(a * b for a, b in zip(one, other, strict=True))
