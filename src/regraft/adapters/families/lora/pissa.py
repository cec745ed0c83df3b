"""PiSSA, OLoRA, and other initialisations that change the base weights.

Source: PEFT 0.21.2, ``peft/tuners/lora/{layer,variants}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    BASE,
    NoImageError,
    Pair,
    Part,
    Weight,
    as_wide,
    cells,
    need,
)
from regraft.adapters.families.lora_variants import LoraVariant, changes_base, stacked


class BaseChanging(LoraVariant):
    """A LoRA whose initialisation takes what it starts with off the base, each time it loads: PiSSA and OLoRA."""

    title = "LoRA started by PiSSA or OLoRA"
    formula = "W − scale · B₀ A₀ + scale · B A"
    rank = "2 r"
    fixed = "its initialisation takes something off the whole base weight when it loads"
    base_helps = True
    adds = False
    table = cells(rest=BASE)

    @classmethod
    def covers(cls, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") in cls.types and changes_base(config) is not None

    def lora(self, part: Part, weight: Weight) -> Pair:
        init = str(self.config["init_lora_weights"]).lower()
        if init not in ("pissa", "olora"):
            raise NoImageError(
                f"the initialisation {init!r} changes base weights in a way that cannot be repeated; save "
                "it again with path_initial_model_for_weight_conversion"
            )
        base = need(weight, self.fixed)
        a, b = as_wide(part["A"], part["B"])
        rank, scale = len(a), self.scale(part).value
        if init == "pissa":
            u, s, v = np.linalg.svd(base, full_matrices=False)
            return stacked((a, b * scale), (v[:rank], -u[:, :rank] * s[:rank]), part["A"])
        q, r = np.linalg.qr(base)
        return stacked((a, b * scale), (r[:rank], -q[:, :rank] * scale), part["A"])
