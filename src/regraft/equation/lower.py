"""Lowering an equation with known sizes to copies: two offsets and a loop nest each.

Each side expands into boxes. A sum picks a summand, what remains is a dense strided block. A box is named by its
set of axes; the boxes of the two sides that have one name are a pair, and a pair is a copy. Because a name occurs
once on each side, the pairing is a bijection of elements: copies neither overlap nor leave holes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

from regraft.equation.notation import (
    Axis,
    Bound,
    Equation,
    Expr,
    Sum,
    Term,
    Where,
    axes_of,
    loops_of,
    notation_error,
)
from regraft.equation.sizes import extent, shape_of


@dataclass(frozen=True, slots=True)
class Place:
    """Where an axis stands in a tensor: in a dim, or in a hole of its key."""

    in_key: bool
    index: int
    """The number of the dim, or of the hole."""
    step: int
    """How far one step along the axis moves in that dim's (or hole's) index."""


@dataclass(frozen=True, slots=True)
class CopyAxis:
    """One axis of a copy and where it stands on either side."""

    name: str
    size: int
    source: Place
    target: Place


@dataclass(frozen=True, slots=True)
class Copy:
    """A dense block that moves from a term of the side that is read to a term of the other.

    ``*_start`` holds the block's first index in every dim, ``*_key_start`` in every stacked hole.
    """

    source: int
    target: int
    axes: tuple[CopyAxis, ...]
    source_start: tuple[int, ...]
    target_start: tuple[int, ...]
    source_key_start: tuple[int, ...]
    target_key_start: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Nest:
    """A strided copy inside one pair of tensors: offsets and strides count elements."""

    source_offset: int
    target_offset: int
    sizes: tuple[int, ...]
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]


_Expanded = tuple[tuple[tuple[str, int], ...], int]


def expand(expr: Expr, sizes: Mapping[str, int] | None) -> Iterator[_Expanded]:
    """Every choice of summands in an expression: its axes with their steps, and its offset."""
    if isinstance(expr, Axis):
        yield ((expr.name, 1),), 0
    elif isinstance(expr, Sum):
        base = 0
        for term in expr.terms:
            for axes, offset in expand(term, sizes):
                yield axes, base + offset
            base += extent(term, sizes) if sizes is not None else 1
    else:
        spans = [extent(f, sizes) if sizes is not None else 1 for f in expr.factors]
        strides = [prod(spans[i + 1 :]) for i in range(len(spans))]
        for choice in product(*(tuple(expand(f, sizes)) for f in expr.factors)):
            axes = tuple(
                (name, step * stride)
                for (part, _), stride in zip(choice, strides, strict=True)
                for name, step in part
            )
            yield axes, sum(off * s for (_, off), s in zip(choice, strides, strict=True))


@dataclass(frozen=True, slots=True)
class _Box:
    term: int
    places: dict[str, Place]
    start: tuple[int, ...]
    key_start: tuple[int, ...]


def stacked_holes(equation: Equation, term: Term) -> tuple[Expr, ...]:
    """The holes of a term's key that are no loops, from left to right."""
    loops = loops_of(equation)
    holes = term.key.holes if term.key else ()
    return tuple(h for h in holes if not (isinstance(h, Axis) and h.name in loops))


def _boxes(
    equation: Equation, side: Sequence[Term], sizes: Mapping[str, int] | None
) -> Iterator[_Box]:
    for number, term in enumerate(side):
        holes = stacked_holes(equation, term)
        for choice in product(*(tuple(expand(e, sizes)) for e in (*holes, *term.dims))):
            places: dict[str, Place] = {}
            for position, (axes, _) in enumerate(choice):
                in_key = position < len(holes)
                index = position if in_key else position - len(holes)
                for name, step in axes:
                    if name in places:
                        raise notation_error(
                            equation.text,
                            term.start,
                            f"axis {name} stands twice in one box of {term}",
                        )
                    places[name] = Place(in_key, index, step)
            starts = tuple(offset for _, offset in choice)
            yield _Box(number, places, starts[len(holes) :], starts[: len(holes)])


