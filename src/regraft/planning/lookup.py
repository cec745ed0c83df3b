"""What rule books say of some keys, looked up once for all that has to know it.

Lookup.of(books, groups, scopes)      which keys, rules and carry-overs of which book match
.unexplained                      what no book has a word for
outside(lookup, model)                what only looks like a model's
detect_layouts(lookup)            which layouts the keys may be of
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from msgspec import Struct

from regraft.equation.notation import Key
from regraft.names.keys import Group
from regraft.planning.model import Scope
from regraft.rules.book import Book, own_books
from regraft.rules.templates import Match, match_group


class Words(Struct, frozen=True, eq=False):
    """What one book says of the keys of one group."""

    book: Book
    keys: tuple[tuple[Key, Match], ...]
    """Its keys that match, of rules in both layouts and of carry-overs."""
    rules: Mapping[str, tuple[str, ...]]
    """The names of its rules that speak of them, for each layout that has any."""
    layouts: tuple[str, ...]
    """The layouts in which it has a word for them: those with rules, or both where a carry-over speaks of them."""


class Lookup(Struct, frozen=True, eq=False, dict=True):
    """Some keys in some books."""

    books: tuple[Book, ...]
    layouts: tuple[str, ...]
    """Those of all books, in order."""
    groups: tuple[Group, ...]
    """Names of tensors."""
    found: tuple[tuple[Words, ...], ...]
    """For each group what each book says of it that speaks of its part of the model."""
    modules: tuple[tuple[Group, tuple[Words, ...]], ...]
    """Modules that an adapter names, where books list parameters of theirs: rules are those that move these."""
    own: tuple[Book, ...]
    """The user's own among the books."""

    @staticmethod
    def of(
        books: Sequence[Book],
        groups: Sequence[Group],
        scopes: Mapping[str, Scope] | None = None,
        modules: Sequence[Group] = (),
        known: Lookup | None = None,
    ) -> Lookup:
        """Look keys up; where no scopes are given, every book speaks of the whole model.

        What ``known`` says of the same groups in the same books is not looked up again.
        """
        said = {} if known is None else known.said
        layouts = tuple(dict.fromkeys(name for book in books for name in (book.left, book.right)))
        own = {id(book) for book in own_books()}
        parts = [(book, (scopes or {}).get(book.name, Scope())) for book in books]
        found = tuple(
            tuple(
                said.get((id(book), id(group))) or _words(book, group)
                for book, scope in parts
                if scope.admits(group.template)
            )
            for group in groups
        )
        named = tuple(
            (
                group,
                tuple(
                    Words(book, (), rules, tuple(rules))
                    for book, scope in parts
                    if scope.admits(group.template) and (rules := book.moving_parameters(group))
                ),
            )
            for group in modules
        )
        mine = tuple(book for book in books if id(book) in own)
        return Lookup(tuple(books), layouts, tuple(groups), found, named, mine)

    @property
    def said(self) -> dict[tuple[int, int], Words]:
        """What was found, by the ids of book and group."""
        return {
            (id(words.book), id(group)): words
            for group, found in zip(self.groups, self.found, strict=True)
            for words in found
        }

    @cached_property
    def unexplained(self) -> tuple[Group, ...]:
        """The parts of groups that no book has a word for, bounds aside."""
        left = []
        for group, found in zip(self.groups, self.found, strict=True):
            rows = [match.rows for words in found for _, match in words.keys]
            if any(len(some) == len(group.ids) for some in rows):
                continue
            free = np.ones(group.ids.shape, dtype=bool)
            for some in rows:
                free[some] = False
            if free.any():
                left.append(group if free.all() else group.take(free))
        return tuple(left)

    @property
    def without_parameters(self) -> Lookup:
        """The same without weights of modules of which a book lists the parameters: these have no weight."""
        # The first groups are the weights of the modules, in order.
        gone = {row for row, (_, owned) in enumerate(self.modules) if owned}
        if not gone:
            return self
        rows = [row for row in range(len(self.groups)) if row not in gone]
        groups = tuple(self.groups[row] for row in rows)
        found = tuple(self.found[row] for row in rows)
        return Lookup(self.books, self.layouts, groups, found, (), self.own)

    @property
    def unknown_modules(self) -> list[Group]:
        """The weights of modules of which no book has a word, neither for them nor for their parameters.

        The first groups are the weights of the modules, in order.
        """
        weights = zip(self.groups, self.found, self.modules, strict=False)
        return [
            group
            for group, found, (_, owned) in weights
            if not owned and not any(words.layouts for words in found)
        ]

    def knows_parameters(self, module: Group) -> bool:
        """Whether a book lists parameters of some modules: stacked experts have no weight."""
        heads = (table.module for book in self.books for table in book.parameters)
        return any(match_group(head, module) is not None for head in heads)


def _words(book: Book, group: Group) -> Words:
    found = tuple(book.words.matching(group))
    rules: dict[str, tuple[str, ...]] = {}
    for layout in (book.left, book.right):
        names = tuple(word.rule for word, _ in found if word.layout == layout and word.rule)
        if names:
            rules[layout] = names
    whole = any(word.rule is None for word, _ in found)
    layouts = (book.left, book.right) if whole else tuple(rules)
    return Words(book, tuple((word.key, match) for word, match in found), rules, layouts)
