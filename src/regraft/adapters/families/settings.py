"""Settings that differ from module to module: patterns over module paths, as PEFT matches them.

Source: PEFT 0.18.1 and 0.21.2, ``peft/utils/other.py`` (``get_pattern_key``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regraft.storage.expressions import expression


class Patterns:
    """``rank_pattern`` or ``alpha_pattern``: the first entry whose expression fits the end of a module's path.

    The order is the file's: PEFT sorts the keys when it saves a config, but not when it reads one.
    """

    def __init__(self, patterns: Mapping[str, Any] | None, field: str) -> None:
        self.entries = list((patterns or {}).items())
        self._compiled = [
            (expression(self._whole(key), field), value) for key, value in self.entries
        ]

    @staticmethod
    def _whole(key: str) -> str:
        return whole_path(key)

    def __bool__(self) -> bool:
        return bool(self.entries)

    def find(self, path: str) -> Any | None:
        """The value for a module's path, ``None`` where no entry fits.

        >>> Patterns({"layers.0.*q_proj": 4}, "rank_pattern").find("model.layers.0.self_attn.q_proj")
        4
        """
        for pattern, value in self._compiled:
            if pattern.match(path):
                return value
        return None


class Anchored(Patterns):
    """Patterns of FourierFT and C3A: what they match stands behind a dot, or an entry is a module's whole path."""

    @staticmethod
    def _whole(key: str) -> str:
        return rf".*\.{key}$"

    def find(self, path: str) -> Any | None:
        """The value for a module's path, ``None`` where no entry fits."""
        found = super().find(path)
        return dict(self.entries).get(path) if found is None else found


def whole_path(key: str) -> str:
    """The expression for a module's path, from one for its end."""
    return rf"(.*\.)?({key})$"
