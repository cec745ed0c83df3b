"""AdaMSS.

Source: PEFT 0.21.2, ``peft/tuners/adamss/{layer,model}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regraft.adapters.families.base import (
    Family,
    Pair,
    Part,
    Sizes,
    Weight,
    cells,
)
from regraft.adapters.form import Array


class Adamss(Family):
    """Rows of the weight in clusters that scikit-learn finds, each with a LoRA of its own."""

    types = ("ADAMSS",)
    title = "AdaMSS"
    prefix = "adamss_"
    formula = "W + rows in clusters, each Bᵢ Aᵢ of the base's first components"
    adds = False
    fixed = (
        "which rows form a cluster is not in the file: PEFT finds the clusters of the whole base weight again when it "
        "loads the adapter"
    )
    table = cells()

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        rows = sum(t.shape[0] for end, t in tensors.items() if end.startswith("adamss_B"))
        return rows, None

    def lora(self, part: Part, weight: Weight) -> Pair:
        raise self.refusal(self.fixed)
