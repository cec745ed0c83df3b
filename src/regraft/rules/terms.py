"""The terms of a rule book's rules, with how the numbers in their keys are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from regraft.equation.notation import Key, Term
from regraft.rules.indices import Reading, reading_of
from regraft.rules.templates import Specificity, specificity

if TYPE_CHECKING:
    from regraft.rules.book import Rule


class RuleTerm(Struct, frozen=True, eq=False):
    """A term of a rule on the side that is read, with what follows from the rule alone."""

    place: int
    """Where it stands among the terms of its book."""
    rule: Rule
    number: int
    """Which term of its side it is."""
    term: Term
    key: Key
    kind: str
    specificity: Specificity
    reading: Reading
    """How the numbers in its key are read."""

    @staticmethod
    def of(place: int, rule: Rule, number: int, term: Term, kind: str) -> RuleTerm:
        """A term, and what follows from its rule."""
        assert term.key is not None
        closeness, reading = specificity(term, rule.equation), reading_of(rule.equation, term.key)
        return RuleTerm(place, rule, number, term, term.key, kind, closeness, reading)
