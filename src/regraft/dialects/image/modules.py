"""Looking modules up: every name in a file is one of the names that a family's rule book has, or it is an error.

A flat name (``double_blocks_0_img_attn_qkv``) does not tell which of its underscores were dots. Against the list of
all modules there is one answer, so nothing is ever parsed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
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


@dataclass(frozen=True, slots=True)
class _Template:
    parts: tuple[str | None, ...]
    """Text, and ``None`` for an index."""
    ending: str
    """What follows the module in the key of its weight."""
    kind: str

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


class Names:
    """The modules of one layout, found by dotted or by flat names."""

    def __init__(self, layout: str, templates: Sequence[_Template]) -> None:
        self.layout = layout
        self._index: dict[tuple[bool, str], list[tuple[re.Pattern[str], _Template]]] = {}
        for template in templates:
            shown = "".join("0" if part is None else part for part in template.parts)
            for flat in (False, True):
                name = shown.replace(".", "_") if flat else shown
                found = self._index.setdefault((flat, _NUMBER.sub(_MARK, name)), [])
                if all(template != other for _, other in found):
                    found.append((template.pattern(flat=flat), template))

    def find(self, name: str, *, flat: bool) -> Module | None:
        """The module that a name stands for."""
        fits = []
        for pattern, template in self._index.get((flat, _NUMBER.sub(_MARK, name)), ()):
            found = pattern.fullmatch(name)
            if found is not None:
                path = template.fill(found.groups())
                fits.append(
                    (
                        len(found.groups()),
                        Module(self.layout, path, path + template.ending, template.kind),
                    )
                )
        return min(fits, key=lambda pair: pair[0])[1] if fits else None


def book_of(family: Family) -> Book | None:
    """The rule book of a family; ``None`` where there is none (all tools name its modules alike)."""
    named = [book for book in library() if book.name == family.book]
    return named[0] if named else None


def names_of(family: Family, layout: str) -> Names | None:
    """The modules of a family's denoiser in a layout; ``None`` where nothing is known of it."""
    book = book_of(family)
    if book is None or layout not in (book.left, book.right):
        if family.modules and layout == "diffusers":
            return _plain_names(family.modules)
        return None
    return _book_names(book, layout)


@lru_cache(maxsize=128)
def _book_names(book: Book, layout: str) -> Names:
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
    return Names(layout, [t for t in templates if t is not None])


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
def _plain_names(modules: tuple[str, ...]) -> Names:
    return Names("diffusers", [_Template(tuple(_cut(m)), ".weight", "linear") for m in modules])


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
