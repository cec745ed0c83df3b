"""What names tell of layouts: one detector for adapters, checkpoints and live models, for any number of layouts.

A rule speaks of some keys in one layout and of others in another. So a key that only one of its sides has tells a
layout, and rules out the other; a key that no book explains in a layout rules that one out, too. What is left is what
all keys may be of.

A layout is a property of each part: the keys of one rule below one prefix are of one layout, and two rules may be of
two (a model in memory whose parts were renamed by different releases). Such a file is *mixed*: each part moves by
itself. The keys of one rule in two layouts are an error, because there a tensor would stand twice, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from msgspec import Struct

from regraft.equation.notation import Key
from regraft.errors import BadInputError, Finding
from regraft.names.keys import Group
from regraft.planning.model import Scope
from regraft.rules.book import Book
from regraft.rules.direction import SIDES, Side
from regraft.rules.templates import match_group


class Told(Struct, frozen=True):
    """What names tell."""

    possible: tuple[str, ...]
    """The layouts that all keys may be of, those of the first books first; empty where parts are of several."""
    evidence: Mapping[str, str]
    """For layouts that keys tell, one such key."""

    @property
    def layout(self) -> str | None:
        """The layout, where there is only one that fits and a key tells it."""
        only = len(self.possible) == 1 and self.possible[0] in self.evidence
        return self.possible[0] if only else None

    @property
    def mixed(self) -> tuple[str, ...]:
        """The layouts that parts are of, where they are of several."""
        return () if self.possible else tuple(self.evidence)


def detect_layouts(
    books: Sequence[Book],
    tensors: Sequence[Group],
    where: str,
    *,
    modules: Sequence[Group] = (),
    scopes: Mapping[str, Scope] | None = None,
) -> Told:
    """The layouts that names may be of; ``modules`` are those that an adapter names, whose parameters books list.

    Raises ``BadInputError`` where keys of one rule are of two layouts.
    """
    admits = _admission(scopes)
    spoken = [_spoken(book, tensors, admits) for book in books]
    ruled_out: set[str] = set()
    evidence: dict[str, str] = {}
    by_rule: dict[tuple[str, str, str], dict[str, str]] = {}
    for book, of_tensors in zip(books, spoken, strict=True):
        for group, hits in (*of_tensors, *_spoken_modules(book, modules, admits)):
            if len(hits) != 1:
                continue
            ((side, rules),) = hits.items()
            other = book.right if side == "left" else book.left
            layout, key = book.layout(side), group.name(0).removesuffix(".weight")
            ruled_out.add(other)
            evidence.setdefault(layout, key)
            for rule in rules:
                by_rule.setdefault((book.name, rule, _above(group)), {}).setdefault(layout, key)
    layouts = tuple(dict.fromkeys(name for book in books for name in book.layouts))
    if len(layouts) > 2:
        ruled_out |= _unexplained(books, spoken, layouts)
        ruled_out |= _without_parameters(books, layouts, modules, admits)
    possible = tuple(name for name in layouts if name not in ruled_out)
    told = {name: key for name, key in evidence.items() if not possible or name in possible}
    if not possible:
        for found in by_rule.values():
            if len(found) > 1:
                raise mixed_layouts(found, where)
    return Told(possible, told)


def telling(books: Sequence[Book], groups: Sequence[Group]) -> tuple[Book, ...]:
    """The books that may tell a layout: of those for another tool's names only the ones whose own names are there.

    All of them where nothing else is left.
    """
    found = tuple(b for b in books if b.tells == "both" or names_tell(b, groups))
    return found or tuple(books)


def names_tell(book: Book, groups: Sequence[Group]) -> bool:
    """Whether names are among those that only the telling side of a book has."""
    mine, other = SIDES if book.tells == "left" else SIDES[::-1]
    return any(
        book.terms(mine).matches(group) and not book.terms(other).matches(group) for group in groups
    )


def mixed_layouts(found: Mapping[str, str], where: str) -> BadInputError:
    """The error for keys of two layouts that stand together."""
    (one, key), (other, rival) = sorted(found.items())[:2]
    return BadInputError(
        Finding(
            "mixed-layouts",
            f"this key is of {other}, but {key} is of {one}: old and new keys stand together",
            where=where,
            key=rival,
            fix="keep the keys of one layout and remove the others",
        )
    )


_Admits = Callable[[Book, Group], bool]


def _admission(scopes: Mapping[str, Scope] | None) -> _Admits:
    if scopes is None:
        return lambda book, group: True
    return lambda book, group: scopes.get(book.name, Scope()).admits(group.template)


_Spoken = list[tuple[Group, dict[Side, list[str]]]]
"""Groups of keys with the sides of a book that have rules for them, and these rules' names."""


