"""One side of some rule books: what they say of the keys of one layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

from msgspec import Struct

from regraft.equation.notation import Hole, Segments, Term
from regraft.layouts.graph import Edge
from regraft.names.keys import MARK, Group
from regraft.planning.model import Scope
from regraft.rules.book import Book, Rule
from regraft.rules.templates import match_group, specificity

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

    @cached_property
    def rules(self) -> list[tuple[Rule, Term, str, Scope]]:
        """Every term of this side with its kind."""
        return [
            (rule, term, kind, self.scopes.get(edge.book.name, Scope()))
            for edge in self.edges
            for rule in edge.book.rules
            for term, kind in zip(edge.sides(rule)[0], rule.kinds(edge.direction)[0], strict=True)
        ]

    def find(self, keys: Group) -> tuple[Rule, Term, str, Scope] | None:
        """The rule that speaks of a key on this side; of several the one with most of the key's text in its own."""
        hits = [
            found
            for found in self.rules
            if (key := found[1].key) is not None and match_group(key, keys) is not None
        ]
        if len(hits) < 2:
            return hits[0] if hits else None
        return max(hits, key=lambda found: specificity(found[1], found[0].equation))

    def carried_kind(self, keys: Group) -> str | None:
        """The kind that a carry-over gives a key that stays as it is; ``None`` where none says it."""
        for book in self.books:
            for carry in book.carries:
                key = carry.term.key
                if carry.kind and key is not None and match_group(key, keys) is not None:
                    return carry.kind
        return None

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
