"""Looking modules up: every name in a file is one of the names that a family's rule book has, or it is an error.

A flat name (``double_blocks_0_img_attn_qkv``) does not tell which of its underscores were dots. Against the list of
all modules there is one answer, so nothing is ever parsed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from regraft.dialects.image.families import BODIES, Family
from regraft.equation.notation import Hole, Key, Segments
from regraft.rules.book import Book, library

_NUMBER = re.compile(r"[0-9]+")
_MARK = "#"


@dataclass(frozen=True, slots=True)
class Module:
    """A module that was found: the layout, the path, and the key and kind of its weight."""

    layout: str
    path: str
    key: str
    kind: str
    other_name: bool = False
    """Whether it was found by a name that only one tool has for it."""


@dataclass(frozen=True, slots=True)
class _Template:
    """A module's name with its indices left open."""

    parts: tuple[str | None, ...]
    """Text, and ``None`` for an index."""
    ending: str
    """What follows the module in the key of its weight."""
    kind: str

    @property
    def shown(self) -> str:
        """The path with braces for its indices."""
        return "".join("{}" if part is None else part for part in self.parts)

    def pattern(self, *, flat: bool) -> re.Pattern[str]:
        """What its names look like."""
        texts = (
            r"([0-9]+)" if part is None else re.escape(part.replace(".", "_") if flat else part)
            for part in self.parts
        )
        return re.compile("".join(texts))

    def fill(self, numbers: Sequence[str]) -> str:
        """The path with some indices."""
        left = iter(numbers)
        return "".join(next(left) if part is None else part for part in self.parts)


def _with_numbers(template: _Template) -> Iterator[_Template]:
    """A template, and those with a digit in the place of its last index: a tool may have a name for one of them."""
    yield template
    before, mark, after = template.shown.rpartition("{}")
    for digit in range(10) if mark else ():
        yield _Template(tuple(_cut(f"{before}{digit}{after}")), template.ending, template.kind)


class Names:
    """The modules of one layout, found by dotted or by flat names."""

    def __init__(
        self,
        layout: str,
        templates: Sequence[_Template],
        alias: Callable[[str], str] | None = None,
    ) -> None:
        self.layout = layout
        self.dotted: list[tuple[_Template, _Template]] = []
        """Every dotted name, and the module that it stands for."""
        self._index: dict[tuple[bool, str], list[tuple[re.Pattern[str], _Template]]] = {}
        for template in templates:
            for flat in (False, True):
                self._add(template, template, flat=flat)
        if alias is None:
            return
        for template in (each for general in templates for each in _with_numbers(general)):
            parts = tuple(_cut(alias(template.shown)))
            if parts != template.parts:
                self._add(_Template(parts, template.ending, template.kind), template, flat=False)

    def _add(self, spelled: _Template, meant: _Template, *, flat: bool) -> None:
        shown = spelled.shown.replace("{}", "0")
        name = shown.replace(".", "_") if flat else shown
        found = self._index.setdefault((flat, _NUMBER.sub(_MARK, name)), [])
        if all(meant != other for _, other in found):
            self.dotted += [] if flat else [(spelled, meant)]
            found.append((spelled.pattern(flat=flat), meant))

    def spellings(self, *, flat: bool) -> list[str]:
        """Names of all modules, with 0 for every index."""
        found = [name.replace(_MARK, "0") for is_flat, name in self._index if is_flat == flat]
        return list(dict.fromkeys(found))

    def find(self, name: str, *, flat: bool) -> Module | None:
        """The module that a name stands for."""
        fits = []
        for pattern, template in self._index.get((flat, _NUMBER.sub(_MARK, name)), ()):
            found = pattern.fullmatch(name)
            if found is not None:
                path = template.fill(found.groups())
                plain = path == name or (flat and path.replace(".", "_") == name)
                module = Module(self.layout, path, path + template.ending, template.kind, not plain)
                fits.append((len(found.groups()), module))
        return min(fits, key=lambda pair: pair[0])[1] if fits else None


def book_of(family: Family) -> Book | None:
    """The rule book of a family; ``None`` where there is none (all tools name its modules alike)."""
    return next((book for book in library() if book.name == family.book), None)


def names_of(family: Family, layout: str) -> Names | None:
    """The modules of a family's denoiser in a layout; ``None`` where nothing is known of it."""
    book = book_of(family)
    if book is None or layout not in (book.left, book.right):
        if family.modules and layout == "diffusers":
            return _plain_names(family.modules, family.convolutions)
        return None
    place = (id(book), layout)
    known = _KNOWN.get(place)
    if known is None or known[0] is not book:
        known = _KNOWN[place] = book, _book_names(book, layout, family)
    return known[1]


_KNOWN: dict[tuple[int, str], tuple[Book, Names]] = {}
"""The modules by book and layout; a book is large, and to compare two takes longer than to read one."""


def _book_names(book: Book, layout: str, family: Family) -> Names:
    left = book.left == layout
    templates = []
    for rule in book.rules:
        terms = rule.equation.left if left else rule.equation.right
        kinds = rule.left_kinds if left else rule.right_kinds
        templates += [
            _of_key(term.key, kind) for term, kind in zip(terms, kinds, strict=True) if term.key
        ]
    for carry in book.carries:
        if carry.term.key is not None:
            templates.append(_of_key(carry.term.key, carry.kind))
    found = [t for t in templates if t is not None]
    if family.comfy_names and layout == family.native:
        return Names(layout, found, family.of_comfy)
    return Names(layout, found)


def _of_key(key: Key, kind: str) -> _Template | None:
    """A module from the key of its weight; ``None`` for biases, and for keys that do not spell the whole path."""
    if any(isinstance(part, Segments) for part in key.parts):
        return None
    parts = [None if isinstance(part, Hole) else str(part) for part in key.parts]
    last = parts[-1] or ""
    for ending in (".weight", ".scale"):
        if last.endswith(ending):
            parts[-1] = last.removesuffix(ending)
            return _Template(tuple(p for p in parts if p != ""), ending, kind)
    if last.endswith(".bias"):
        return None
    return _Template(tuple(parts), "", kind)


@lru_cache(maxsize=64)
def _plain_names(modules: tuple[str, ...], convolutions: tuple[str, ...] = ()) -> Names:
    kinds = {**dict.fromkeys(modules, "linear"), **dict.fromkeys(convolutions, "conv")}
    templates = [_Template(tuple(_cut(m)), ".weight", kind) for m, kind in kinds.items()]
    return Names("diffusers", templates)


def _cut(path: str) -> Iterator[str | None]:
    texts = path.split("{}")
    for number, text in enumerate(texts):
        if number:
            yield None
        if text:
            yield text


def body_names(body: str) -> Names:
    """The modules of a kind of text encoder."""
    return _plain_names(BODIES[body])
