"""Where every element of some tensors came from, and that as dense boxes.

The elements of the tensors before are looked up among those after, by value. Tensors that share elements belong
together; those of one name but for a number are one array with a further dim. Of two such arrays the coordinates in
the one are sums of functions of those in the other, dim by dim, and each function is taken apart into axes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from regraft.learning.content import Tensor
from regraft.learning.relate import Names, isolated
from regraft.learning.segments import NoOrderError, Piece, pieces_of
from regraft.names.keys import Ints

NOWHERE, UNCLEAR = -1, -2
"""In place of an element's origin: its value is nowhere before, or more than once."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Tensors whose names differ in some numbers only, as one array: those numbers are its first dims."""

    template: str
    numbers: tuple[int, ...]
    """Those of the first tensor."""
    columns: tuple[int, ...]
    """Which of the numbers count the tensors."""
    starts: tuple[int, ...]
    steps: tuple[int, ...]
    names: tuple[str, ...]
    """Row major."""
    shape: tuple[int, ...]
    """The counts, then the dims of each tensor."""

    @property
    def keyed(self) -> int:
        """How many of the dims are in the names."""
        return len(self.columns)


@dataclass(frozen=True, slots=True)
class AxisRun:
    """An axis of a box: its size, and the dim and the step on either side; no dim where a side has it not."""

    size: int
    before: tuple[int, int] | None
    after: tuple[int, int] | None


@dataclass(slots=True)
class Box:
    """A dense block that is in both: where it begins, and its axes."""

    before: int
    """The number of the stack; -1 for padding."""
    after: int
    start_before: tuple[int, ...]
    start_after: tuple[int, ...]
    axes: list[AxisRun]
    value: float | None = None
    """What padding holds."""
    copied: list[int] = field(default_factory=list)
    """Axes along which the elements are the same."""


@dataclass(frozen=True, slots=True)
class Component:
    """Tensors that share elements, and nothing with any others."""

    before: tuple[Stack, ...]
    after: tuple[Stack, ...]
    boxes: tuple[Box, ...]


class NotABoxError(ValueError):
    """An index map that is no layout change, or none that can be written as one equation."""


@dataclass(frozen=True, slots=True)
class Origins:
    """For every tensor after, the origin of each element: a number among all elements before."""

    names: tuple[str, ...]
    starts: Ints
    of: Mapping[str, Ints]

    def tensor(self, origin: Ints) -> Ints:
        """Which tensor before has an element."""
        return np.searchsorted(self.starts, origin, side="right") - 1


def find_origins(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Origins:
    """Look every element after up among those before; both have unsigned integers of one size."""
    names = tuple(name for name, t in before.items() if t.whole)
    sizes = [before[name].size for name in names]
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])[:-1].astype(np.int64)
    flat: npt.NDArray[Any] = (
        np.concatenate([before[name].bits.reshape(-1) for name in names])
        if names
        else np.zeros(0, np.uint32)
    )
    order = np.argsort(flat, kind="stable")
    values = flat[order]
    unique = np.ones(len(values), dtype=bool)
    if len(values) > 1:
        same = values[1:] == values[:-1]
        unique[1:] &= ~same
        unique[:-1] &= ~same
    found: dict[str, Ints] = {}
    for name, tensor in after.items():
        if not tensor.whole or not len(values):
            found[name] = np.full(tensor.shape, NOWHERE, dtype=np.int64)
            continue
        bits = tensor.bits.reshape(-1)
        at = np.minimum(np.searchsorted(values, bits), len(values) - 1)
        hit = values[at] == bits
        origin = np.where(hit, np.where(unique[at], order[at], UNCLEAR), NOWHERE)
        found[name] = _cleared(origin.reshape(tensor.shape).astype(np.int64), tensor.bits, flat)
    return Origins(names, starts, found)


_TRIES = 24
_SHARE = 0.2
"""The share of values that may be in several places: what is around them tells which it is."""


