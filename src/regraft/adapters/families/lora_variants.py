"""What PEFT builds on LoRA, in what all variants share; each has a file in ``lora/``.

Source: PEFT 0.21.2, ``peft/tuners/lora/variants.py``, ``dora.py`` and ``layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

import numpy as np

from regraft.adapters.families.base import (
    IN,
    OUT,
    RANK,
    Pair,
    Part,
    Sizes,
    UnreadableError,
    Weight,
    Wide,
    as_wide,
    cells,
    narrowed,
)
from regraft.adapters.families.low_rank import LowRank
from regraft.adapters.form import Array, rescale
from regraft.adapters.scale import Scale
from regraft.names.keys import Ints

_ROLES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_diag": "diag",
}


_NEEDED_BY = {"use_dora": "m", "lora_bias": "bias", "kasa_config": "diag"}
"""What every module has where a field of the config says so, whatever else it is."""


class LoraVariant(LowRank):
    """Factors A and B, and what a variant has beside them."""

    types: ClassVar[tuple[str, ...]] = ("LORA",)
    prefix = "lora_"
    batches = False
    fields = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
    roles = {"A": (RANK, IN), "B": (OUT, RANK), "bias": (OUT,), "m": (OUT,), "diag": (RANK,)}
    alpha = "lora_alpha"
    scaled = ("B", "bias")
    switches: ClassVar[tuple[str, ...]] = ()
    """Config fields that ask for it."""
    needed: ClassVar[tuple[str, ...]] = ("A", "B")
    """Roles that every module has."""
    names: ClassVar[Mapping[str, str]] = {
        "A": "lora_A.weight",
        "B": "lora_B.weight",
        "bias": "lora_B.bias",
        "m": "lora_magnitude_vector",
        "diag": "lora_diag",
    }

    @classmethod
    def covers(cls, config: Mapping[str, Any]) -> bool:
        return super().covers(config) and any(config.get(field) for field in cls.switches)

    def read(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        return {_ROLES.get(name, name): tensor for name, tensor in tensors.items()}

    def write(self, part: Part) -> dict[str, Array]:
        names = dict(self.names)
        if part.kind == "embedding":
            names |= {"A": "lora_embedding_A", "B": "lora_embedding_B"}
        return {names.get(role, role): tensor for role, tensor in part.tensors.items()}

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        also = [role for field, role in _NEEDED_BY.items() if self.config.get(field)]
        needed = dict.fromkeys([*self.needed, *also])
        missing = [self.names[role] for role in needed if role not in tensors]
        if missing:
            raise UnreadableError(f"{' and '.join(missing)} is missing")
        a, b = tensors["A"], tensors["B"]
        if a.ndim == b.ndim == 2 and a.shape[0] != b.shape[1]:
            raise UnreadableError(f"its ranks differ: A {list(a.shape)}, B {list(b.shape)}")
        if a.ndim < 3 or a.ndim != b.ndim:
            return super().sizes(tensors, settings)
        self.check_rank(a.shape[0], settings)
        return b.shape[0], prod(a.shape[1:])  # a convolution: in has its kernel's dims, too

    def scale(self, part: Part) -> Scale:
        """Rank and alpha of a part."""
        rslora = bool(self.config.get("use_rslora"))
        return Scale(part.settings["r"], part.settings["lora_alpha"], rslora)

    def may_take(self, part: Part, rows: Ints | None, columns: Ints | None) -> None:
        super().may_take(part, rows, columns)
        if part["A"].ndim != 2:
            raise self.refusal("it stands on a convolution")

    def lora(self, part: Part, weight: Weight) -> Pair:
        return part["A"], rescale(part["B"], self.scale(part).value)[0]

    def product(self, part: Part) -> Wide:
        """``scale * B @ A`` in float64; a convolution's kernel counts as in."""
        a, b = as_wide(part["A"], part["B"])
        if a.ndim > 2:
            a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
        return np.asarray(b @ a * self.scale(part).value)


class Mixed(LoraVariant):
    """Several variants at once: they follow a new name, and nothing else."""

    types = ()  # no config asks for it by itself
    title = "several variants of LoRA at once"
    formula = "depends on the input"
    merges = False
    fixed = "it is several variants at once"
    needed = ()
    table = cells()

    def lora(self, part: Part, weight: Weight) -> Pair:
        raise self.refusal(self.fixed)


BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of ``init_lora_weights`` (or their beginnings) that change the base weights when the adapter loads."""


def changes_base(config: Mapping[str, Any]) -> str | None:
    """The initialisation of a LoRA, where it changes the base weights when the adapter loads."""
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        return init
    return None


def stacked(first: tuple[Wide, Wide], second: tuple[Wide, Wide], like: Array) -> Pair:
    """Two LoRAs, each an A (rank, in) and a B (out, rank), as one whose delta is the sum of theirs."""
    a = np.concatenate([first[0], second[0]])
    b = np.concatenate([first[1], second[1]], axis=1)
    return narrowed(a, like), narrowed(b, like)
