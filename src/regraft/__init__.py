"""regraft moves model checkpoints and adapters between weight layouts, exactly, and says so when it can't."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.errors import (
    AmbiguousError,
    BadInputError,
    Finding,
    NotEqualError,
    RefusedError,
    RegraftError,
    UnmatchedKeysError,
)

if TYPE_CHECKING:
    from regraft.adapters.inspect import inspect
    from regraft.api import convert
    from regraft.report import Report

__version__ = "0.1.0.dev0"

__all__ = [
    "AmbiguousError",
    "BadInputError",
    "Finding",
    "NotEqualError",
    "RefusedError",
    "RegraftError",
    "Report",
    "UnmatchedKeysError",
    "convert",
    "inspect",
]


_LAZY = {
    "convert": "regraft.api",
    "inspect": "regraft.adapters.inspect",
    "Report": "regraft.report",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'regraft' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
