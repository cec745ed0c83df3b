"""KaSA.

Source: PEFT 0.21.2, ``peft/tuners/lora/{layer,variants}.py``.
"""

from __future__ import annotations

import numpy as np

from regraft.adapters.families.base import (
    BASE,
    Pair,
    Part,
    Weight,
    as_wide,
    cells,
    need,
)
from regraft.adapters.families.lora_variants import LoraVariant, stacked


class Kasa(LoraVariant):
    """``scale B diag(d) A``, and the base loses its smallest singular components when the adapter loads."""

    title = "KaSA"
    switches = ("kasa_config",)
    formula = "W − tail_r(W) + scale · B diag(d) A"
    rank = "2 r"
    fixed = "it takes singular components off the whole base weight"
    base_helps = True
    adds = False
    table = cells(rest=BASE)

    def lora(self, part: Part, weight: Weight) -> Pair:
        base = need(weight, self.fixed)
        a, b, d = as_wide(part["A"], part["B"], part["diag"])
        rank = len(a)
        u, s, v = np.linalg.svd(base, full_matrices=False)
        b = b * d * self.scale(part).value
        return stacked((a, b), (v[-rank:], -u[:, -rank:] * s[-rank:]), part["A"])
