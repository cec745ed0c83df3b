"""A plan carried out in slices: its tensors are made when they are asked for, and never held as a whole.

A slice is a plan of its own. Some of an equation's axes get fewer values, the equation is lowered again with these
sizes, and the arrays reader moves what is left. An axis that stands alone in a dim of every tensor may also be
replaced by random combinations of its values: moving and combining commute, so both sides can be compared by a few
vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from math import prod
from typing import Literal

import numpy as np
import numpy.typing as npt

from regraft.arrays.apply import apply_loop
from regraft.equation.lower import Copy, lower
from regraft.equation.notation import REST, Axis, Expr, Product, Sum, Term, axes_of
from regraft.equation.sizes import extent
from regraft.names.keys import Ints
from regraft.planning.plan import Entry, Plan
from regraft.planning.steps import Step, steps_of
from regraft.values import replace

Wide = npt.NDArray[np.float64]
Take = Ints | Wide | None
"""What is taken along a dim: some of its positions, combinations of them (the rows of a matrix), or everything."""

Make = Callable[[int, Sequence[Take]], Wide]
"""Part of the tensor with an id, in the shape that it is stored in."""

HELD = 1 << 19
"""Elements of one slice of the side that is read: 4 MB in float64. A few such arrays are held, and fit the cache."""

VECTORS = 16
"""Random vectors that stand for an axis."""

Want = Literal["entries", "vectors", "nothing"]
"""How tensors are asked for: every entry, random vectors in the place of an axis, or not (any more)."""

Ask = Callable[[Sequence[str]], Want]
"""How the tensors of some keys are wanted. It is asked before every slice; where its answer changes, they end."""


def every_entry(keys: Sequence[str]) -> Want:
    """The answer where no time is short."""
    return "entries"


_Lowered = dict[tuple[int, ...], tuple[tuple[Copy, ...], list[Step]]]
_Windows = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Part of one tensor of a plan's result."""

    key: str
    kind: str
    rule: str
    shape: tuple[int, ...]
    """That of the whole tensor."""
    takes: tuple[Take, ...]
    """Which part it is, dim by dim."""
    values: Wide
    sampled: bool = False
    """Whether random vectors stand for one of its axes."""