def _cleared(origin: Ints, bits: npt.NDArray[Any], flat: npt.NDArray[Any]) -> Ints:
    """Origins of values that are in several places, told by those around them.

    In a layout change the origin is a sum of functions of the dims, so three corners of a rectangle tell the fourth.
    """
    count = int(np.count_nonzero(origin == UNCLEAR))
    if not count or count > _SHARE * origin.size or origin.ndim == 0:
        return origin
    unclear = np.argwhere(origin == UNCLEAR)
    random = np.random.default_rng(len(flat))
    result = origin.copy()
    for index in unclear:
        for _ in range(_TRIES):
            dim = int(random.integers(origin.ndim))
            other, far = index.copy(), np.array([random.integers(n) for n in origin.shape])
            other[dim] = far[dim]
            corner = far.copy()
            corner[dim] = index[dim]
            if origin.ndim == 1:
                # A vector has no rectangles: the step from one position to the next is the same nearby.
                step = 1 if index[0] + 2 < origin.shape[0] else -1
                other, corner, far = index + step, index + step, index + 2 * step
                if not 0 <= far[0] < origin.shape[0]:
                    break
            three = [int(result[tuple(i)]) for i in (other, corner, far)]
            if min(three) < 0:
                continue
            guess = three[0] + three[1] - three[2]
            if 0 <= guess < len(flat) and flat[guess] == bits[tuple(index)]:
                result[tuple(index)] = guess
                break
            if origin.ndim == 1:
                break
    return result


Family = tuple[list[str], list[str]]
"""Names before and after that share elements."""


