"""regraft moves model checkpoints and adapters between weight layouts, exactly, and says so when it can't."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.errors import (
    AmbiguousError,
    BadInputError,
    Finding,
    RefusedError,
    RegraftError,
    UnmatchedKeysError,
)

if TYPE_CHECKING:
    from regraft.adapters.inspect import inspect
    from regraft.api import convert
    from regraft.report import Report
    from regraft.rules.book import load_book, only_books
    from regraft.why.diff import diff
    from regraft.why.explain import explain

__version__ = "0.1.0.dev0"

__all__ = [
    "AmbiguousError",
    "BadInputError",
    "Finding",
    "RefusedError",
    "RegraftError",
    "Report",
    "UnmatchedKeysError",
    "convert",
    "diff",
    "explain",
    "inspect",
    "load_book",
    "only_books",
]


_LAZY = {
    "convert": "regraft.api",
    "inspect": "regraft.adapters.inspect",
    "Report": "regraft.report",
    "diff": "regraft.why.diff",
    "explain": "regraft.why.explain",
    "load_book": "regraft.rules.book",
    "only_books": "regraft.rules.book",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'regraft' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
