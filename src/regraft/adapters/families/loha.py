"""LoHa.

Source: PEFT 0.21.2, ``peft/tuners/loha/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    FAMILY,
    IN,
    LORA,
    OUT,
    RANK,
    Pair,
    Part,
    Sizes,
    Weight,
    Wide,
    as_wide,
    cells,
    narrowed,
)
from regraft.adapters.families.low_rank import LowRank
from regraft.adapters.form import Array
from regraft.names.keys import Ints


class LoHa(LowRank):
    """``scale * (w1_a w1_b) o (w2_a w2_b)``."""

    types = ("LOHA",)
    title = "LoHa"
    prefix = "hada_"
    roles = {
        "hada_w1_a": (OUT, RANK),
        "hada_w1_b": (RANK, IN),
        "hada_w2_a": (OUT, RANK),
        "hada_w2_b": (RANK, IN),
    }
    fields = {"r": "rank_pattern", "alpha": "alpha_pattern"}
    alpha = "alpha"
    scaled = ("hada_w1_a",)
    formula = "W + alpha/r (w1_a w1_b) ∘ (w2_a w2_b)"
    rank = "r²"
    table = cells(stack=LORA, rest=FAMILY)

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        if "hada_t1" in tensors:
            return tensors["hada_w1_a"].shape[1], None
        return super().sizes(tensors, settings)

    def may_take(self, part: Part, rows: Ints | None, columns: Ints | None) -> None:
        if "hada_t1" in part.tensors:
            raise self.refusal(
                "a convolution's kernel has a factor of its own here (use_effective_conv2d)"
            )

    def lora(self, part: Part, weight: Weight) -> Pair:
        self.may_take(part, None, None)
        a1, b1, a2, b2 = (part[role] for role in self.roles)
        scale = self.scale(part).value
        columns = a1[..., :, :, None].astype(np.float64) * a2[..., :, None, :] * scale
        rows = b1[..., :, None, :].astype(np.float64) * b2[..., None, :, :]
        rank = a1.shape[-1] ** 2
        return (
            narrowed(rows.reshape(*rows.shape[:-3], rank, b1.shape[-1]), a1),
            narrowed(columns.reshape(*columns.shape[:-2], rank), a1),
        )

    def delta(self, part: Part, weight: Weight) -> Wide:
        self.may_take(part, None, None)
        a1, b1, a2, b2 = as_wide(*(part[role] for role in self.roles))
        return np.asarray((a1 @ b1) * (a2 @ b2) * self.scale(part).value)