def carry_pieces(
    plan: Plan,
    make: Make,
    shape_of: Callable[[int], tuple[int, ...]],
    kind_of: Callable[[int], str],
    ask: Ask = every_entry,
    held: int = HELD,
) -> Iterator[Piece]:
    """The result of a plan, slice by slice; tensors that nothing is read for are left out."""
    for entry in plan.entries:
        keys = [entry.keys(term).names() for term in entry.written]
        slots = [len(names) // len(entry) for names in keys]
        lowered: _Lowered = {}
        for loop in range(len(entry)):
            if all((ids[loop] < 0).all() for ids in entry.sources):
                continue
            here = [names[loop * n : (loop + 1) * n] for names, n in zip(keys, slots, strict=True)]
            slices = partial(_carry_one, plan, entry, loop, here, make, held, lowered)
            yield from _while_wanted([key for names in here for key in names], ask, slices)
    for carried in plan.carried:
        for key, number in zip(carried.group.names(), carried.group.ids.tolist(), strict=True):
            kind = kind_of(number)
            kind = carried.carry.kind if kind == "any" and carried.carry.kind else kind
            why, shape = carried.carry.why, shape_of(number)
            slices = partial(_slices_of, key, kind, why, shape, make, number, held)
            yield from _while_wanted([key], ask, slices)


def same_pieces(
    ids: Mapping[str, int],
    make: Make,
    shape_of: Callable[[int], tuple[int, ...]],
    kind_of: Callable[[int], str],
    ask: Ask = every_entry,
    held: int = HELD,
) -> Iterator[Piece]:
    """Tensors that stay where they are, slice by slice."""
    for key, number in ids.items():
        shape, kind = shape_of(number), kind_of(number)
        slices = partial(_slices_of, key, kind, "unchanged", shape, make, number, held)
        yield from _while_wanted([key], ask, slices)


def _while_wanted(
    keys: Sequence[str], ask: Ask, slices: Callable[..., Iterator[Piece]]
) -> Iterator[Piece]:
    """The slices of some tensors, until they are wanted in another way."""
    want = ask(keys)
    if want == "nothing":
        return
    for piece in slices(sampled=want == "vectors"):
        yield piece
        if ask(keys) != want:
            return


def _slices_of(
    key: str,
    kind: str,
    rule: str,
    shape: tuple[int, ...],
    make: Make,
    number: int,
    held: int,
    *,
    sampled: bool,
) -> Iterator[Piece]:
    """A tensor that stays as it is."""
    for takes in cut(shape, sampled=sampled, held=held):
        combined = any(take is not None and take.dtype.kind == "f" for take in takes)
        yield Piece(key, kind, rule, shape, takes, make(number, takes), combined)


def cut(shape: Sequence[int], *, sampled: bool, held: int = HELD) -> Iterator[tuple[Take, ...]]:
    """The parts of a tensor along its first dim; ``sampled`` puts random vectors in the place of the second.

    >>> [take[0].tolist() for take in cut((3, 4), sampled=False, held=8)]
    [[0, 1], [2]]
    """
    sampled = sampled and len(shape) > 1 and shape[1] > VECTORS
    rest: list[Take] = [None] * (len(shape) - 1)
    if sampled:
        rest[0] = vectors(shape[1])
    row = max(1, prod(shape[2:]) * VECTORS if sampled else prod(shape[1:]))
    step = max(1, held // row)
    for first in range(0, shape[0], step):
        yield (np.arange(first, min(first + step, shape[0])), *rest)


@lru_cache(maxsize=64)
def vectors(size: int) -> Wide:
    """Random vectors as rows; the same for one size, always."""
    return np.random.default_rng(size).standard_normal((VECTORS, size))


def take_part(array: npt.NDArray[np.generic], takes: Sequence[Take]) -> Wide:
    """A part of an array in float64.

    >>> take_part(np.eye(3), (np.array([1]), None)).tolist()
    [[0.0, 1.0, 0.0]]
    """
    for dim, take in enumerate(takes):
        array = take_along(array, take, dim)
    return np.asarray(array, dtype=np.float64)


def take_along(array: npt.NDArray[np.generic], take: Take, dim: int) -> npt.NDArray[np.generic]:
    """What is taken of an array along one dim."""
    if take is None:
        return array
    if take.dtype.kind == "f":
        along = np.moveaxis(array, dim, -1)
        made = multiply(
            along.reshape(-1, along.shape[-1]).astype(np.float64), np.asarray(take, np.float64).T
        )
        return np.moveaxis(made.reshape(*along.shape[:-1], len(take)), -1, dim)
    count = len(take)
    if count and int(take[-1]) - int(take[0]) == count - 1 and (np.diff(take) == 1).all():
        first = int(take[0])
        return array[(slice(None),) * dim + (slice(first, first + count),)]
    return array.take(take.astype(np.int64), axis=dim)


def multiply(one: Wide, other: Wide) -> Wide:
    """The product of matrices, or of stacks of matrices, in parts that BLAS computes without helpers.

    For factors of low rank the helpers of OpenBLAS save nothing, and on a busy machine they are waited for.

    >>> multiply(np.ones((2, 1)), np.ones((1, 3))).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    rank, width, height = one.shape[-1], other.shape[-1], one.shape[-2]
    if not 0 < rank <= _RANK or not width:
        return np.asarray(one @ other)
    made = np.empty((*one.shape[:-1], width))
    columns = min(width, _ALONE // (rank * _ROWS))
    for first in range(0, width, columns):
        part = other[..., first : first + columns]
        result = made[..., first : first + columns]
        rows = _ALONE // (rank * part.shape[-1])
        whole = height // rows * rows
        if whole:
            tiles = (whole // rows, rows)
            np.matmul(
                one[..., :whole, :].reshape(*one.shape[:-2], *tiles, rank),
                part[..., None, :, :],
                out=result[..., :whole, :].reshape(*result.shape[:-2], *tiles, part.shape[-1]),
            )
        if whole < height:
            np.matmul(one[..., whole:, :], part, out=result[..., whole:, :])
    return made


_ALONE = 1 << 18
"""Multiplications up to which OpenBLAS works alone (``SMP_THRESHOLD_MIN * GEMM_MULTITHREAD_THRESHOLD``)."""
_ROWS = 16
"""Rows of a part, at least."""
_RANK = _ALONE // _ROWS // _ROWS
"""The greatest rank for which such parts are large enough to be worth it."""


def _carry_one(
    plan: Plan,
    entry: Entry,
    loop: int,
    keys: Sequence[Sequence[str]],
    make: Make,
    held: int,
    lowered: _Lowered,
    *,
    sampled: bool,
) -> Iterator[Piece]:
    """The slices of all tensors that one loop value of an entry writes; ``lowered`` keeps what slices share."""
    combined = _combined(entry) if sampled else None
    sizes = dict(entry.sizes)
    if combined is not None:
        sizes[combined] = VECTORS
    holes = {term: entry.way.stacks[term] for term in (*entry.read, *entry.written)}
    stacks = [entry.stack(term) for term in entry.written]
    slots = [np.arange(prod(stack)).reshape(stack) for stack in stacks]
    shapes = [entry.shape(term) for term in entry.written]
    for windows in _windows(entry, sizes, held):
        small = {**sizes, **{name: stop - start for name, (start, stop) in windows.items()}}
        part, steps = _part(entry, loop, small, lowered)
        tensors: list[Wide] = []
        sources: list[Ints] = []
        for term, ids in zip(entry.read, entry.sources, strict=True):
            takes = _takes(term, entry, windows, combined)
            some = _some(ids[loop], _holes(holes[term], entry, windows))
            absent: Wide | None = None
            places = np.empty(some.size, dtype=np.int64)
            for at, number in enumerate(some.reshape(-1).tolist()):
                places[at] = len(tensors)
                if number >= 0:
                    tensors.append(make(number, takes))
                    continue
                absent = np.zeros(part.shape(term)) if absent is None else absent
                tensors.append(absent)
            sources.append(places.reshape(1, *some.shape))
        part = replace(part, sources=tuple(sources))
        done = apply_loop(part, 0, plan, tensors, steps)
        del tensors
        for number, term in enumerate(entry.written):
            takes = _takes(term, entry, windows, combined)
            rows = _some(slots[number], _holes(holes[term], entry, windows)).reshape(-1).tolist()
            for row, values in zip(rows, done[number], strict=True):
                yield Piece(
                    keys[number][row],
                    entry.written_kinds[number],
                    str(entry.rule),
                    shapes[number],
                    takes,
                    values,
                    combined is not None,
                )


def _part(
    entry: Entry, loop: int, sizes: dict[str, int], lowered: _Lowered
) -> tuple[Entry, list[Step]]:
    """One loop value of an entry whose axes have other sizes, and what carries it out."""
    key = tuple(sizes.values())
    found = lowered.get(key)
    copies = (
        found[0]
        if found
        else lower(entry.rule.equation, sizes, reverse=entry.way.direction.backward)
    )
    part = entry.resized(sizes, loops=entry.loops[loop : loop + 1], copies=copies)
    if found is None:
        found = lowered[key] = copies, [] if part.renames else steps_of(part)
    return part, found[1]


def _some(ids: Ints, holes: Sequence[Ints | None]) -> Ints:
    """Some of the tensors that a term stands for, by the values of its stacked indices."""
    for dim, take in enumerate(holes):
        ids = ids if take is None else ids.take(take, axis=dim)
    return ids


def _holes(holes: Sequence[Expr], entry: Entry, windows: _Windows) -> list[Ints | None]:
    return [_positions(hole, entry.sizes, windows) for hole in holes]


def _takes(term: Term, entry: Entry, windows: _Windows, combined: str | None) -> tuple[Take, ...]:
    return tuple(
        vectors(entry.sizes[dim.name])
        if combined is not None and dim == Axis(combined) and isinstance(dim, Axis)
        else _positions(dim, entry.sizes, windows)
        for dim in term.dims
        if dim != Axis(REST)
    )


def _positions(expr: Expr, sizes: Mapping[str, int], windows: _Windows) -> Ints | None:
    """Where the values of a dim stand that its axes have in their windows; ``None`` for all of them."""
    if not any(name in windows for name in axes_of(expr)):
        return None
    return _places(expr, sizes, windows)


def _places(expr: Expr, sizes: Mapping[str, int], windows: _Windows) -> Ints:
    if isinstance(expr, Axis):
        return np.arange(*windows.get(expr.name, (0, sizes[expr.name])))
    if isinstance(expr, Sum):
        starts = np.cumsum([0, *(extent(term, sizes) for term in expr.terms)])
        parts = zip(starts.tolist(), expr.terms, strict=False)
        return np.concatenate([start + _places(term, sizes, windows) for start, term in parts])
    found = np.zeros(1, dtype=np.int64)
    for factor in expr.factors if isinstance(expr, Product) else ():
        inner = _places(factor, sizes, windows)
        found = (found[:, None] * extent(factor, sizes) + inner).reshape(-1)
    return found


def _common(entry: Entry) -> list[str]:
    """Axes that every element has an index along, in the order of the first tensor that is written."""
    axes = set.intersection(*({axis.name for axis in copy.axes} for copy in entry.copies))
    term = entry.written[0]
    exprs = (*entry.way.stacks[term], *term.dims)
    ordered = dict.fromkeys(name for expr in exprs for name in axes_of(expr))
    return [name for name in ordered if name in axes and name != REST]


def _combined(entry: Entry) -> str | None:
    """The longest axis that stands alone in a dim of every tensor."""

    def alone(name: str, term: Term) -> bool:
        exprs = (*entry.way.stacks[term], *term.dims)
        inside = sum(name in axes_of(expr) for expr in exprs)
        return inside == 1 and Axis(name) in term.dims

    found = [
        name
        for name in _common(entry)
        if entry.sizes[name] > VECTORS
        and all(alone(name, term) for term in (*entry.read, *entry.written))
    ]
    return max(found, key=lambda name: entry.sizes[name], default=None)


def _windows(entry: Entry, sizes: Mapping[str, int], held: int) -> Iterator[_Windows]:
    """Windows of the first axes, so that no more elements are held at a time."""
    sized = entry.resized(dict(sizes))
    total = sum(prod(sized.stack(term)) * prod(sized.shape(term)) for term in entry.read)
    steps: dict[str, int] = {}
    for name in _common(entry):
        if total <= held or sizes[name] != entry.sizes[name]:
            continue
        each = max(1, total // max(1, sizes[name]))
        steps[name] = max(1, min(sizes[name], held // each))
        total = each * steps[name]
    ranges = [
        [(first, min(first + step, sizes[name])) for first in range(0, sizes[name], step)]
        for name, step in steps.items()
    ]
    for chosen in product(*ranges):
        yield dict(zip(steps, chosen, strict=True))
