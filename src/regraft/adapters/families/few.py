"""Families that train a few numbers for the whole model: TinyLoRA and UniLoRA.

Source: PEFT 0.21.2, ``peft/tuners/{tinylora,unilora}/{layer,model}.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    FAMILY,
    IN,
    LORA,
    OUT,
    Cell,
    Family,
    NoImageError,
    Part,
    Wide,
    as_wide,
    block_diagonal,
    cells,
    joined,
    narrowed,
)
from regraft.adapters.families.seeded import random_normal
from regraft.adapters.form import Array
from regraft.names.keys import Ints


class TinyLora(Family):
    """``B R A`` with R a sum of random matrices P, weighted by a vector v that several modules share.

    Which vector is a module's own depends on its place among all modules. P was drawn with the seed and that place,
    so the place is found again by drawing.
    """

    types = ("TINYLORA",)
    title = "TinyLoRA"
    prefix = "tinylora_"
    roles = {
        "tinylora_A": (None, IN),
        "tinylora_B": (OUT, None),
        "tinylora_P": (None, None, None),
    }
    shared = ("base_model.tinylora_v.",)
    formula = "W + B (Σ vᵢ Pᵢ) A, v shared"
    rank = "r"
    batches = False
    table = cells(
        rename=Cell(LORA, FAMILY, "all modules share one v (weight_tying is 1)"),
        rest=Cell(LORA),
    )

    def __init__(self, config: Mapping[str, Any], shared: Mapping[str, Array]) -> None:
        super().__init__(config, shared)
        self._count = 0
        self._drawn: dict[object, dict[bytes, int]] = {}

    def survey(self, parts: Mapping[str, Part]) -> None:
        self._count = len(parts)

    def rename(self, part: Part, old: str, new: str) -> Part:
        if len(self.common) != 1 or "tinylora_P" not in part.tensors:
            raise NoImageError("what its modules share goes by their order in the model")
        return part

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        raise NoImageError("its A and B are those of the whole base weight")

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
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


class UniLora(Family):
    """A and B whose numbers are all taken from one vector, at stored places and with stored factors."""

    types = ("UNILORA",)
    title = "UniLoRA"
    prefix = "unilora_"
    roles = {
        "unilora_indices_A": (None, IN),
        "unilora_indices_B": (OUT, None),
        "unilora_scales_A": (None, IN),
        "unilora_scales_B": (OUT, None),
    }
    shared = ("base_model.unilora_theta_d",)
    formula = "W + B A, every number of both from one vector"
    rank = "r"
    table = cells(stack=Cell(LORA), rest=Cell(FAMILY))

    def turn(self, part: Part) -> Part:
        tensors = {
            f"unilora_{what}_{to}": part[f"unilora_{what}_{of}"].T
            for what in ("indices", "scales")
            for to, of in ("AB", "BA")
        }
        return part.with_tensors(part.into, part.out, **tensors)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        there = [p for p in parts if p is not None]
        first = there[0]
        tensors = {}
        for what in ("indices", "scales"):
            b = f"unilora_{what}_B"
            blocks = [
                np.zeros((out, 0), first[b].dtype) if p is None else p[b]
                for p, out in zip(parts, outs, strict=True)
            ]
            tensors[f"unilora_{what}_A"] = joined([p[f"unilora_{what}_A"] for p in there])
            tensors[b] = block_diagonal(blocks)
        return first.with_tensors(sum(outs), first.into, **tensors)

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        turned = [None if part is None else self.turn(part) for part in parts]
        return self.turn(self.join_out(turned, intos))

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        rank = max(len(p["unilora_indices_A"]) for p in parts.values())
        return {key: _filled(part, rank) for key, part in parts.items()}, {"r": rank}

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        vector = self.common.get(self.shared[0])
        if vector is None:
            raise NoImageError("the vector that its numbers come from is not in the file")
        index_a, index_b, *scales = (part[role] for role in self.roles)
        theta, scale_a, scale_b = as_wide(vector, *scales)
        like = vector, *scales
        return narrowed(theta[index_a] * scale_a, *like), narrowed(theta[index_b] * scale_b, *like)


def _filled(part: Part, rank: int) -> Part:
    """Components of factor zero up to a rank."""
    more = rank - len(part["unilora_indices_A"])
    tensors = {
        role: np.pad(tensor, [(0, more), (0, 0)] if role.endswith("A") else [(0, 0), (0, more)])
        for role, tensor in part.tensors.items()
    }
    return replace(part, tensors=tensors)
