"""Arrow.

Source: PEFT 0.21.2, ``peft/tuners/lora/{layer,variants}.py``.
"""

from __future__ import annotations

from regraft.adapters.families.base import (
    Pair,
    Part,
    Weight,
    cells,
)
from regraft.adapters.families.lora_variants import LoraVariant


class Arrow(LoraVariant):
    """Arrow: which LoRA acts depends on the input."""

    title = "Arrow"
    merges = False
    switches = ("arrow_config",)
    formula = "depends on the input"
    fixed = "its effect depends on the input"
    needed = ()
    table = cells()

    def lora(self, part: Part, weight: Weight) -> Pair:
        raise self.refusal(self.fixed)
