"""What commands find: one value each, of which the terminal, JSON, pages and notebooks are forms."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from msgspec import to_builtins

from regraft.errors.codes import Status

_RENDERER = "regraft.cli.shown"
"""Loaded only when something is printed: the library does not need the command line."""


class Shown:
    """A result: ``print(result)`` is what the command prints, and a notebook shows the same.

    What is decided of it (a verdict, a count, the exit status) is decided here, in its fields and properties. Which
    functions put it into words and on a page, `regraft.cli.forms` says; they decide nothing.
    """

    __slots__ = ()

    @property
    def status(self) -> Status:
        """The exit status of the command that found it."""
        return Status.DONE

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        data: dict[str, Any] = to_builtins(self)
        return data

    def __str__(self) -> str:
        text: str = import_module(_RENDERER).text_of(self)
        return text

    def __repr__(self) -> str:
        first = str(self).strip().partition("\n")[0]
        return f"<{type(self).__name__}: {first}>"

    def _repr_html_(self) -> str:
        html: str = import_module(_RENDERER).html_of(self)
        return html
