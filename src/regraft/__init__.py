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
    from regraft.api import convert, inspect
    from regraft.live.mapping import mapping
    from regraft.live.state_dict import convert_state_dict
    from regraft.report import Report

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
    "convert_state_dict",
    "inspect",
    "mapping",
]


_LAZY = {
    "convert": "regraft.api",
    "inspect": "regraft.api",
    "Report": "regraft.report",
    "convert_state_dict": "regraft.live.state_dict",
    "mapping": "regraft.live.mapping",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'regraft' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
