"""The release of transformers that is installed, without importing it."""

from __future__ import annotations

from importlib.metadata import version

from regraft.rules.releases import layout_of


def installed_layout() -> str:
    """The layout that models have in it."""
    return layout_of("transformers", version("transformers"))
