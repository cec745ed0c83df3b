"""Whether an equation that was found at one size holds at another, and for which sizes of its axes.

At a size at which axes are alike the same tensors show less of the rule, and what was inferred there by itself looks
different. So the equation is tried: its axes get all sizes that the shapes permit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from math import prod

from regraft.equation.lower import is_stacked
from regraft.equation.notation import Equation, Expr, Term, axes_of, parse_equation
from regraft.equation.sizes import SizeError, UnknownSizeError, solve_sizes
from regraft.learning.content import Tensor
from regraft.learning.pairs import Pair
from regraft.learning.propose import check
from regraft.names.keys import group_names
from regraft.rules.book import Book, Rule
from regraft.rules.templates import match_group
from regraft.values import replace

_TRIES, _LEAST, _WORK = 300, 20, 2_000_000
"""Sizes that are tried at most: so many, but fewer where that would move more elements than this."""
_SOLVED = 2000
"""How often sizes are solved in search of them."""


def fits(
    sides: str,
    fixed: Sequence[str],
    pair: Pair,
    likely: Mapping[str, Sequence[int]],
    others: Sequence[int],
) -> Iterator[dict[str, int]]:
    """Sizes of an equation's axes for which it makes a pair's tensors after of those before, bit for bit.

    ``fixed`` are clauses that belong to the equation, ``likely`` sizes that are tried first, by axis, and ``others``
    those that are tried then, for axes of which nothing else is likely.
    """
    equation = parse_equation(_with(sides, fixed))
    found = _Known.of(equation, pair)
    if found is None:
        return
    tried: list[dict[str, int]] = []
    elements = sum(prod(shape) for _, shape in found.shapes)
    tries = max(_LEAST, min(_TRIES, _WORK // elements))
    for alike, more in ((True, ()), (False, ()), (False, others)):
        search = _Search(likely, more, alike, count(1))
        for sizes in islice(search.sizes(equation, found), tries):
            if sizes in tried or 0 in sizes.values():
                continue
            tried.append(sizes)
            clauses = [*fixed, *(f"{axis} = {size}" for axis, size in sizes.items())]
            if _holds(_with(sides, clauses), found, pair):
                yield sizes


def _with(sides: str, clauses: Sequence[str]) -> str:
    return sides + (f"\nwhere {', '.join(clauses)}" if clauses else "")


@dataclass(frozen=True, slots=True)
class _Known:
    """What a pair says of an equation: its tensors, their shapes, and how many are stacked."""

    names: tuple[frozenset[str], frozenset[str]]
    shapes: tuple[tuple[Term, tuple[int, ...]], ...]
    holes: tuple[tuple[Expr, int], ...]

    @staticmethod
    def of(equation: Equation, pair: Pair) -> _Known | None:
        """``None`` where a tensor is missing, or tensors of one name have several shapes."""
        names: list[frozenset[str]] = []
        shapes: list[tuple[Term, tuple[int, ...]]] = []
        holes: list[tuple[Expr, int]] = []
        for terms, tensors in zip(equation.sides(), (pair.before, pair.after), strict=True):
            mine: set[str] = set()
            for term in terms:
                found, numbers = _matching(term, tensors)
                looks = {tensors[name].shape for name in found}
                if len(looks) != 1:
                    return None
                mine |= found
                shapes.append((term, looks.pop()))
                for hole, values in numbers:
                    if is_stacked(equation, hole) and values == set(range(len(values))):
                        holes.append((hole, len(values)))
            names.append(frozenset(mine))
        return _Known((names[0], names[1]), tuple(shapes), tuple(holes))


def _matching(
    term: Term, tensors: Mapping[str, Tensor]
) -> tuple[set[str], list[tuple[Expr, set[int]]]]:
    """Tensors that a term speaks of, and the numbers that are in the holes of its name."""
    assert term.key is not None
    names: set[str] = set()
    numbers: list[tuple[Expr, set[int]]] = [(hole, set()) for hole in term.key.holes]
    fixed = len(term.dims) - term.ends_open
    for group in group_names([n for n, t in tensors.items() if len(t.shape) >= fixed]):
        match = match_group(term.key, group)
        if match is None:
            continue
        names.update(group.take(match.rows).names())
        for (_, values), column in zip(numbers, match.holes.T, strict=True):
            values.update(column.tolist())
    return names, numbers


@dataclass(frozen=True, slots=True)
class _Search:
    """A way to try sizes."""

    likely: Mapping[str, Sequence[int]]
    others: Sequence[int]
    alike: bool
    """Whether axes of which the same is likely are of one size."""
    solved: Iterator[int]
    """Counts the attempts."""

    def sizes(self, equation: Equation, known: _Known) -> Iterator[dict[str, int]]:
        """Sizes that agree with the shapes, likely ones first."""
        if next(self.solved) > _SOLVED:
            return
        try:
            sizes, _ = solve_sizes(equation, known.shapes, known.holes)
            yield {axis: size for axis, size in sizes.items() if axis != "..."}
            return
        except UnknownSizeError as error:
            # What no field suggests follows from the others, if it can.
            rest = error.axes
            axis = min(rest, key=lambda n: (len(self.likely[n]) == 1, len(self.likely[n])))
        except SizeError:
            return
        limit = _limit(axis, known)
        same = [n for n in rest if self.alike and self.likely[n] == self.likely[axis]]
        more = self.others if len(self.likely[axis]) == 1 else ()
        for size in dict.fromkeys((*self.likely[axis], *more)):
            if 0 < size <= limit:
                clauses = ", ".join(f"{name} = {size}" for name in (same or [axis]))
                where = parse_equation(f"{axis} == {axis} where {clauses}").where
                told = replace(equation, where=(*equation.where, *where))
                yield from self.sizes(told, known)


def _limit(axis: str, known: _Known) -> int:
    """The extent of the smallest dim or index that an axis is in."""
    spans = [size for dim, size in (*_dims(known.shapes), *known.holes) if axis in axes_of(dim)]
    return min(spans, default=0)


def _dims(shapes: Iterable[tuple[Term, tuple[int, ...]]]) -> Iterator[tuple[Expr, int]]:
    for term, shape in shapes:
        yield from zip(term.dims[: len(term.dims) - term.ends_open], shape, strict=False)


def _holds(text: str, known: _Known, pair: Pair) -> bool:
    equation = parse_equation(text)
    kinds = [tuple("any" for _ in side) for side in equation.sides()]
    rule = Rule("tried", equation, kinds[0], kinds[1], "tried", "")
    book = Book("tried", "", "before", "after", (), (rule,), (), (), (), (), (), "", "")
    return check(book, pair.before, pair.after, *known.names, pair.config)


def is_there(sides: str, pair: Pair) -> bool:
    """Whether a pair has tensors of all names that an equation speaks of."""
    equation = parse_equation(sides)
    return all(
        _matching(term, tensors)[0]
        for terms, tensors in zip(equation.sides(), (pair.before, pair.after), strict=True)
        for term in terms
    )


__all__ = ["fits", "is_there"]
