"""VeLoRA and MonteCLoRA.

Source: PEFT 0.21.2, ``peft/tuners/lora/{layer,variants}.py``.
"""

from __future__ import annotations

from regraft.adapters.families.base import (
    LORA,
    cells,
)
from regraft.adapters.families.lora_variants import LoraVariant


class Velora(LoraVariant):
    """Variants that only train otherwise: what they save is a plain LoRA."""

    title = "VeLoRA, MonteCLoRA"
    switches = (
        "velora_config",
        "monteclora_config",
    )
    formula = "W + scale · B A"
    rank = "r"
    fixed = "what it has for training does not follow"
    table = cells(rest=LORA)
