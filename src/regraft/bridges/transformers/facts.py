"""What transformers 4 wrote, where no registry and no rule tells it: ``v4_files.toml``."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from typing import Any


def module_name(classes: Sequence[str], old: str) -> str:
    """A file's old key as the modules had it, for a model by its class and that class's bases."""
    return _first(_pairs("renamed"), classes, old)


def file_name(classes: Sequence[str], old: str) -> str:
    """A key's old spelling as transformers 4 wrote it, for a model by its class and that class's bases."""
    return _first(_pairs("written"), classes, old)


def unwritten(entry: str, source: str, key: str) -> bool:
    """Whether transformers 4 never wrote the name that an entry's renaming reads, for a key of the model."""
    return any(
        source == pattern and key.startswith(below)
        for pattern, below in _unwritten().get(entry, ())
    )


def shared_places(classes: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The modules of a class in transformers 4 that stood in two places: both paths."""
    return next((found for n in classes if (found := _shared().get(n))), ())


@lru_cache(maxsize=1)
def _shared() -> dict[str, tuple[tuple[str, str], ...]]:
    return {
        name: tuple((first, second) for first, second in table["places"])
        for table in _facts()["shared"]
        for name in table["classes"]
    }


@lru_cache(maxsize=1)
def _facts() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("v4_files.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _first(
    table: dict[str, list[tuple[re.Pattern[str], str]]], classes: Sequence[str], old: str
) -> str:
    patterns = next((p for n in classes if (p := table.get(n))), ())
    for pattern, new in patterns:
        if pattern.search(old):
            return pattern.sub(new, old)
    return old


@lru_cache(maxsize=2)
def _pairs(kind: str) -> dict[str, list[tuple[re.Pattern[str], str]]]:
    return {
        name: [(re.compile(pattern), new) for pattern, new in table["patterns"]]
        for table in _facts()[kind]
        for name in table["classes"]
    }


@lru_cache(maxsize=1)
def _unwritten() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for table in _facts()["unwritten"]:
        for entry in table["entries"]:
            pairs = found.setdefault(entry, [])
            pairs += [(pattern, table.get("below", "")) for pattern in table["patterns"]]
    return found


def unused(classes: Sequence[str], old: str) -> bool:
    """Whether a model's class had a tensor in transformers 4 that it never computed with, and has it no longer."""
    patterns = next((p for n in classes if (p := _unused().get(n))), ())
    return any(re.search(pattern, old) for pattern in patterns)


@lru_cache(maxsize=1)
def _unused() -> dict[str, list[str]]:
    return {name: table["patterns"] for table in _facts()["unused"] for name in table["classes"]}
