"""UniLoRA.

Source: PEFT 0.21.2, ``peft/tuners/unilora/{layer,model}.py``.
"""

from __future__ import annotations

from regraft.adapters.families.base import (
    FAMILY,
    IN,
    LORA,
    OUT,
    RANK,
    NoImageError,
    Pair,
    Part,
    Weight,
    as_wide,
    cells,
    narrowed,
)
from regraft.adapters.families.low_rank import LowRank


class UniLora(LowRank):
    """A and B whose numbers are all taken from one vector, at stored places and with stored factors."""

    types = ("UNILORA",)
    title = "UniLoRA"
    prefix = "unilora_"
    roles = {
        "unilora_indices_A": (RANK, IN),
        "unilora_indices_B": (OUT, RANK),
        "unilora_scales_A": (RANK, IN),
        "unilora_scales_B": (OUT, RANK),
    }
    shared = ("base_model.unilora_theta_d",)
    formula = "W + B A, every number of both from one vector"
    rank = "r"
    one_rank = True
    table = cells(stack=LORA, rest=FAMILY)

    def lora(self, part: Part, weight: Weight) -> Pair:
        vector = self.common.get(self.shared[0])
        if vector is None:
            raise NoImageError("the vector that its numbers come from is not in the file")
        index_a, index_b, *scales = (part[role] for role in self.roles)
        theta, scale_a, scale_b = as_wide(vector, *scales)
        like = vector, *scales
        return narrowed(theta[index_a] * scale_a, *like), narrowed(theta[index_b] * scale_b, *like)
