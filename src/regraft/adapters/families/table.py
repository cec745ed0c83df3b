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
from regraft.adapters.families.few import TinyLora, UniLora
from regraft.adapters.families.frod import Adamss, Frod
from regraft.adapters.families.glora import Beft, GLora
from regraft.adapters.families.gralora import GraLora
from regraft.adapters.families.lora_variants import VARIANTS, variant_of
from regraft.adapters.families.lycoris import LoHa, LoKr
from regraft.adapters.families.multiplicative import Boft, Hra, Ia3, Oft, Road
from regraft.adapters.families.of_the_base import Deft, Peanut
from regraft.adapters.families.opaque import OPAQUE
from regraft.adapters.families.routed import Lily, Poly, PolyOfOneTask
from regraft.adapters.families.supertuning import SuperTuning
from regraft.adapters.families.svd_based import Osf, Psoft
from regraft.adapters.families.waveft import WaveFt

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
    GraLora,
    WaveFt,
    TinyLora,
    UniLora,
    SuperTuning,
    Psoft,
    Osf,
    Deft,
    Peanut,
    Frod,
    Adamss,
    GLora,
    Beft,
    PolyOfOneTask,
    Poly,
    Lily,
    *OPAQUE,
)
"""All families whose tensors belong to modules of the base; plain LoRA has a path of its own."""


def family_of(config: Mapping[str, Any]) -> type[Family] | None:
    """The family of an adapter; ``None`` for plain LoRA, and for what is bound to no module."""
    peft_type = config.get("peft_type")
    if peft_type == "LORA":
        return variant_of(config)
    return next((family for family in FAMILIES if family.covers(config)), None)
