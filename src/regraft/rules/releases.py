"""Which layout models have in which release of a library: ``releases.toml`` says it, and no code does."""

from __future__ import annotations

import tomllib
from functools import lru_cache
from pathlib import Path

_FILE = Path(__file__).with_name("releases.toml")


@lru_cache(maxsize=1)
def _table() -> dict[str, list[tuple[int, str]]]:
    said = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    return {
        library: sorted((int(since), layout) for since, layout in layouts.items())
        for library, layouts in said.items()
    }


def layouts_of(library: str) -> tuple[str, ...]:
    """The layouts that models had in a library, the oldest first.

    >>> layouts_of("transformers")
    ('transformers-v4', 'transformers-v5')
    """
    return tuple(layout for _, layout in _table()[library])


def layout_of(library: str, version: str) -> str:
    """The layout that models have in a release of a library.

    >>> layout_of("transformers", "4.57.6"), layout_of("transformers", "5.23.0.dev0")
    ('transformers-v4', 'transformers-v5')
    """
    major = int(version.partition(".")[0])
    return [layout for since, layout in _table()[library] if since <= major][-1]


__all__ = ["layout_of", "layouts_of"]
