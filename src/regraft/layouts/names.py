"""Names of layouts, as ``to`` and ``source`` take them.

    NAME[/VERSION]              a layout, or a dialect in its usual layout
    LAYOUT:DIALECT[/VERSION]    both
    FAMILY                      of a source only: a model type, where the layout is to be found out
    NAME,LAYOUT                 of a source only: over which layout to go, where several ways are as short

What layouts there are, rule books say; what dialects there are, says who calls.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from regraft.errors import BadInputError, Finding
from regraft.rules.book import Book, built_in, library

DEFAULT = "peft"
"""The dialect that is meant where none is named."""


class DialectName(Protocol):
    """What a dialect is called, and which releases of its tool write adapters differently."""

    @property
    def name(self) -> str:
        """As it stands in the name of a layout."""

    @property
    def title(self) -> str:
        """In words, with the names of its tools."""

    @property
    def versions(self) -> tuple[str, ...]:
        """As they stand after the slash, the oldest first."""

    @property
    def layout(self) -> str | None:
        """The layout that its adapters usually are in; ``None`` where books say it for each version, or none does."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout of the base, and how adapters of it are written (``None``: as usual there)."""

    name: str
    packing: str | None = None
    """The dialect's version."""
    dialect: str | None = None
    """``None`` where none is named: PEFT is meant."""
    usual: bool = field(default=False, compare=False)
    """Whether the layout is the usual one of the dialect, because only the dialect was named."""

    @property
    def usual_packing(self) -> str:
        """The version that adapters of this layout are written in unless something else is said."""
        return self.packing or adapters_in(self.name)

    def __str__(self) -> str:
        plain = self.dialect in (None, DEFAULT, self.name)
        text = self.name if plain else f"{self.name}:{self.dialect}"
        return text if self.packing is None else f"{text}/{self.packing}"


def known_layouts() -> dict[str, tuple[Book, ...]]:
    """The layouts that rule books lead to, each with its books; those of most books first."""
    found: dict[str, list[Book]] = {}
    for book in library():
        for name in (book.left, book.right):
            found.setdefault(name, []).append(book)
    order = sorted(found, key=lambda name: -len(found[name]))
    return {name: tuple(found[name]) for name in order}


def joined_to(layout: str, books: Iterable[Book] = ()) -> tuple[str, ...]:
    """The layouts that one of some books leads to from a layout; by all books where none of these knows it.

    >>> joined_to("transformers-v4")
    ('transformers-v5', 'gguf', ...)
    """
    for known in (books, library()):
        ends = [b.right if b.left == layout else b.left for b in known if layout in b.layouts]
        if ends:
            return tuple(dict.fromkeys(ends))
    return ()


def families() -> tuple[str, ...]:
    """The model types that rule books know."""
    return tuple(sorted({name for book in library() for name in book.model_types}))


def adapters_in(layout: str) -> str:
    """The version that adapters of a layout usually are written in, as books say; the newest one where none does.

    >>> adapters_in("transformers-v4"), adapters_in("somebody's own")
    ('peft-0.18', 'peft-0.19')
    """
    said = next((version for name, version in _versions() if name == layout), None)
    return said or max(version for _, version in _versions())


def layout_of_packing(version: str) -> str | None:
    """The layout whose adapters usually are written in a version; ``None`` where no book says it.

    >>> layout_of_packing("peft-0.18")
    'transformers-v4'
    """
    return next((name for name, each in _versions() if each == version), None)


def _versions() -> Iterator[tuple[str, str]]:
    """The layouts of which books say how adapters usually are written, each with the version."""
    for book in (*library(), *built_in()):
        if book.left_adapters:
            yield book.left, book.left_adapters
        if book.right_adapters:
            yield book.right, book.right_adapters


def parse_name(text: str, dialects: Mapping[str, DialectName], *, adapter: bool = True) -> Layout:
    """A layout from its name.

    A bare name is a dialect's, if there is one and an adapter is meant; otherwise a layout's.

    >>> from types import SimpleNamespace
    >>> peft = {"peft": SimpleNamespace(name="peft", versions=("peft-0.18", "peft-0.19"), layout=None)}
    >>> parse_name("transformers-v5", peft), str(parse_name("transformers-v4:peft/0.19", peft))
    (Layout(name='transformers-v5', packing=None, dialect=None, usual=False), 'transformers-v4/peft-0.19')
    >>> parse_name("peft/0.18", peft).name
    'transformers-v4'

    Raises ``BadInputError`` for an unknown name, with those that are spelled nearly like it.
    """
    known = known_layouts()
    if text in known and not (adapter and text in dialects):
        return Layout(text)
    head, _, version = text.partition("/")
    layout, colon, dialect = head.rpartition(":") if head not in known else ("", "", head)
    spoken = dialects.get(dialect)
    if not colon and (spoken is None or (not adapter and head in known)):
        if head not in known:
            raise _unknown(text, head, [*known, *dialects], dialects)
        return Layout(head, version_of(text, version, dialects.get(DEFAULT)) if version else None)
    if spoken is None:
        raise _unknown(text, dialect, dialects, dialects)
    written = version_of(text, version, spoken)
    if colon and layout not in known:
        raise _unknown(text, layout, known)
    name = layout or _usual_layout(text, spoken, written)
    return Layout(name, written, dialect, usual=not colon)


def version_of(text: str, version: str, dialect: DialectName | None) -> str | None:
    """The version as the dialect spells it: ``0.18`` and ``peft-0.18`` are one.

    Raises ``BadInputError`` where the dialect has none of that name.
    """
    if not version:
        return None
    versions = dialect.versions if dialect is not None else ()
    for each in versions:
        if dialect is not None and version in (each, each.removeprefix(f"{dialect.name}-")):
            return each
    raise _unknown(text, version, versions)


def _usual_layout(text: str, dialect: DialectName, version: str | None) -> str:
    if dialect.layout is not None:
        return dialect.layout
    for each in (version,) if version else dialect.versions[::-1]:
        found = layout_of_packing(each)
        if found is not None:
            return found
    raise BadInputError(
        Finding(
            "unknown-layout",
            f"{text!r} is a dialect, and nothing says which layout the base has in it",
            fix=f"say LAYOUT:{dialect.name}, with one of: {', '.join(known_layouts())}",
        )
    )


def _unknown(
    text: str,
    part: str,
    known: Collection[str],
    titles: Mapping[str, DialectName] | None = None,
) -> BadInputError:
    names = list(dict.fromkeys(known))
    near = _nearest(part, names, titles or {})
    what = f"there is no {part!r}" if part == text else f"{text!r}: there is no {part!r}"
    if near is not None:
        return BadInputError(Finding("unknown-layout", what, fix=f"did you mean {near!r}?"))
    message = f"{what}; known: {', '.join(names) or 'none'}"
    return BadInputError(
        Finding("unknown-layout", message, fix="`regraft layouts` lists all names")
    )


def _nearest(name: str, known: Sequence[str], titles: Mapping[str, DialectName]) -> str | None:
    """The name that is meant, by its spelling or by a tool that the dialect's title names."""
    from difflib import get_close_matches  # slow to import, and asked of misspelled names only

    meant = _letters(name)
    for each in known if meant else ():  # a name's last part: v5, 5, transformers5
        whole, last = _letters(each), _letters(each.rpartition("-")[2])
        if meant in (last, last.removeprefix("v"), whole.replace("v", "")):
            return each
    close = get_close_matches(name, known, n=1)
    if close:
        return close[0]
    for each, dialect in titles.items():
        if len(meant) > 2 and meant in _letters(dialect.title):
            return each
    return None


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))
