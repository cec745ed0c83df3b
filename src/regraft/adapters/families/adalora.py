"""AdaLoRA.

Source: PEFT 0.21.2, ``peft/tuners/adalora/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regraft.adapters.families.base import (
    FAMILY,
    IN,
    LORA,
    OUT,
    RANK,
    Pair,
    Part,
    Weight,
    as_wide,
    cells,
    narrowed,
)
from regraft.adapters.families.low_rank import LowRank


class AdaLora(LowRank):
    """``scale * B diag(E) A``; every module has as many components as its budget left it."""

    types = ("ADALORA",)
    title = "AdaLoRA"
    prefix = "lora_"
    roles = {"lora_A": (RANK, IN), "lora_B": (OUT, RANK), "lora_E": (RANK, None)}
    fields = {"lora_alpha": None, "init_r": None}
    formula = "W + alpha/(init_r + 1e-5) B diag(E) A"
    rank = "r"
    table = cells(
        split_out=FAMILY,
        split_in=FAMILY,
        transpose=FAMILY,
        reorder_out=FAMILY,
        reorder_in=FAMILY,
        rest=LORA,
    )

    def check_rank(self, rank: int | None, settings: Mapping[str, Any]) -> None:
        if rank is not None and not self.config.get("rank_pattern"):
            self.check_field(
                "init_r", rank, settings
            )  # else every module has what its budget left it

    def join_ranks(self, parts: Sequence[Part | None], sizes: Sequence[int], along: str) -> Part:
        raise self.refusal("all modules share one init_r, and ranks add where weights are joined")

    def lora(self, part: Part, weight: Weight) -> Pair:
        a, b, e = part["lora_A"], part["lora_B"], part["lora_E"]
        alpha = part.settings["lora_alpha"]
        # Where alpha is not positive, PEFT takes the module's own rank, as its budget left it.
        scale = (alpha if alpha > 0 else float(a.shape[-2])) / (part.settings["init_r"] + 1e-5)
        wide_b, wide_e = as_wide(b, e)
        return a, narrowed(wide_b * wide_e.swapaxes(-1, -2) * scale, b, e)
