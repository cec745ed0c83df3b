"""DeLoRA.

Source: PEFT 0.21.2, ``peft/tuners/delora/layer.py``.
"""

from __future__ import annotations

import numpy as np

from regraft.adapters.families.base import (
    FAMILY,
    IN,
    LORA,
    OUT,
    RANK,
    Family,
    Pair,
    Part,
    Weight,
    as_wide,
    cells,
    is_order,
    narrowed,
)
from regraft.names.keys import Ints


class Delora(Family):
    """``B diag(lambda / (r |a_j| |b_j|)) A`` with columns scaled by the norms that the base had."""

    types = ("DELORA",)
    title = "DeLoRA"
    prefix = "delora_"
    roles = {
        "delora_A": (RANK, IN),
        "delora_B": (OUT, RANK),
        "delora_lambda": (None,),
        "delora_w_norm": (IN,),
    }
    fields = {"r": "rank_pattern", "delora_lambda": "lambda_pattern"}
    formula = "W + B diag(λ / (r ‖a‖ ‖b‖)) A diag(w_norm)"
    rank = "r"
    table = cells(reorder_out=FAMILY, reorder_in=FAMILY, rest=LORA)

    def may_take(self, part: Part, rows: Ints | None, columns: Ints | None) -> None:
        if not is_order(rows, part.out) or not is_order(columns, part.into):
            raise self.refusal(
                "its factors are divided by their norms, which a part of them has not"
            )

    def lora(self, part: Part, weight: Weight) -> Pair:
        a, b, scale, norm = (part[role] for role in self.roles)
        wide_a, wide_b, wide_scale, wide_norm = as_wide(a, b, scale, norm)
        lengths = np.linalg.norm(wide_a, axis=-1).clip(1e-4) * np.linalg.norm(wide_b, axis=-2).clip(
            1e-4
        )
        each = wide_scale / (a.shape[-2] * lengths)
        return (
            narrowed(wide_a * wide_norm[..., None, :], a, norm),
            narrowed(wide_b * each[..., None, :], b, scale),
        )
