"""Results that print as the terminal shows them, and that notebooks show in its colours."""

from __future__ import annotations

from importlib import import_module

_RENDERER = "regraft.cli.shown"
"""Loaded only when something is printed: the library does not need the command line."""


class Shown:
    """A result in words: ``print(result)`` is what the command prints, and a notebook shows the same."""

    __slots__ = ()

    def __str__(self) -> str:
        text: str = import_module(_RENDERER).text_of(self)
        return text

    def __repr__(self) -> str:
        first = str(self).strip().partition("\n")[0]
        return f"<{type(self).__name__}: {first}>"

    def _repr_html_(self) -> str:
        html: str = import_module(_RENDERER).html_of(self)
        return html
