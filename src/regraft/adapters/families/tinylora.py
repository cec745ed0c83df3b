"""TinyLoRA.

Source: PEFT 0.21.2, ``peft/tuners/tinylora/{layer,model}.py``.
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
    Cell,
    Family,
    NoImageError,
    Pair,
    Part,
    Sizes,
    Weight,
    as_wide,
    cells,
    narrowed,
)
from regraft.adapters.families.seeded import (
    random_normal,
)
from regraft.adapters.form import Array


class TinyLora(Family):
    """``B R A`` with R a sum of random matrices P, weighted by a vector v that several modules share.

    Which vector is a module's own depends on its place among all modules. P was drawn with the seed and that place,
    so the place is found again by drawing.
    """

    types = ("TINYLORA",)
    title = "TinyLoRA"
    prefix = "tinylora_"
    roles = {
        "tinylora_A": (RANK, IN),
        "tinylora_B": (OUT, RANK),
        "tinylora_P": (None, RANK, RANK),
    }
    shared = ("base_model.tinylora_v.",)
    formula = "W + B (Σ vᵢ Pᵢ) A, v shared"
    rank = "r"
    batches = False
    fixed = "its A and B are those of the whole base weight"
    table = cells(
        rename=Cell(LORA, FAMILY, "all modules share one v (weight_tying is 1)"),
        rest=LORA,
    )

    def __init__(self, config: Mapping[str, Any], shared: Mapping[str, Array]) -> None:
        super().__init__(config, shared)
        self._count = 0
        self._drawn: dict[object, dict[bytes, int]] = {}

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        found = super().sizes(tensors, settings)
        if "tinylora_P" in tensors:
            self.check_field("u", tensors["tinylora_P"].shape[0], settings)
        return found

    def survey(self, parts: Mapping[str, Part]) -> None:
        self._count = len(parts)

    def rename(self, part: Part, old: str, new: str) -> Part:
        if len(self.common) != 1 or "tinylora_P" not in part.tensors:
            raise NoImageError("what its modules share goes by their order in the model")
        return part

    def lora(self, part: Part, weight: Weight) -> Pair:
        if "tinylora_P" not in part.tensors:
            raise NoImageError(
                "its projections are not in the file (save_projection was off); load it with PEFT, set "
                "save_projection and save it again"
            )
        b, p, v = as_wide(part["tinylora_B"], part["tinylora_P"], self._vector(part))
        r = np.einsum("i,ijk->jk", v, p)
        return part["tinylora_A"], narrowed(b @ r, part["tinylora_B"], part["tinylora_P"])

    def _vector(self, part: Part) -> Array:
        groups = len(self.common)
        each = max(1, self._count // max(1, groups))
        group = 0 if groups == 1 else min(self._place(part["tinylora_P"]) // each, groups - 1)
        found = self.common.get(f"{self.shared[0]}{group}")
        if found is None:
            raise NoImageError(f"tinylora_v.{group}, which its modules share, is not in the file")
        return found

    def _place(self, projection: Array) -> int:
        """The place of a module among all modules that are adapted."""
        form = projection.shape, projection.dtype
        if form not in self._drawn:
            deviation, seed = projection.shape[-1] ** -0.5, int(self.config["projection_seed"])
            self._drawn[form] = {
                random_normal(projection.shape, deviation, seed + place)
                .astype(projection.dtype)
                .tobytes(): place
                for place in range(self._count)
            }
        place = self._drawn[form].get(projection.tobytes())
        if place is None:
            raise NoImageError("its projections were drawn otherwise than its config says")
        return place
