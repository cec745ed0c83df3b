"""HRA.

Source: PEFT 0.21.2, ``peft/tuners/hra/layer.py``.
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
    is_order,
    narrowed,
    need,
)
from regraft.adapters.families.low_rank import LowRank
from regraft.names.keys import Ints


class Hra(LowRank):
    """``W H``, H a product of reflections; ``H - 1`` has the rank of their number."""

    types = ("HRA",)
    title = "HRA"
    prefix = "hra_"
    roles = {"hra_u": (IN, RANK)}
    formula = "W H, H a product of r reflections"
    rank = "r"
    batches = False
    adds = False
    base_helps = True
    table = cells(
        join_out=Cell(BASE, FAMILY, "all parts are adapted, by the same reflections"),
        join_in=Cell(BASE, FAMILY, "every module gets as many reflections"),
        split_out=FAMILY,
        reorder_out=FAMILY,
        reorder_in=FAMILY,
        rest=BASE,
    )

    def may_take(self, part: Part, rows: Ints | None, columns: Ints | None) -> None:
        if not is_order(columns, part.into):
            raise self.refusal("a part of a reflection is none")

    def turn(self, part: Part) -> Part:
        raise self.refusal("it multiplies from the side of in")

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        return self.join_alike(parts, outs, OUT, "the parts are reflected differently")

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        counts = set(map(self.rank_of, parts.values()))
        if len(counts) > 1:
            raise self.refusal("its modules would need different numbers of reflections")
        return parts, {"r": counts.pop()}

    def lora(self, part: Part, weight: Weight) -> Pair:
        base = need(weight)
        (u,) = as_wide(part["hra_u"])
        count = u.shape[1]
        if self.config.get("apply_GS"):
            left, inner = np.linalg.qr(u)[0], -2.0 * np.eye(count)
        else:
            left = u / np.linalg.norm(u, axis=0)
            # H = 1 + U T U^T, reflection by reflection: T grows by a row and a column.
            inner = np.zeros((count, count))
            for number in range(count):
                column = inner[:number, :number] @ (left[:, :number].T @ left[:, number])
                inner[:number, number] = -2.0 * column
                inner[number, number] = -2.0
        b = base @ left @ inner
        return narrowed(left.T, part["hra_u"]), narrowed(np.asarray(b), part["hra_u"])
