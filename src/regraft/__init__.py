"""regraft moves model checkpoints and adapters between weight layouts, exactly, and says so when it can't."""

from __future__ import annotations

from regraft.errors import (
    AmbiguousError,
    BadInputError,
    Finding,
    RefusedError,
    RegraftError,
    UnmatchedKeysError,
)

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
]


def __getattr__(name: str) -> object:
    if name == "convert":
        from regraft.api import convert

        return convert
    if name == "Report":
        from regraft.report import Report

        return Report
    raise AttributeError(f"module 'regraft' has no attribute {name!r}")
