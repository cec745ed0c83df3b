"""Families of which only names are known: they follow a weight that gets another name, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regraft.adapters.families.base import Family, NoImageError, Part, cells
from regraft.adapters.form import Array
from regraft.names.keys import Ints


class Opaque(Family):
    """Tensors that are bound to a module's name."""

    formula = "depends on its base weight, or on the input"
    table = cells()

    def sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any]
    ) -> tuple[int | None, int | None]:
        return None, None

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        raise NoImageError("no rule says how it follows a weight that is laid out otherwise")


def _opaque(peft_type: str, title: str, prefix: str) -> type[Family]:
    return type(title, (Opaque,), {"types": (peft_type,), "title": title, "prefix": prefix})


OPAQUE: tuple[type[Family], ...] = tuple(
    _opaque(*row)
    for row in (
        ("BONE", "Bone", "bone_"),
        ("TRAINABLE_TOKENS", "trainable tokens", "trainable_tokens_"),
    )
)
