"""HiRA.

Source: PEFT 0.21.2, ``peft/tuners/hira/layer.py``.
"""

from __future__ import annotations

import numpy as np

from regraft.adapters.families.base import (
    DENSE,
    FAMILY,
    IN,
    OUT,
    RANK,
    Part,
    Weight,
    Wide,
    as_wide,
    cells,
    need,
)
from regraft.adapters.families.low_rank import LowRank


class Hira(LowRank):
    """``W o (1 + B A)``: a Hadamard product, so it follows whatever moves elements."""

    types = ("HIRA",)
    title = "HiRA"
    prefix = "hira_"
    roles = {
        "hira_A": (RANK, IN),
        "hira_B": (OUT, RANK),
        "hira_embedding_A": (RANK, IN),
        "hira_embedding_B": (OUT, RANK),
    }
    formula = "W ∘ (1 + B A)"
    adds = False
    one_rank = True  # PEFT 0.21 reads rank_pattern and then gives every module the common r.
    table = cells(stack=DENSE, rest=FAMILY)

    def delta(self, part: Part, weight: Weight) -> Wide:
        infix = "embedding_" if "hira_embedding_A" in part.tensors else ""
        a, b = as_wide(part[f"hira_{infix}A"], part[f"hira_{infix}B"])
        return np.asarray(need(weight) * (b @ a))
