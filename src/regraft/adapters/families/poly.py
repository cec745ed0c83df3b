"""Poly.

Source: PEFT 0.21.2, ``peft/tuners/poly/{layer,router}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from regraft.adapters.families.base import (
    FAMILY,
    IN,
    LORA,
    NONE,
    OUT,
    RANK,
    Cell,
    NoImageError,
    Pair,
    Part,
    Sizes,
    Weight,
    as_wide,
    cells,
    narrowed,
)
from regraft.adapters.families.low_rank import LowRank, multiplied
from regraft.adapters.form import Array
from regraft.names.keys import Ints

_A, _B, _LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"


class Poly(LowRank):
    """``A B / r``, both mixed for each task from several skills.

    A is (splits, skills, in/splits, r), B (splits, skills, r, out/splits).
    """

    types = ("POLY",)
    title = "Poly"
    prefix = "poly_"
    roles = {_A: (None, None, IN, RANK), _B: (None, None, RANK, OUT), _LOGITS: (None, None)}
    formula = "W + B A / r, mixed for each task"
    rank = "r"
    merges = False
    one_rank = True
    one_task: ClassVar[bool] = False
    table = cells(
        **dict.fromkeys(
            ("join_out", "join_in"),
            Cell(NONE, FAMILY, "all parts are mixed by the same router, and n_splits is 1"),
        ),
        **dict.fromkeys(
            ("split_out", "split_in", "reorder_out", "reorder_in", "transpose"),
            Cell(NONE, FAMILY, "n_splits is 1"),
        ),
        rest=NONE,
    )

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        out, into = super().sizes(tensors, settings)
        splits, skills = tensors[_A].shape[:2]
        self.check_field("n_splits", splits, settings)
        self.check_field("n_skills", skills, settings)
        self.check_field("n_tasks", len(tensors[_LOGITS]), settings)
        return out and splits * out, into and splits * into

    @classmethod
    def covers(cls, config: Mapping[str, Any]) -> bool:
        return super().covers(config) and (config.get("n_tasks") == 1) == cls.one_task

    def may_take(self, part: Part, rows: Ints | None, columns: Ints | None) -> None:
        if len(part[_A]) > 1:
            raise self.refusal("its rows and columns are split into groups (n_splits)")

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        made, changes = super().settle(parts)
        ratio = changes["r"] / int(self.config["r"])
        return {key: multiplied(part, (_B,), ratio) for key, part in made.items()}, changes

    def lora(self, part: Part, weight: Weight) -> Pair:
        a, b, logits = as_wide(part[_A], part[_B], part[_LOGITS])
        if logits.shape[-2] != 1:
            raise NoImageError(
                f"what it adds depends on the task, of which it has {logits.shape[-2]}"
            )
        chosen = 1.0 / (1.0 + np.exp(-logits[..., 0, :].reshape(a.shape[:-2])))
        weights = chosen / (chosen.sum(axis=-1, keepdims=True) + 1e-12)
        mixed_a = np.einsum("...qs,...qsdr->...qdr", weights, a)
        mixed_b = np.einsum("...qs,...qsrd->...qrd", weights, b)
        rank = a.shape[-1]
        rows = mixed_a.reshape(*a.shape[:-4], part.into, rank).swapaxes(-1, -2)
        columns = mixed_b.swapaxes(-1, -2).reshape(*a.shape[:-4], part.out, rank)
        return narrowed(rows, part[_A]), narrowed(columns / rank, part[_B])


class PolyOfOneTask(Poly):
    """Poly with one task: its mix never changes, so it is a LoRA."""

    title = "Poly of one task"
    formula = "W + B A / r"
    one_task = True
    table = {
        operation: Cell(LORA, cell.better, cell.when) if operation != "rename" else cell
        for operation, cell in Poly.table.items()
    }
