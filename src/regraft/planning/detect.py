"""What names tell of layouts: one detector for adapters, checkpoints and live models, for any number of layouts.

A rule speaks of some keys in one layout and of others in another. So a key that only one of its sides has tells a
layout, and rules out the other; a key that no book explains in a layout rules that one out, too. What is left is what
all keys may be of.

A layout is a property of each part: the keys of one rule below one prefix are of one layout, and two rules may be of
two (a model in memory whose parts were renamed by different releases). Such a file is *mixed*: each part moves by
itself. The keys of one rule in two layouts are an error, because there a tensor would stand twice, or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from regraft.errors import BadInputError, Finding
from regraft.names.keys import Group
from regraft.planning.lookup import Lookup
from regraft.rules.book import Book
from regraft.rules.direction import SIDES


class Layouts(Struct, frozen=True):
    """What names tell of the layouts that they may be of."""

    possible: tuple[str, ...]
    """The layouts that all keys may be of, those of the first books first; empty where parts are of several."""
    evidence: Mapping[str, str]
    """For layouts that keys tell, one such key."""
    layout: str | None
    """The layout, where there is only one that fits and a key tells it."""
    mixed: tuple[str, ...] = ()
    """The layouts that parts are of, where they are of several."""
    clash: Mapping[str, str] = {}
    """For the layouts of one rule's keys one such key, where they are of several: that is an error."""

    def checked(self, where: str) -> Layouts:
        """The same. Raises ``BadInputError`` where keys of one rule are of two layouts."""
        if self.clash:
            raise mixed_layouts(self.clash, where)
        return self


def detect_layouts(lookup: Lookup) -> Layouts:
    """The layouts that names may be of."""
    layouts = lookup.layouts
    ruled_out: set[str] = set()
    evidence: dict[str, Group] = {}
    by_rule: dict[tuple[str, str, str], dict[str, Group]] = {}
    everything = [*zip(lookup.groups, lookup.found, strict=True), *lookup.modules]
    # By books: the first one's evidence counts.
    for book in lookup.books:
        for group, found in everything:
            words = next((each for each in found if each.book is book), None)
            if words is None or len(words.rules) != 1:
                continue
            ((layout, rules),) = words.rules.items()
            ruled_out.add(book.right if layout == book.left else book.left)
            evidence.setdefault(layout, group)
            for rule in rules:
                by_rule.setdefault((book.name, rule, _above(group)), {}).setdefault(layout, group)
    if len(layouts) > 2:
        ruled_out |= _unexplained(lookup)
        ruled_out |= _without_parameters(lookup)
    possible = tuple(name for name in layouts if name not in ruled_out)
    told = _shown({name: g for name, g in evidence.items() if not possible or name in possible})
    if possible:
        only = possible[0] if len(possible) == 1 and possible[0] in told else None
        return Layouts(possible, told, only)
    clash = next((groups for groups in by_rule.values() if len(groups) > 1), {})
    return Layouts((), told, None, tuple(told), _shown(clash))


def _shown(groups: Mapping[str, Group]) -> dict[str, str]:
    """For each layout a key that tells it, as messages show it."""
    return {layout: group.name(0).removesuffix(".weight") for layout, group in groups.items()}


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


def _above(group: Group) -> str:
    """What tells one copy of a part from another: the first segment of its keys."""
    return group.template.partition(".")[0]


def _unexplained(lookup: Lookup) -> set[str]:
    """Layouts in which no book explains a key that one explains in another."""
    missing: set[str] = set()
    for found in lookup.found:
        if any(words.rules for words in found):
            missing.update(set(lookup.layouts).difference(*(words.layouts for words in found)))
    return missing


def _without_parameters(lookup: Lookup) -> set[str]:
    """Layouts in which a module that has parameters of its own in another is neither such a one nor has a weight."""
    missing: set[str] = set()
    # The first groups are the weights of the modules, in order.
    for (_, owned), found in zip(lookup.modules, lookup.found, strict=False):
        if owned:
            known = (words.layouts for words in (*owned, *found))
            missing |= set(lookup.layouts).difference(*known)
    return missing


__all__ = ["Layouts", "detect_layouts", "mixed_layouts", "names_tell", "telling"]
