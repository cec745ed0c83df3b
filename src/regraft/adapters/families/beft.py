"""BEFT.

Source: PEFT 0.21.2, ``peft/tuners/beft/layer.py``.
"""

from __future__ import annotations

import numpy as np

from regraft.adapters.families.base import (
    FAMILY,
    NONE,
    OUT,
    Pair,
    Part,
    Weight,
    Wide,
    cells,
)
from regraft.adapters.families.low_rank import LowRank
from regraft.names.keys import Ints


class Beft(LowRank):
    """Adds to the bias."""

    types = ("BEFT",)
    title = "BEFT"
    prefix = "beft_"
    roles = {"beft_bias": (None, OUT)}
    formula = "W, and the bias + beft_bias"
    changes_bias = True
    table = cells(
        join_out=FAMILY, split_out=FAMILY, reorder_out=FAMILY, reorder_in=FAMILY, rest=NONE
    )

    def may_take(self, part: Part, rows: Ints | None, columns: Ints | None) -> None:
        if columns is not None and len(columns) != part.into:
            raise self.refusal("it changes the bias, which would be added once for each piece")

    def delta(self, part: Part, weight: Weight) -> Wide:
        return np.zeros((part.out, part.into))

    def bias(self, part: Part, bias: Wide) -> Wide:
        return np.asarray(bias + part["beft_bias"].astype(np.float64).reshape(-1))

    def lora(self, part: Part, weight: Weight) -> Pair:
        raise self.refusal("it changes the module's bias, and nothing of the other layout has one")
