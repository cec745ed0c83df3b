"""One side of some rule books: what they say of the keys of one layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

from msgspec import Struct

from regraft.layouts.graph import Edge
from regraft.names.keys import Group
from regraft.planning.model import Scope
from regraft.rules.book import Book, module_template
from regraft.rules.direction import Direction
from regraft.rules.templates import KeyTable, Match, match_group
from regraft.rules.terms import RuleTerm


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
            Edge(book, Direction.FORWARD if layout == book.left else Direction.BACKWARD)
            for layout in (self.layout, *self.also)
            for book in self.books
            if layout in (book.left, book.right)
        )

    @cached_property
    def _tables(self) -> tuple[KeyTable[RuleTerm], ...]:
        """The terms of this side, a table for each book."""
        return tuple(edge.book.terms(edge.reads) for edge in self.edges)

    @property
    def terms(self) -> list[RuleTerm]:
        """Every term of this side."""
        return [term for table in self._tables for term in table]

    def matching(self, keys: Group) -> Iterator[tuple[RuleTerm, Match]]:
        """The terms of this side that speak of keys."""
        for table in self._tables:
            yield from table.matching(keys)

    def closest(self, keys: Group) -> tuple[RuleTerm, Match] | None:
        """The term that speaks of keys on this side; of several the one with most of the key's text in its own."""
        hits = list(self.matching(keys))
        return max(hits, key=lambda hit: hit[0].specificity) if hits else None

    def find(self, keys: Group) -> RuleTerm | None:
        """The same without what the numbers in the keys are."""
        found = self.closest(keys)
        return None if found is None else found[0]

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
        mine = {module_template(module) for module in modules}
        ends = ending.removeprefix(".")
        for edge in self.edges:
            for paths in edge.book.modules(edge.reads):
                ending_so = any(path == ends or path.endswith(ending) for path in paths)
                if ending_so and mine.isdisjoint(paths):
                    return True
        return False

    def parameters(self, modules: Group) -> tuple[str, ...] | None:
        """The parameters of a module in registration order, where a book says that it has its own."""
        for edge in self.edges:
            for table in edge.book.parameters:
                if edge.reads in table.sides and match_group(table.module, modules) is not None:
                    return table.names
        return None
