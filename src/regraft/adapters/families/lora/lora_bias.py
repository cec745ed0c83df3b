"""LoRA with a trained bias of its B.

Source: PEFT 0.21.2, ``peft/tuners/lora/{layer,variants}.py``.
"""

from __future__ import annotations

import numpy as np

from regraft.adapters.families.base import (
    FAMILY,
    LORA,
    NONE,
    Cell,
    Pair,
    Part,
    Weight,
    Wide,
    cells,
)
from regraft.adapters.families.lora_variants import LoraVariant
from regraft.names.keys import Ints


class LoraBias(LoraVariant):
    """A LoRA whose B has a bias, which adds to the module's own."""

    needed = ("A", "B", "bias")

    title = "LoRA with lora_bias"
    switches = ("lora_bias",)
    formula = "W + scale · B A, and the bias + scale · b"
    changes_bias = True
    table = cells(
        join_out=FAMILY,
        split_out=FAMILY,
        reorder_out=FAMILY,
        reorder_in=FAMILY,
        rest=Cell(NONE, LORA, "all its biases are zero"),
    )

    def may_take(self, part: Part, rows: Ints | None, columns: Ints | None) -> None:
        super().may_take(part, rows, columns)
        if columns is not None and len(columns) != part.into:
            raise self.refusal("its bias would be added once for each piece")

    def lora(self, part: Part, weight: Weight) -> Pair:
        if part["bias"].any():
            raise self.refusal("it has lora_bias, and a parameter's LoRA has no bias")
        return super().lora(part, weight)

    def delta(self, part: Part, weight: Weight) -> Wide:
        return self.product(part)

    def bias(self, part: Part, bias: Wide) -> Wide:
        return np.asarray(bias + part["bias"].astype(np.float64) * self.scale(part).value)
