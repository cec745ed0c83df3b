"""PVeRA.

Source: PEFT 0.21.2, ``peft/tuners/pvera/layer.py``.
"""

from __future__ import annotations

from regraft.adapters.families.base import (
    OUT,
    RANK,
    NoImageError,
    Pair,
    Part,
    Weight,
)
from regraft.adapters.families.vera import Vera
from regraft.values import replace


class PVera(Vera):
    """VeRA whose ``d`` is the mean of a distribution."""

    types = ("PVERA",)
    title = "PVeRA"
    prefix = "pvera_lambda_"
    roles = {"pvera_lambda_b": (OUT,), "pvera_lambda_d": (RANK,)}
    shared = ("base_model.pvera_A", "base_model.pvera_B")
    formula = "as VeRA, with the mean of d"
    spread = 2

    def lora(self, part: Part, weight: Weight) -> Pair:
        if self.config.get("sample_at_inference"):
            raise NoImageError("it draws numbers as it runs (sample_at_inference)")
        half = part["pvera_lambda_d"].shape[-1] // 2
        tensors = {**part.tensors, "pvera_lambda_d": part["pvera_lambda_d"][..., :half]}
        return super().lora(replace(part, tensors=tensors), weight)
