"""Settings that differ from module to module: patterns over module paths, as PEFT matches them.

Source: PEFT 0.18.1 and 0.21.2, ``peft/utils/other.py`` (``get_pattern_key``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any


class Patterns:
    """``rank_pattern`` or ``alpha_pattern``: the first entry whose expression fits the end of a module's path.

    The order is that of the sorted keys, because PEFT sorts them when it saves a config.
    """

    def __init__(self, patterns: Mapping[str, Any] | None) -> None:
        self.entries = sorted((patterns or {}).items())
        self._compiled = [(_ending(key), value) for key, value in self.entries]

    def __bool__(self) -> bool:
        return bool(self.entries)

    def find(self, path: str) -> Any | None:
        """The value for a module's path, ``None`` where no entry fits.

        >>> Patterns({"layers.0.*q_proj": 4}).find("model.layers.0.self_attn.q_proj")
        4
        """
        for pattern, value in self._compiled:
            if pattern.match(path):
                return value
        return None


class Anchored(Patterns):
    """Patterns of FourierFT and C3A: what they match stands behind a dot, or an entry is a module's whole path."""

    def find(self, path: str) -> Any | None:
        """The value for a module's path, ``None`` where no entry fits."""
        for key, value in self.entries:
            if re.match(rf".*\.{key}$", path):
                return value
        return dict(self.entries).get(path)


@lru_cache(maxsize=65536)
def _ending(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")
