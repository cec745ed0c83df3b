"""aLoRA.

Source: PEFT 0.21.2, ``peft/tuners/lora/{layer,variants}.py``.
"""

from __future__ import annotations

from regraft.adapters.families.base import (
    FAMILY,
    NONE,
    Pair,
    Part,
    Weight,
    Wide,
    cells,
)
from regraft.adapters.families.lora_variants import LoraVariant


class ALora(LoraVariant):
    """A LoRA that is switched on by tokens of the input."""

    title = "aLoRA"
    switches = ("alora_invocation_tokens",)
    formula = "W + scale · B A, after the invocation tokens"
    merges = False
    table = cells(stack=NONE, rest=FAMILY)

    def lora(self, part: Part, weight: Weight) -> Pair:
        raise self.refusal(
            "it is aLoRA, which acts on some tokens only, and a parameter's LoRA acts on all"
        )

    def delta(self, part: Part, weight: Weight) -> Wide:
        raise self.refusal("it is aLoRA, which acts on some tokens only")
