"""A page as one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import html
import json
import os
import secrets
import stat
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import msgspec

import regraft
from regraft.errors import BadInputError, Finding
from regraft.storage.beside import write_like
from regraft.storage.probe import open_regular
from regraft.views.model import STATES, Page

_MARK = b'<meta name="generator" content="regraft">'
_HEAD = 1000
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def render_page(page: Page) -> str:
    """The page as HTML.

    Names and messages come from files of unknown origin: they are put into the document as data, and the script
    shows them as text and never as markup.
    """
    plain = msgspec.to_builtins({"page": page, "states": STATES, "version": regraft.__version__})
    parts = {
        "title": html.escape(f"{page.title}: regraft {page.command}"),
        "verdict": html.escape(f"{page.verdict.name}: {page.verdict.value}"),
        "style": _read("page.css"),
        "script": _read("page.js"),
        "data": json.dumps(plain, separators=(",", ":"), allow_nan=False).translate(_ESCAPES),
    }
    text = _read("page.html")
    before, *rest = text.split("{{ ")
    pieces = [before]
    for piece in rest:
        name, after = piece.split(" }}", 1)
        pieces += (parts[name], after)
    return "".join(pieces)


def write_page(page: Page, file: str | os.PathLike[str], sources: Iterable[Path] = ()) -> None:
    """Write the page to a file, which appears whole; it gets no permissions that one of its ``sources`` lacks.

    Raises ``BadInputError`` where something else than a page of regraft's is in its place.
    """
    file = Path(file)
    check_page_place(file)
    text = render_page(page)
    partial = file.with_name(f".{file.name[:100]}.{secrets.token_hex(4)}.part")
    try:
        # A new file, never one that lies there already: a link would lead elsewhere.
        write_like(partial, text, sources)
        check_page_place(file)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def check_page_place(file: Path) -> None:
    """Check that nothing is in a page's place, or an older page of regraft's.

    Raises ``BadInputError``, also for links and for what cannot be read.
    """
    try:
        mode = file.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISREG(mode):
        opened, _ = open_regular(file)
        with opened:
            if _MARK in opened.read(_HEAD):
                return
    raise BadInputError(
        Finding(
            "page-exists",
            "there is something else than a page of regraft's, and it would be lost",
            where=str(file),
            fix="choose another name for the page, or move what is there",
        )
    )


def _read(name: str) -> str:
    folder = resources.files("regraft.views") / "page"
    return (folder / name).read_text(encoding="utf-8")
