"""Lowering an equation with known sizes to copies: two offsets and a loop nest each.

Each side expands into boxes. A sum picks a summand, what remains is a dense strided block. A box is named by its
set of axes; the boxes of the two sides that have one name are a pair, and a pair is a copy. Because a name occurs
once on each side, the pairing is a bijection of elements: copies neither overlap nor leave holes.

Two kinds of axes stand on one side only and name no box. Along ``copies t`` the elements are the same each time:
the first is read and the others are compared with it, and all are written. A box with ``fill p`` is padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise, product
from math import prod

from msgspec import Struct

from regraft.equation.notation import (
    Affine,
    Axis,
    Begin,
    Bound,
    Equation,
    Expr,
    Sum,
    Term,
    Where,
    axes_of,
    notation_error,
)
from regraft.equation.sizes import extent, shape_of
from regraft.values import replace


class Place(Struct, frozen=True):
    """Where an axis stands in a tensor: in a dim, or in a hole of its key."""

    in_key: bool
    index: int
    """The number of the dim, or of the hole."""
    step: int
    """How far one step along the axis moves in that dim's (or hole's) index; 0 for copies of one element."""


class CopyAxis(Struct, frozen=True):
    """One axis of a copy and where it stands on either side."""

    name: str
    size: int
    source: Place
    target: Place


class Copy(Struct, frozen=True):
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


class Padding(Struct, frozen=True):
    """A dense block of a term that holds one value."""

    term: int
    axes: tuple[tuple[int, Place], ...]
    """Sizes, and where each axis stands."""
    start: tuple[int, ...]
    key_start: tuple[int, ...]
    value: float


class Nest(Struct, frozen=True):
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
    elif isinstance(expr, Affine):
        yield tuple((name, 1) for _, name in expr.terms if sizes is None or name in sizes), 0
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


class _Box(Struct, frozen=True):
    term: int
    places: dict[str, Place]
    start: tuple[int, ...]
    key_start: tuple[int, ...]

    def name(self, equation: Equation) -> frozenset[str]:
        """What the box on the other side has, too."""
        return frozenset(self.places).difference(equation.copies)

    def padding(self, equation: Equation) -> float | None:
        """The value that a box of padding holds."""
        values = [fill.value for fill in equation.fills if fill.axis in self.places]
        return values[0] if values else None

    def is_any(self, equation: Equation) -> bool:
        """Whether a box of padding may hold anything."""
        return any(fill.any for fill in equation.fills if fill.axis in self.places)


def is_stacked(equation: Equation, hole: Expr) -> bool:
    """Whether a hole counts the tensors of a stack; else it is a loop, or one number."""
    if not isinstance(hole, (Axis, Affine)):
        return True
    free = {*equation.loops, *equation.givens}
    return any(name not in free for name in axes_of(hole))


def stacked_holes(equation: Equation, term: Term) -> tuple[Expr, ...]:
    """The holes of a term's key that are no loops, from left to right."""
    return tuple(h for h in term.holes if is_stacked(equation, h))


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
    _check_one_sided(equation)
    for clause in equation.where:
        if clause.one and (clause.axes or clause.axis not in equation.indices):
            raise notation_error(
                equation.text,
                clause.start,
                f"{clause.axis} is VALUE: an index that stands in keys only, and a value without axes",
            )
    for term in (*equation.left, *equation.right):
        _check_numbers(equation, term)
    names: list[dict[frozenset[str], _Box]] = []
    loops = equation.loops
    for side in (equation.left, equation.right):
        boxes: dict[frozenset[str], _Box] = {}
        seen: set[frozenset[str]] = set()
        for box in _boxes(equation, side, None):
            whole = frozenset(box.places)
            name = box.name(equation)
            copied = (
                name in boxes
                and whole not in seen
                and (whole != name or frozenset(boxes[name].places) != name)
            )
            if whole in seen or (name in boxes and not copied):
                raise notation_error(
                    equation.text,
                    side[box.term].start,
                    f"two boxes of one side have the axes {{{', '.join(sorted(whole))}}}; "
                    "tell them apart with a unit axis (k = 1)",
                )
            seen.add(whole)
            if box.padding(equation) is None:
                boxes.setdefault(name, box)
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
        holes = term.holes
        bare = {name for h in holes if isinstance(h, (Axis, Affine)) for name in axes_of(h)}
        missing = [name for name in loops if name not in bare]
        if missing:
            raise notation_error(
                equation.text, term.start, f"every key holds the loop {{{missing[0]}}}"
            )
    known = {name for term in terms for d in term.dims for name in axes_of(d)} | {
        name for term in terms if term.key for h in term.key.holes for name in axes_of(h)
    }
    limits: tuple[Bound | Begin, ...] = (*equation.bounds, *equation.begins)
    for bound in limits:
        if bound.axis not in loops:
            raise notation_error(
                equation.text,
                bound.start,
                f"{bound.axis} is no loop, so it has a size and no bound",
            )
    clauses: tuple[Where | Bound | Begin, ...] = (*equation.where, *limits)
    for each in clauses:
        names_used = [v.name for _, v in each.values if isinstance(v, Axis)]
        for axis in (each.axis, *names_used):
            if axis not in known:
                raise notation_error(
                    equation.text, each.start, f"no key and no dim has an axis {axis}"
                )


