"""From the numbers in keys to a rule's indices, and back: ``{3 b + r + 1}`` is 8 where b = 2 and r = 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import compress
from operator import not_

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from regraft.equation.lower import is_stacked
from regraft.equation.notation import Affine, Axis, Equation, Expr, Key, Term
from regraft.names.keys import Ints

Givens = Mapping[str, int]
"""The values of the indices that a clause gives one value."""


class Indices(Struct, frozen=True, eq=False):
    """What the numbers in the holes of some keys say."""

    loops: Ints
    """(keys, loops), behind the numbers in rests where these count."""
    stacked: Ints
    """(keys, stacked holes)."""


class Reading(Struct, frozen=True, dict=True):
    """How the holes of one key template are read and written."""

    equation: Equation
    holes: tuple[Expr, ...]
    stacked: tuple[bool, ...]
    """For every hole whether it counts the tensors of a stack."""

    def read(self, numbers: Ints, givens: Givens) -> tuple[Indices, npt.NDArray[np.bool_]]:
        """The indices of some keys, one row each, and which rows have any.

        >>> from regraft.equation.notation import parse_equation
        >>> equation = parse_equation("a.{3 b + r + 1} : i == c.{b}.{r} : i")
        >>> found, fits = reading_of(equation, equation.left[0].key).read(np.array([[0], [8]]), {})
        >>> found.loops.tolist()[1], fits.tolist()
        ([2, 1], [False, True])
        """
        count = len(numbers)
        fits = np.ones(count, dtype=bool)
        if self._plain is not None:
            return Indices(*(numbers[:, columns] for columns in self._plain)), fits
        known: dict[str, Ints] = {
            name: np.full(count, value, dtype=np.int64) for name, value in givens.items()
        }
        columns: list[Ints] = []
        order = sorted(range(len(self.holes)), key=lambda n: self._unknown(n, givens))
        for at in order:
            hole, column = self.holes[at], numbers[:, at]
            if self.stacked[at]:
                continue
            terms = _terms(hole)
            rest = column - (hole.constant if isinstance(hole, Affine) else 0)
            for factor, name in terms:
                if name in known:
                    rest = rest - factor * known[name]
            left = sorted(((f, n) for f, n in terms if n not in known), key=lambda t: -abs(t[0]))
            for factor, name in left:
                known[name] = rest // factor
                rest = rest - factor * known[name]
                fits &= known[name] >= 0
            fits &= rest == 0
        for at, hole in enumerate(self.holes):
            if not self.stacked[at]:
                continue
            column = numbers[:, at]
            if isinstance(hole, Affine):
                ((factor, _),), constant = hole.terms, hole.constant
                fits &= (column >= constant) & ((column - constant) % factor == 0)
                column = (column - constant) // factor
            columns.append(column)
        loops = [known[name] for name in self.equation.loops]
        return Indices(_columns(loops, count), _columns(columns, count)), fits

    def write(self, loops: Ints, stacked: Ints, givens: Givens) -> Ints:
        """The numbers in the holes for some indices; the inverse of reading."""
        numbers = np.empty((len(loops), len(self.holes)), dtype=np.int64)
        names = self.equation.loops
        at_stack = 0
        for at, hole in enumerate(self.holes):
            if self.stacked[at]:
                column = stacked[:, at_stack]
                at_stack += 1
                if isinstance(hole, Affine):
                    column = column * hole.terms[0][0] + hole.constant
                numbers[:, at] = column
                continue
            terms = _terms(hole)
            numbers[:, at] = hole.constant if isinstance(hole, Affine) else 0
            for factor, name in terms:
                value = loops[:, names.index(name)] if name in names else givens[name]
                numbers[:, at] += factor * value
        return numbers

    @cached_property
    def _plain(self) -> tuple[list[int], list[int]] | None:
        """The columns of the loops and of the stacked holes, where each hole is one index as it is."""
        if not all(isinstance(hole, Axis) for hole in self.holes):
            return None
        names = [hole.name for hole in self.holes if isinstance(hole, Axis)]
        loops = self.equation.loops
        if self.equation.givens or sorted(compress(names, map(not_, self.stacked))) != sorted(
            loops
        ):
            return None
        return [names.index(name) for name in loops], [
            at for at, stacked in enumerate(self.stacked) if stacked
        ]

    def _unknown(self, at: int, givens: Givens) -> int:
        if self.stacked[at] or isinstance(self.holes[at], Axis):
            return 0
        return sum(name not in givens for _, name in _terms(self.holes[at]))


def _terms(hole: Expr) -> tuple[tuple[int, str], ...]:
    """The indices in a hole that is a number, with their factors."""
    if isinstance(hole, Affine):
        return hole.terms
    return ((1, hole.name),) if isinstance(hole, Axis) else ()


def _columns(columns: Sequence[Ints], count: int) -> Ints:
    return np.stack(columns, axis=1) if columns else np.zeros((count, 0), dtype=np.int64)


@lru_cache(maxsize=4096)
def reading_of(equation: Equation, key: Key) -> Reading:
    """How the holes of a key of an equation are read."""
    return Reading(equation, key.holes, tuple(is_stacked(equation, hole) for hole in key.holes))


def stacks_of(equation: Equation, term: Term) -> tuple[Expr, ...]:
    """The holes of a term's key that count the tensors of a stack."""
    if term.key is None:
        return ()
    reading = reading_of(equation, term.key)
    return tuple(compress(reading.holes, reading.stacked))


def given_names(equation: Equation, key: Key) -> tuple[str, ...]:
    """The indices of a key that have one value each, which a clause gives."""
    given = equation.givens
    return tuple(
        dict.fromkeys(name for hole in key.holes for _, name in _terms(hole) if name in given)
    )
