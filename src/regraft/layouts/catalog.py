"""All names that ``to`` and ``source`` take, as one list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from regraft.layouts.names import DialectName, adapters_in, known_layouts
from regraft.rules.book import library
from regraft.shown import Shown


@dataclass(frozen=True, slots=True)
class LayoutLine:
    """A layout of a base model."""

    name: str
    adapters: str
    """The dialect and version that its adapters are written in, unless another is asked for."""
    leads_to: list[str]
    """The layouts that one rule book leads to from here."""
    books: list[str]
    """The rule books that know it."""


@dataclass(frozen=True, slots=True)
class DialectLine:
    """A dialect that adapters are written in."""

    name: str
    title: str
    versions: list[str]
    """What may stand after the slash."""


@dataclass(frozen=True, slots=True)
class FamilyLine:
    """A model type, which a source may be named by."""

    name: str
    books: list[str]


@dataclass(frozen=True, slots=True, repr=False)
class Catalog(Shown):
    """The names of layouts, dialects and families."""

    layouts: list[LayoutLine]
    dialects: list[DialectLine]
    families: list[FamilyLine]

    def to_dict(self) -> dict[str, Any]:
        """The catalog as plain data."""
        return asdict(self)


def catalog(dialects: Mapping[str, DialectName]) -> Catalog:
    """Every name, by the rule books in force and the dialects that there are."""
    layouts = []
    for name, books in known_layouts().items():
        ends = dict.fromkeys(b.right if b.left == name else b.left for b in books)
        layouts.append(LayoutLine(name, adapters_in(name), list(ends), [b.name for b in books]))
    types: dict[str, list[str]] = {}
    for book in library():
        for name in book.model_types:
            types.setdefault(name, []).append(book.name)
    return Catalog(
        layouts,
        [DialectLine(d.name, d.title, list(d.versions)) for d in dialects.values()],
        [FamilyLine(name, types[name]) for name in sorted(types)],
    )
