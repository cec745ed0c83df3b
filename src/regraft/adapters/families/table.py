"""Which family an adapter is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regraft.adapters.families.additive import (
    C3a,
    FourierFt,
    Miss,
    PVera,
    RandLora,
    Shira,
    VbLora,
    Vera,
)
from regraft.adapters.families.base import Family
from regraft.adapters.families.factored import AdaLora, Delora, Hira
from regraft.adapters.families.lora_variants import VARIANTS, variant_of
from regraft.adapters.families.lycoris import LoHa, LoKr
from regraft.adapters.families.multiplicative import Boft, Hra, Ia3, Oft, Road
from regraft.adapters.families.opaque import OPAQUE

FAMILIES: tuple[type[Family], ...] = (
    *VARIANTS,
    AdaLora,
    LoHa,
    LoKr,
    Miss,
    Vera,
    PVera,
    VbLora,
    FourierFt,
    RandLora,
    Shira,
    C3a,
    Hira,
    Delora,
    Ia3,
    Oft,
    Boft,
    Hra,
    Road,
    *OPAQUE,
)
"""All families whose tensors belong to modules of the base; plain LoRA has a path of its own."""


def family_of(config: Mapping[str, Any]) -> type[Family] | None:
    """The family of an adapter; ``None`` for plain LoRA, and for what is bound to no module."""
    peft_type = config.get("peft_type")
    if peft_type == "LORA":
        return variant_of(config)
    return next((family for family in FAMILIES if peft_type in family.types), None)
