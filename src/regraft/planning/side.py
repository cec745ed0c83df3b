"""One side of some rule books: what they say of the keys of one layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

from msgspec import Struct

from regraft.equation.notation import Hole, Segments
from regraft.layouts.graph import Edge
from regraft.names.keys import MARK, Group
from regraft.planning.model import Scope
from regraft.rules.book import Book
from regraft.rules.templates import Match, match_group
from regraft.rules.terms import RuleTerm

_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")


class Side(Struct, frozen=True, dict=True):
    """One side of some rule books: the layout that is read, with each book's config."""

    books: tuple[Book, ...]
    layout: str
    scopes: Mapping[str, Scope]
    also: tuple[str, ...] = ()
    """Other layouts that parts are of, where they are of several."""

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """The edges that lead out of the layout, one for each book that knows it."""
        return tuple(
            Edge.out_of(book, layout)
            for layout in (self.layout, *self.also)
            for book in self.books
            if layout in book.layouts
        )

    @property
    def terms(self) -> list[RuleTerm]:
        """Every term of this side."""
        return [term for edge in self.edges for term in edge.book.terms(edge.reads)]

    def matching(self, keys: Group) -> Iterator[tuple[RuleTerm, Match]]:
        """The terms of this side that speak of keys."""
        for edge in self.edges:
            yield from edge.book.terms(edge.reads).matching(keys)

    def find(self, keys: Group) -> RuleTerm | None:
        """The term that speaks of a key on this side; of several the one with most of the key's text in its own."""
        hits = (term for term, _ in self.matching(keys))
        return max(hits, key=lambda term: term.specificity, default=None)

    def scope_of(self, book: str) -> Scope:
        """What a book's ``config.x`` means here, by the book's name."""
        return self.scopes.get(book, Scope())

    def carried_kind(self, keys: Group) -> str | None:
        """The kind that a carry-over gives a key that stays as it is; ``None`` where none says it."""
        kinds = (carry.kind for book in self.books for carry, _ in book.carried.matching(keys))
        return next(filter(None, kinds), None)

    def has_parameters_in(self, name: str) -> bool:
        """Whether a module of this side that has parameters of its own ends in a name."""
        return any(
            edge.reads in table.sides and str(table.module).endswith(name)
            for edge in self.edges
            for table in edge.book.parameters
        )

    def names_others(self, ending: str, modules: Iterable[str]) -> bool:
        """Whether modules that are not in ``modules``, nor inside one of them, end in a name as well.

        Only keys that books give from the model's root are known.
        """
        mine = {_NUMBER.sub(MARK, module) for module in modules}
        for key in self._whole_keys():
            segments = key.split(".")
            paths = [".".join(segments[:end]) for end in range(1, len(segments))]
            if any(path in mine for path in paths):
                continue
            if any(path == ending.removeprefix(".") or path.endswith(ending) for path in paths):
                return True
        return False

    def _whole_keys(self) -> Iterator[str]:
        """The templates of all keys of this side that have a whole path, with marks for numbers."""
        for edge in self.edges:
            terms = [carry.term for carry in edge.book.carries]
            for rule in edge.book.rules:
                terms += edge.sides(rule)[0]
            for term in terms:
                parts = () if term.key is None else term.key.parts
                if parts and not any(isinstance(part, Segments) for part in parts):
                    text = "".join(MARK if isinstance(part, Hole) else str(part) for part in parts)
                    yield _NUMBER.sub(MARK, text)

    def parameters(self, modules: Group) -> tuple[str, ...] | None:
        """The parameters of a module in registration order, where a book says that it has its own."""
        for edge in self.edges:
            for table in edge.book.parameters:
                if edge.reads in table.sides and match_group(table.module, modules) is not None:
                    return table.names
        return None
