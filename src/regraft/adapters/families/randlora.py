"""RandLoRA.

Source: PEFT 0.21.2, ``peft/tuners/randlora/layer.py``.
"""

from __future__ import annotations

import numpy as np

from regraft.adapters.families.base import (
    DENSE,
    Family,
    NoImageError,
    Part,
    Weight,
    Wide,
    as_wide,
    cells,
)


class RandLora(Family):
    """A sum of random bases, scaled: of full rank."""

    types = ("RANDLORA",)
    title = "RandLoRA"
    prefix = "randlora_"
    shared = ("base_model.randlora_A", "base_model.randlora_B")
    formula = "W + alpha/r Σ B diag(λ) A diag(γ), A and B shared"
    fixed = "all modules share one A and one B"
    table = cells(rest=DENSE)

    def delta(self, part: Part, weight: Weight) -> Wide:
        a, b = (self.common.get(name) for name in self.shared)
        if a is None or b is None:
            raise NoImageError("its bases are not in the file (save_projection was off)")
        short, long = sorted((part.out, part.into))
        lam, gamma, wide_a, wide_b = as_wide(part["randlora_lambda"], part["randlora_gamma"], a, b)
        rank, count = lam.shape
        first = (lam[:, :, None] * wide_a[:rank, :count, :short] * gamma[:, :short]).reshape(
            -1, short
        )
        made = wide_b[:long, :count, :rank].reshape(long, -1) @ first
        made *= float(self.config["randlora_alpha"]) / rank
        return np.asarray(made if part.into == short else made.T)
