"""A page as one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import html
import json
import os
from importlib import resources
from pathlib import Path

import msgspec

import regraft
from regraft.views.model import STATES, Page

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


def write_page(page: Page, file: str | os.PathLike[str]) -> None:
    """Write the page to a file, which appears whole."""
    file = Path(file)
    partial = file.with_name(f".{file.name}.part")
    try:
        partial.write_text(render_page(page), encoding="utf-8", newline="\n", errors="replace")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _read(name: str) -> str:
    folder = resources.files("regraft.views") / "page"
    return (folder / name).read_text(encoding="utf-8")