def _check_one_sided(equation: Equation) -> None:
    """Copies and padding: axes of one side."""
    sides = [
        {n for term in side for e in (*term.dims, *term.holes) for n in axes_of(e)}
        for side in (equation.left, equation.right)
    ]
    for axis, what in (
        *((axis, "copies") for axis in equation.copies),
        *((fill.axis, "fill") for fill in equation.fills),
    ):
        if sum(axis in side for side in sides) != 1:
            message = f"{what} {axis}: exactly one side has the axis {axis}"
            raise notation_error(
                equation.text, max(equation.text.find(f"{what} {axis}"), 0), message
            )


def _check_numbers(equation: Equation, term: Term) -> None:
    """Numbers computed from indices: the indices can be found from the number, in one way."""
    holes = term.holes
    free = {*equation.loops, *equation.givens}
    known = {h.name for h in holes if isinstance(h, Axis)} | set(equation.givens)
    for hole in sorted(
        (h for h in holes if isinstance(h, Affine)),
        key=lambda h: sum(name not in known for name in axes_of(h)),
    ):
        sized = [name for name in axes_of(hole) if name not in free]
        if sized and (len(hole.terms) > 1 or hole.terms[0][0] < 0 or hole.constant < 0):
            message = f"{sized[0]} counts in a shape, too, so only {{k {sized[0]} + n}} can be computed from it"
            raise notation_error(equation.text, term.start, message)
        open_ones = sorted((abs(f), f > 0) for f, name in hole.terms if name not in known)
        steps = [factor for factor, _ in open_ones]
        if len({up for _, up in open_ones}) > 1 or any(b % a or a == b for a, b in pairwise(steps)):
            message = (
                f"{{{hole}}} does not tell its indices: of each two factors one divides the other, "
                "and all have one sign"
            )
            raise notation_error(equation.text, term.start, message)
        known.update(axes_of(hole))


def lower(
    equation: Equation, sizes: Mapping[str, int], *, reverse: bool = False
) -> tuple[Copy, ...]:
    """The copies of one instance of an equation, in the order of the side that is written.

    >>> from regraft.equation.notation import parse_equation
    >>> [c.target_start for c in lower(parse_equation("a i, b i == (a + b) i"), {"a": 2, "b": 3, "i": 4})]
    [(0, 0), (2, 0)]
    """
    check_equation(equation)
    read, written = equation.sides(reverse=reverse)
    partners: dict[frozenset[str], _Box] = {}
    for box in _boxes(equation, read, sizes):
        partners.setdefault(box.name(equation), box)
    return tuple(
        _copy(partners[target.name(equation)], target, sizes)
        for target in _boxes(equation, written, sizes)
        if target.padding(equation) is None
    )


