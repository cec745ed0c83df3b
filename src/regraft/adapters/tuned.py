"""The modules that a family other than plain LoRA adapts."""

from __future__ import annotations

from msgspec import Struct, field

from regraft.adapters.families.base import Part
from regraft.names.keys import Group
from regraft.planning.plan import Headers


class TunedModules(Struct):
    """All adapted modules. Id i of ``headers`` is a base weight; its adapter is ``parts[i]``."""

    headers: Headers
    parts: list[Part]
    kinds: list[tuple[Group, str]] = field(default_factory=list)
    forms: list[object] = field(default_factory=list)
    """What is equal for modules whose tensors have the same names, shapes, dtypes and settings."""
    unknown: set[int] = field(default_factory=set)
    """Ids of weights of which a size is not known; 1 stands for it."""