@lru_cache(maxsize=4096)
def check_equation(equation: Equation) -> None:
    """Check that the equation pairs every element of one side with one of the other.

    Raises ``BadInputError`` with the equation and a mark under the part that is wrong.
    """
    names: list[dict[frozenset[str], _Box]] = []
    loops = loops_of(equation)
    for side in (equation.left, equation.right):
        boxes: dict[frozenset[str], _Box] = {}
        for box in _boxes(equation, side, None):
            name = frozenset(box.places)
            if name in boxes:
                raise notation_error(
                    equation.text,
                    side[box.term].start,
                    f"two boxes of one side have the axes {{{', '.join(sorted(name))}}}; "
                    "tell them apart with a unit axis (k = 1)",
                )
            boxes[name] = box
        names.append(boxes)
    for here, there, side in ((0, 1, equation.left), (1, 0, equation.right)):
        for name, box in names[here].items():
            if name not in names[there]:
                raise notation_error(
                    equation.text,
                    side[box.term].start,
                    f"the box {{{', '.join(sorted(name))}}} has no partner on the other side",
                )
    terms = (*equation.left, *equation.right)
    keyed = [term.key is not None for term in terms]
    if any(keyed) and not all(keyed):
        raise notation_error(equation.text, terms[keyed.index(False)].start, "this term has no key")
    rests = Counter(frozenset(term.key.rests) for term in terms if term.key)
    if len(rests) > 1:
        odd = min(rests, key=lambda r: rests[r])
        term = next(t for t in terms if t.key and frozenset(t.key.rests) == odd)
        raise notation_error(equation.text, term.start, "every key holds the same {*...} parts")
    for term in terms:
        bare = {h.name for h in (term.key.holes if term.key else ()) if isinstance(h, Axis)}
        missing = [name for name in loops if name not in bare]
        if missing:
            raise notation_error(
                equation.text, term.start, f"every key holds the loop {{{missing[0]}}}"
            )
    known = {name for term in terms for d in term.dims for name in axes_of(d)} | {
        name for term in terms if term.key for h in term.key.holes for name in axes_of(h)
    }
    for bound in equation.bounds:
        if bound.axis not in loops:
            raise notation_error(
                equation.text,
                bound.start,
                f"{bound.axis} is no loop, so it has a size and no bound",
            )
    clauses: tuple[Where | Bound, ...] = (*equation.where, *equation.bounds)
    for clause in clauses:
        names_used = [v.name for _, v in clause.values if isinstance(v, Axis)]
        for axis in (clause.axis, *names_used):
            if axis not in known:
                raise notation_error(
                    equation.text, clause.start, f"no key and no dim has an axis {axis}"
                )


def lower(equation: Equation, sizes: Mapping[str, int], reverse: bool = False) -> tuple[Copy, ...]:
    """The copies of one instance of an equation, in the order of the side that is written.

    >>> from regraft.equation.notation import parse_equation
    >>> [c.target_start for c in lower(parse_equation("a i, b i == (a + b) i"), {"a": 2, "b": 3, "i": 4})]
    [(0, 0), (2, 0)]
    """
    check_equation(equation)
    read, written = equation.sides(reverse)
    partners = {frozenset(box.places): box for box in _boxes(equation, read, sizes)}
    copies = []
    for target in _boxes(equation, written, sizes):
        source = partners[frozenset(target.places)]
        axes = tuple(
            CopyAxis(name, sizes[name], source.places[name], place)
            for name, place in target.places.items()
        )
        copies.append(
            Copy(
                source.term,
                target.term,
                axes,
                source.start,
                target.start,
                source.key_start,
                target.key_start,
            )
        )
    return tuple(copies)


def flat_shape(term: Term, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A term's shape with ``...`` as one dim."""
    if term.ends_open:
        return (*shape_of(Term(term.key, term.dims[:-1], 0), sizes, ()), sizes["..."])
    return shape_of(term, sizes, ())


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides of a shape, in elements.

    >>> strides_of((2, 3, 4))
    (12, 4, 1)
    """
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def nest_of(copy: Copy, source_shape: Sequence[int], target_shape: Sequence[int]) -> Nest:
    """The strided copy of a box inside one source and one target tensor, loops that agree made one.

    The shapes have ``...`` as one dim (``flat_shape``). Axes that stand in a key on one side and in a shape on
    the other contribute offsets, one for each index, and are not part of the nest.
    """
    strides = strides_of(source_shape), strides_of(target_shape)
    offset = (
        sum(s * st for s, st in zip(copy.source_start, strides[0], strict=True)),
        sum(s * st for s, st in zip(copy.target_start, strides[1], strict=True)),
    )
    loops = [
        (
            axis.size,
            axis.source.step * strides[0][axis.source.index],
            axis.target.step * strides[1][axis.target.index],
        )
        for axis in copy.axes
        if not axis.source.in_key and not axis.target.in_key and axis.size != 1
    ]
    loops.sort(key=lambda loop: (-loop[2], -loop[1]))
    merged: list[tuple[int, int, int]] = []
    for size, source, target in loops:
        if merged:
            outer, outer_source, outer_target = merged[-1]
            if outer_source == source * size and outer_target == target * size:
                merged[-1] = (outer * size, source, target)
                continue
        merged.append((size, source, target))
    columns = tuple(zip(*merged, strict=True)) if merged else ((), (), ())
    return Nest(offset[0], offset[1], *columns)


__all__ = [
    "Copy",
    "CopyAxis",
    "Nest",
    "Place",
    "check_equation",
    "expand",
    "flat_shape",
    "lower",
    "nest_of",
    "stacked_holes",
    "strides_of",
]
