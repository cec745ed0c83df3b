"""DoRA.

Source: PEFT 0.21.2, ``peft/tuners/lora/{layer,variants}.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from regraft.adapters.families.base import (
    DENSE,
    FAMILY,
    IN,
    Cell,
    Pair,
    Part,
    Weight,
    Wide,
    as_wide,
    cells,
    need,
)
from regraft.adapters.families.lora_variants import LoraVariant
from regraft.names.keys import Ints


class Dora(LoraVariant):
    """``(m / |V|) o V`` with ``V = W + scale B A`` and the lengths of its rows."""

    title = "DoRA"
    switches = ("use_dora",)
    formula = "m / ‖V‖ ∘ V, V = W + scale · B A"
    adds = False
    table = cells(
        join_out=Cell(DENSE, FAMILY, "all parts are adapted"),
        split_out=FAMILY,
        reorder_out=FAMILY,
        reorder_in=FAMILY,
        rest=DENSE,
    )

    def may_take(self, part: Part, rows: Ints | None, columns: Ints | None) -> None:
        super().may_take(part, rows, columns)
        if columns is not None and len(columns) != part.into:
            raise self.refusal("the lengths of its rows would change")

    def neutral(self, role: str) -> float:
        if role == "m":
            raise self.refusal(
                "a part that is not adapted would need the lengths of its base's rows"
            )
        return super().neutral(role)

    def turn(self, part: Part) -> Part:
        raise self.refusal("its magnitudes stand on out, and would have to stand on in")

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        raise self.refusal("rows of several parts would have one length")

    def lora(self, part: Part, weight: Weight) -> Pair:
        raise self.refusal("it is DoRA, whose delta has full rank")

    def delta(self, part: Part, weight: Weight) -> Wide:
        base = need(weight)
        (m,) = as_wide(part["m"].reshape(-1))
        with np.errstate(
            all="ignore"
        ):  # rows of zeros, and NaN in the factors, give NaN in PEFT as well
            added = base + self.product(part)
            return np.asarray(added * (m / np.linalg.norm(added, axis=1))[:, None] - base)


class TokenDora(Dora):
    """DoRA whose embeddings have a magnitude for each token (``t``); PEFT's have one for each column.

    An embedding's weight is stored as (tokens, hidden), and its delta here is (hidden, tokens).

    Source: mlx-lm 0.32.2, ``tuner/dora.py``.
    """

    types = ()  # PEFT's configs ask for it in no way
    title = "DoRA with a magnitude for each token of an embedding"
    in_peft = False
    roles = {**Dora.roles, "t": (IN,)}

    def delta(self, part: Part, weight: Weight) -> Wide:
        if "t" not in part.tensors:
            return super().delta(part, weight)
        base = need(weight)
        (lengths,) = as_wide(part["t"])
        with np.errstate(all="ignore"):  # as above
            added = base + self.product(part)
            return np.asarray(added * (lengths / np.linalg.norm(added, axis=0)) - base)