def _spoken(book: Book, groups: Sequence[Group], admits: _Admits) -> _Spoken:
    """What a book's rules say of tensors."""
    return [
        (group, {side: rules for side in SIDES if (rules := _rules_of(book, side, group))})
        for group in groups
        if admits(book, group)
    ]


def _rules_of(book: Book, side: Side, group: Group) -> list[str]:
    """The names of the rules that speak of a group on one side."""
    return [term.rule.name for term, _ in book.terms(side).matching(group)]


def _spoken_modules(book: Book, groups: Sequence[Group], admits: _Admits) -> _Spoken:
    """What a book says of modules that have parameters of their own."""
    if not groups or not book.parameters:
        return []
    tables: dict[Side, list[tuple[Key, str]]] = {
        side: [
            (p.module, _rule_within(_terms(book, side), p.module))
            for p in book.parameters
            if side in p.sides
        ]
        for side in SIDES
    }
    return _hits(tables, book, groups, admits)


def _terms(book: Book, side: Side) -> Iterator[tuple[Key, str]]:
    """The keys of one side's rules, with the rules' names."""
    for rule in book.rules:
        for term in rule.equation.left if side == "left" else rule.equation.right:
            if term.key is not None:
                yield term.key, rule.name


def _hits(
    known: Mapping[Side, Sequence[tuple[Key, str]]],
    book: Book,
    groups: Sequence[Group],
    admits: _Admits,
) -> _Spoken:
    found: _Spoken = []
    for group in groups:
        if admits(book, group):
            hits = {
                side: [rule for key, rule in each if match_group(key, group) is not None]
                for side, each in known.items()
            }
            found.append((group, {side: rules for side, rules in hits.items() if rules}))
    return found


def _rule_within(terms: Iterable[tuple[Key, str]], module: Key) -> str:
    """The rule that moves a parameter of a module."""
    inside = (rule for key, rule in terms if str(key).startswith(f"{module}."))
    return next(inside, str(module))


def _above(group: Group) -> str:
    """What tells one copy of a part from another: the first segment of its keys."""
    return group.template.partition(".")[0]


def _unexplained(
    books: Sequence[Book], spoken: Sequence[_Spoken], layouts: Sequence[str]
) -> set[str]:
    """Layouts in which no book explains a key that one explains in another."""
    explained: dict[int, set[str]] = {}  # by the group's identity: two may have one template
    ruled: set[int] = set()
    for book, of_tensors in zip(books, spoken, strict=True):
        for group, hits in of_tensors:
            mine = explained.setdefault(id(group), set())
            mine.update(book.layout(side) for side in hits)
            ruled |= {id(group)} if hits else set()
            if not mine.issuperset(book.layouts) and book.carried.matches(group):
                mine.update(book.layouts)
    return {name for each in ruled for name in layouts if name not in explained[each]}


def _without_parameters(
    books: Sequence[Book], layouts: Sequence[str], modules: Sequence[Group], admits: _Admits
) -> set[str]:
    """Layouts in which a module that has parameters of its own in another is neither such a one nor has a weight."""
    found: set[str] = set()
    for group in modules:
        weight = Group(f"{group.template}.weight", group.ids, group.numbers)
        having = {
            book.layout(side)
            for book in books
            if admits(book, group)
            for table in book.parameters
            if match_group(table.module, group) is not None
            for side in table.sides
        }
        if having:
            found |= set(layouts) - having - _explaining(books, weight, admits)
    return found


def _explaining(books: Sequence[Book], group: Group, admits: _Admits) -> set[str]:
    """The layouts in which a book has a rule or a carry-over for a key."""
    explained: set[str] = set()
    for book in books:
        if not admits(book, group):
            continue
        if book.carried.matches(group):
            explained.update(book.layouts)
        explained.update(book.layout(side) for side in SIDES if book.terms(side).matches(group))
    return explained


__all__ = ["Told", "detect_layouts", "mixed_layouts", "names_tell", "telling"]