def families(origins: Origins) -> Iterator[Family]:
    """The names before and after that share elements."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for name, origin in origins.of.items():
        known = origin[origin >= 0]
        for number in np.flatnonzero(np.bincount(origins.tensor(known))).tolist():
            parent[root("<" + origins.names[number])] = root(">" + name)
    groups: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for name in list(parent):
        groups[root(name)][name[0] == ">"].append(name[1:])
    yield from groups.values()


def stacks_of(
    members: Sequence[str], shapes: Mapping[str, tuple[int, ...]], names: Names
) -> list[Stack]:
    """Tensors of one component as few arrays."""
    groups: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[str]] = defaultdict(list)
    result: list[Stack] = []
    by_template: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name in members:
        by_template[names[name][0], shapes[name]].append(name)
    for (template, shape), same in by_template.items():
        rows = [names[name][1] for name in same]
        fixed = [
            column
            for column, alone in enumerate(isolated(template))
            if not alone and not _counts(sorted({row[column] for row in rows}))
        ]
        for name, row in zip(same, rows, strict=True):
            groups[template, shape, tuple(row[c] for c in fixed)].append(name)
    for (template, shape, _), same in groups.items():
        table = sorted((names[name][1], name) for name in same)
        stack = _stack(template, shape, table)
        if stack is not None:
            result.append(stack)
        else:
            result += [_alone(template, shape, numbers, name) for numbers, name in table]
    return sorted(result, key=lambda s: s.names[0])


def together(
    known: Sequence[Family],
    shapes: tuple[Mapping[str, tuple[int, ...]], Mapping[str, tuple[int, ...]]],
    names: Names,
) -> Iterator[list[Family]]:
    """Families whose tensors are numbered on: those of one begin where another one ends, or lie in its gaps.

    Where one begins is no number of the rule then: it is as many as the other has.
    """
    parent = list(range(len(known)))

    def root(number: int) -> int:
        while parent[number] != number:
            number = parent[number]
        return number

    for side in (0, 1):
        owners = {name: number for number, family in enumerate(known) for name in family[side]}
        by_look: dict[object, list[str]] = defaultdict(list)
        for name in owners:
            by_look[names[name][0], shapes[side][name]].append(name)
        looked_at: set[object] = set()
        for number, family in enumerate(known):
            for stack in stacks_of(family[side], shapes[side], names):
                late = {
                    column
                    for column, start, step in zip(
                        stack.columns, stack.starts, stack.steps, strict=True
                    )
                    if start or step > 1
                }
                if not late:
                    continue
                fixed = [c for c in range(len(stack.numbers)) if c not in stack.columns]
                shape = stack.shape[stack.keyed :]
                look = stack.template, shape, *((c, stack.numbers[c]) for c in fixed)
                if look in looked_at:
                    continue
                looked_at.add(look)
                same = [
                    name
                    for name in by_look[stack.template, shape]
                    if all(names[name][1][c] == stack.numbers[c] for c in fixed)
                ]
                (whole, *more) = stacks_of(same, shapes[side], names)
                if more or any(whole.starts) or any(step > 1 for step in whole.steps):
                    continue
                for name in same:
                    parent[root(owners[name])] = root(number)
    groups: dict[int, list[Family]] = defaultdict(list)
    for number, family in enumerate(known):
        groups[root(number)].append(family)
    yield from groups.values()


def _counts(values: Sequence[int]) -> bool:
    """Whether numbers inside a segment look like an index: 0, 1, 2 and so on."""
    return len(values) > 2 and list(values) == list(range(len(values)))


def _stack(
    template: str, shape: tuple[int, ...], table: Sequence[tuple[tuple[int, ...], str]]
) -> Stack | None:
    numbers = [row for row, _ in table]
    columns, starts, steps, counts = [], [], [], []
    for column, values in enumerate(map(sorted, map(set, zip(*numbers, strict=True)))):
        if len(values) == 1:
            continue
        step = values[1] - values[0]
        if values != list(range(values[0], values[0] + step * len(values), step)):
            return None
        columns.append(column)
        starts.append(values[0])
        steps.append(step)
        counts.append(len(values))
    if prod(counts) != len(table):
        return None
    return Stack(
        template,
        numbers[0],
        tuple(columns),
        tuple(starts),
        tuple(steps),
        tuple(name for _, name in table),
        (*counts, *shape),
    )


def _alone(template: str, shape: tuple[int, ...], numbers: tuple[int, ...], name: str) -> Stack:
    return Stack(template, numbers, (), (), (), (name,), shape)


def decompose(
    before: Sequence[Stack],
    after: Sequence[Stack],
    origins: Origins,
    tensors: Mapping[str, Tensor],
) -> Component:
    """The boxes of a component; ``tensors`` are those after.

    Raises ``NotABoxError``.
    """
    number_of = {name: number for number, name in enumerate(origins.names)}
    owner = np.full(len(origins.names) + 1, -1, dtype=np.int64)
    offset = np.zeros(len(origins.names) + 1, dtype=np.int64)
    for number, stack in enumerate(before):
        size = prod(stack.shape[stack.keyed :])
        for slot, name in enumerate(stack.names):
            owner[number_of[name]] = number
            offset[number_of[name]] = slot * size
    boxes: list[Box] = []
    for number, stack in enumerate(after):
        origin = np.stack([origins.of[name] for name in stack.names]).reshape(stack.shape)
        if (origin == UNCLEAR).any():
            raise NotABoxError("some of its values are in more than one place before")
        tensor = origins.tensor(origin)
        whose = np.where(origin >= 0, owner[tensor], -1)
        flat = np.where(origin >= 0, origin - origins.starts[tensor] + offset[tensor], 0)
        for source in (np.flatnonzero(np.bincount(whose.reshape(-1) + 1)) - 1).tolist():
            mask = whose == source
            if source < 0:
                values = np.stack([tensors[name].bits for name in stack.names]).reshape(stack.shape)
                boxes += _padding(mask, values, number, tensors[stack.names[0]])
            else:
                boxes += _boxes(mask, flat, source, number, before[source].shape)
    return Component(tuple(before), tuple(after), tuple(boxes))


def _product_set(mask: npt.NDArray[np.bool_]) -> list[Ints]:
    """The indices in each dim whose product a mask is."""
    dims = range(mask.ndim)
    sides = [np.flatnonzero(mask.any(axis=tuple(d for d in dims if d != dim))) for dim in dims]
    if prod(map(len, sides)) != int(mask.sum()):
        raise NotABoxError("what comes from one tensor is no block")
    return sides


def _padding(
    mask: npt.NDArray[np.bool_], values: npt.NDArray[Any], after: int, like: Tensor
) -> Iterator[Box]:
    held = values[mask]
    if (held != held[0]).any():
        raise NotABoxError("some of its values are nowhere before")
    sides = _product_set(mask)
    each = [_pieces(side, np.zeros((len(side), 0), dtype=np.int64)) for side in sides]
    for choice in product(*each):
        axes = [
            AxisRun(size, None, (dim, step))
            for dim, piece in enumerate(choice)
            for size, step, _, _ in piece.axes
        ]
        start = tuple(piece.start for piece in choice)
        yield Box(-1, after, (), start, axes, like.value(held[0]))


def _boxes(
    mask: npt.NDArray[np.bool_], flat: Ints, before: int, after: int, shape: tuple[int, ...]
) -> Iterator[Box]:
    sides = _product_set(mask)
    part = flat[np.ix_(*sides)] if sides else flat
    # Flat: of more than 8192 elements numpy 2.4.6 makes something else where the last dims are of size 1.
    places = np.unravel_index(part.reshape(-1), shape) if shape else ()
    coordinates = (
        np.stack([place.reshape(part.shape) for place in places], axis=-1)
        if shape
        else (part[..., None][..., :0])
    )
    yield from _sums(coordinates, sides, before, after)


def _sums(coordinates: Ints, sides: Sequence[Ints], before: int, after: int) -> Iterator[Box]:
    """The boxes of a region; where its map is no sum of functions of the dims, of parts of it where it is."""
    dims = coordinates.ndim - 1
    first = coordinates[(0,) * dims]
    functions = []
    total = np.broadcast_to(first, coordinates.shape).copy()
    for dim in range(dims):
        line = coordinates[tuple(slice(None) if d == dim else 0 for d in range(dims))]
        moved = line - first
        functions.append(moved)
        total += moved.reshape(*(len(moved) if d == dim else 1 for d in range(dims)), -1)
    if np.array_equal(total, coordinates):
        yield from _nests(first, functions, sides, before, after)
        return
    ways: list[list[Box]] = []
    for dim, classes in sorted(_alike(coordinates).items(), key=lambda each: len(each[1])):
        if len(classes) <= (min(_PARTS, len(ways[0])) if ways else _PARTS):
            with suppress(NotABoxError):
                ways.append(list(_parts(coordinates, sides, before, after, dim, classes)))
                ways.sort(key=len)
    if not ways:
        raise NotABoxError("its index map has no order that an equation could say")
    yield from ways[0]


def _parts(
    coordinates: Ints,
    sides: Sequence[Ints],
    before: int,
    after: int,
    dim: int,
    classes: Sequence[Ints],
) -> Iterator[Box]:
    """The boxes of a region, for some positions of a dim after the other."""
    for some in classes:
        part = [side[some] if d == dim else side for d, side in enumerate(sides)]
        yield from _sums(np.take(coordinates, some, axis=dim), part, before, after)


_PARTS = 32


def _alike(coordinates: Ints) -> dict[int, list[Ints]]:
    """For dims whose positions differ in it: those from which the other dims lead to other places alike."""
    result: dict[int, list[Ints]] = {}
    for dim in range(coordinates.ndim - 1):
        flat = np.moveaxis(coordinates, dim, 0).reshape(
            coordinates.shape[dim], -1, coordinates.shape[-1]
        )
        groups: dict[bytes, list[int]] = defaultdict(list)
        for position, row in enumerate(flat):
            groups[(row - row[0]).tobytes()].append(position)
        if len(groups) > 1:
            result[dim] = [np.array(same, dtype=np.int64) for same in groups.values()]
    return result


def _nests(
    first: Ints, functions: Sequence[Ints], sides: Sequence[Ints], before: int, after: int
) -> Iterator[Box]:
    each = [_pieces(side, moved) for side, moved in zip(sides, functions, strict=True)]
    for choice in product(*each):
        axes: list[AxisRun] = []
        copied: list[int] = []
        start = first.copy()
        for dim, piece in enumerate(choice):
            start = start + piece.moved
            for size, step, along, by in piece.axes:
                if along < 0:
                    copied.append(len(axes))
                axes.append(AxisRun(size, None if along < 0 else (along, by), (dim, step)))
        yield Box(
            before,
            after,
            tuple(start.tolist()),
            tuple(piece.start for piece in choice),
            axes,
            None,
            copied,
        )


def _pieces(positions: Ints, moved: Ints) -> list[Piece]:
    """A function of the positions in one dim as few pieces, read from here or from there.

    Pieces of several that lie in turn here, each with a step of its own there, follow each other there.
    """
    here = _cut(positions, moved)
    if here is not None and len(here) <= 2:
        return here
    there: list[Piece] | None = None
    dims = np.flatnonzero(moved.any(axis=0)).tolist()
    dim = dims[0] if len(dims) == 1 else -1
    if dim >= 0:
        order = np.argsort(moved[:, dim], kind="stable")
        line = moved[order, dim]
        there = _cut(line, positions[order, None]) if (np.diff(line) > 0).all() else None
    if there is None or (here is not None and len(there) >= len(here)):
        if here is None:
            raise NotABoxError("its index map has no order that an equation could say")
        return here
    place = np.eye(moved.shape[1], dtype=np.int64)[dim]
    return [
        Piece(
            int(piece.moved[0]),
            piece.start * place,
            tuple((size, by, dim, step) for size, step, _, by in piece.axes),
        )
        for piece in there
    ]


def _cut(positions: Ints, moved: Ints) -> list[Piece] | None:
    try:
        return pieces_of(positions, moved)
    except NoOrderError:
        return None
