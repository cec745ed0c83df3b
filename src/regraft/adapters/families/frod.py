"""FRoD.

Source: PEFT 0.21.2, ``peft/tuners/frod/{layer,model}.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    DENSE,
    FAMILY,
    Cell,
    Family,
    NoImageError,
    Pair,
    Part,
    Sizes,
    Weight,
    Wide,
    as_wide,
    cells,
    need,
)
from regraft.adapters.form import Array


class Frod(Family):
    """``U (S + diag(l)) V.T`` in place of the weight; V and the places of S are shared by modules of one name."""

    types = ("FROD",)
    title = "FRoD"
    prefix = "frod_"
    shared = ("base_model.frod_V.", "base_model.frod_s_indices.", "base_model.frod_s_size.")
    formula = "U (S + diag(l)) Vᵀ, U and V of all base weights of one name"
    adds = False
    batches = False
    fixed = "it stands on a decomposition of all weights of its name"
    table = cells(
        rename=Cell(DENSE, FAMILY, "the last two names of its module's path stay the same"),
        rest=DENSE,
    )

    def varies(self) -> bool:
        return True

    def settings(self, path: str) -> dict[str, Any]:
        return {"category": _category(path)}

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        return None, tensors["frod_lambda_l"].size

    def rename(self, part: Part, old: str, new: str) -> Part:
        if (_category(old), _layer(old)) != (_category(new), _layer(new)):
            raise NoImageError("what its modules share goes by their names")
        return part

    def lora(self, part: Part, weight: Weight) -> Pair:
        raise NoImageError("it replaces the weight, which leaves no delta of lower rank")

    def delta(self, part: Part, weight: Weight) -> Wide:
        base = need(weight, "it replaces the base weight")
        category = part.settings["category"]
        v, places = (self.common.get(f"{name}{category}") for name in self.shared[:2])
        if v is None or places is None:
            raise NoImageError(
                "its projections are not in the file (save_projection was off); load it with PEFT, set "
                "save_projection and save it again"
            )
        wide_v, values, scale = as_wide(v, part["frod_lambda_s_values"], part["frod_lambda_l"])
        u = np.linalg.solve(wide_v, base.T).T
        lengths = np.linalg.norm(u, axis=0)
        u = np.divide(u, lengths, out=np.zeros_like(u), where=lengths > 1e-12)
        s = np.diag(scale)
        np.add.at(s, tuple(places), values)
        return np.asarray(u @ s @ wide_v.T - base)


def _category(path: str) -> str:
    """What PEFT calls modules that share a projection.

    >>> _category("model.layers.0.self_attn.q_proj")
    'self_attn_q_proj'
    """
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def _layer(path: str) -> str | None:
    """The number of a module's layer, as PEFT finds it."""
    found = re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", path) or re.search(
        r"(?:^|\.)(\d+)(?:\.|$)", path
    )
    return found[1] if found else None