def _copy(source: _Box, target: _Box, sizes: Mapping[str, int]) -> Copy:
    axes = tuple(
        CopyAxis(name, sizes[name], source.places.get(name, _STAYS), place)
        for name, place in target.places.items()
    )
    return Copy(
        source.term,
        target.term,
        axes,
        source.start,
        target.start,
        source.key_start,
        target.key_start,
    )


_STAYS = Place(in_key=False, index=0, step=0)


def repeats(
    equation: Equation, sizes: Mapping[str, int], *, reverse: bool = False
) -> tuple[Copy, ...]:
    """What must be equal on the side that is read: copies from its first terms to others of the same side.

    >>> from regraft.equation.notation import parse_equation
    >>> equation = parse_equation("i == (t i) where t = 2, copies t")
    >>> [axis.source.step for axis in repeats(equation, {"t": 2, "i": 3}, reverse=True)[0].axes]
    [0, 1]
    """
    if not equation.copies:
        return ()
    read, _ = equation.sides(reverse=reverse)
    first: dict[frozenset[str], _Box] = {}
    result = []
    for box in _boxes(equation, read, sizes):
        name = box.name(equation)
        known = first.setdefault(name, box)
        alone = frozenset(box.places) == name
        if box is known and alone:
            continue
        places = {n: p for n, p in known.places.items() if n in name}
        result.append(_copy(_Box(known.term, places, known.start, known.key_start), box, sizes))
    return tuple(result)


def paddings(
    equation: Equation, sizes: Mapping[str, int], *, written: bool, reverse: bool = False
) -> tuple[Padding, ...]:
    """The padding of the side that is written, or of the one that is read as far as it must be padding."""
    if not equation.fills:
        return ()
    side = equation.sides(reverse=reverse)[written]
    result = []
    for box in _boxes(equation, side, sizes):
        value = box.padding(equation)
        if value is not None and (written or not box.is_any(equation)):
            axes = tuple((sizes[name], place) for name, place in box.places.items())
            result.append(Padding(box.term, axes, box.start, box.key_start, value))
    return tuple(result)


def open_rest(equation: Equation, dims: int) -> Equation:
    """The equation with ``...`` written out as so many dims, so that they can be cut one by one.

    >>> from regraft.equation.notation import parse_equation
    >>> str(open_rest(parse_equation("(a + b) ... == a ..., b ... where a = 2"), 2))
    '(a + b) _0 _1 == a _0 _1, b _0 _1 where a = 2'
    """
    rest = tuple(Axis(f"_{n}") for n in range(dims))

    def opened(side: tuple[Term, ...]) -> tuple[Term, ...]:
        return tuple(
            Term(t.key, (*t.dims[:-1], *rest), t.start) if t.ends_open else t for t in side
        )

    return replace(equation, left=opened(equation.left), right=opened(equation.right))


def flat_shape(term: Term, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A term's shape with ``...`` as one dim."""
    if term.ends_open:
        return (*shape_of(Term(term.key, term.dims[:-1], 0), sizes, ()), sizes["..."])
    return shape_of(term, sizes, ())


def flat_shapes(terms: Iterable[Term], sizes: Mapping[str, int]) -> dict[Term, tuple[int, ...]]:
    """Some terms' shapes with ``...`` as one dim."""
    return {term: flat_shape(term, sizes) for term in terms}


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
            axis.source.step * strides[0][axis.source.index] if axis.source.step else 0,
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
    "Padding",
    "Place",
    "check_equation",
    "expand",
    "flat_shape",
    "flat_shapes",
    "is_stacked",
    "lower",
    "nest_of",
    "open_rest",
    "paddings",
    "repeats",
    "stacked_holes",
    "strides_of",
]
