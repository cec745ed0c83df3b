"""DEFT.

Source: PEFT 0.21.2, ``peft/tuners/deft/layer.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    BASE,
    FAMILY,
    IN,
    OUT,
    RANK,
    Cell,
    Pair,
    Part,
    Weight,
    as_wide,
    cells,
    each,
    is_order,
    narrowed,
    need,
    present,
)
from regraft.adapters.families.low_rank import LowRank, multiplied
from regraft.names.keys import Ints
from regraft.values import replace


class Deft(LowRank):
    """``P (scale R - right.T W)`` where right is P's positive part, or both are an orthonormal basis of P."""

    types = ("DEFT",)
    title = "DEFT"
    prefix = "deft_"
    roles = {"deft_P": (OUT, RANK), "deft_R": (RANK, IN)}
    fields = {"r": None, "alpha": None}
    formula = "W + Q (scale R − Q₊ᵀ W), Q of P"
    rank = "r"
    adds = False
    batches = False
    base_helps = True
    table = cells(
        join_out=Cell(BASE, FAMILY, "decomposition_method is 'relu'"),
        reorder_out=Cell(BASE, FAMILY, "decomposition_method is 'relu'"),
        split_in=FAMILY,
        reorder_in=FAMILY,
        join_in=Cell(BASE, FAMILY, "all parts are adapted, with the same P"),
        rest=BASE,
    )

    @property
    def _plain(self) -> bool:
        return bool(self.config.get("decomposition_method", "relu") == "relu")

    def _scale(self, part: Part) -> float:
        """What R is multiplied by; a part that was joined says it, because its rank is no module's."""
        if "scale" in part.settings:
            return float(part.settings["scale"])
        alpha = part.settings["alpha"]
        return float(alpha) / part["deft_P"].shape[1] if alpha else 1.0

    def may_take(self, part: Part, rows: Ints | None, columns: Ints | None) -> None:
        if rows is not None and not (self._plain and is_order(rows, part.out)):
            raise self.refusal("what it takes off goes by all rows of the base")

    def turn(self, part: Part) -> Part:
        raise self.refusal("what it takes off goes by the rows of the base")

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        if not self._plain:
            raise self.refusal("a basis of several parts is not those of the parts")
        return super().join_out(parts, outs)

    def to_one_scale(self, parts: Sequence[Part | None]) -> Sequence[Part | None]:
        first = present(parts)[0]
        scale = self._scale(first)

        def scaled(part: Part) -> Part:
            made = multiplied(part, ("deft_R",), self._scale(part) / scale)
            return replace(made, settings={**first.settings, "scale": scale})

        return each(scaled, parts)

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        return self.join_alike(parts, intos, IN, "the parts lose different directions")

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        rank = max(int(self.config["r"]), *map(self.rank_of, parts.values()))
        alpha = self.config.get("alpha")
        if alpha:
            first = next(iter(parts.values()))
            alpha = self._scale(first) * min(rank, first.out)
        made = {}
        for key, part in parts.items():
            # PEFT gives no module a higher rank than it has rows.
            wanted, old = min(rank, part.out), self.rank_of(part)
            if wanted < old or (wanted > old and not self._plain):
                raise self.refusal("all modules share one r")
            ratio = self._scale(part) * wanted / alpha if alpha else 1.0
            made[key] = multiplied(self.padded(part, wanted), ("deft_R",), ratio)
        return made, {"r": rank, "alpha": alpha}

    def lora(self, part: Part, weight: Weight) -> Pair:
        base = need(weight, "it takes a part of the base weight off")
        (p,) = as_wide(part["deft_P"])
        q, right = (p, p.clip(0)) if self._plain else (np.linalg.qr(p)[0],) * 2
        a = -right.T @ base
        if "deft_R" in part.tensors:
            a = a + part["deft_R"].astype(np.float64) * self._scale(part)
        return narrowed(a, part["deft_P"]), narrowed(q, part["deft_P"])
