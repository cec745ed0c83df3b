"""BOFT.

Source: PEFT 0.21.2, ``peft/tuners/boft/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regraft.adapters.families.base import (
    DENSE,
    FAMILY,
    IN,
    OUT,
    Cell,
    Family,
    NoImageError,
    Part,
    Sizes,
    Weight,
    Wide,
    as_wide,
    need,
    present,
)
from regraft.adapters.families.oft import Oft
from regraft.adapters.families.orthogonal import cayley, rotated, take_blocks
from regraft.adapters.form import Array
from regraft.names.keys import Ints


class Boft(Family):
    """``diag(s) W R^T`` with R of skew blocks; more than one factor of R needs PEFT's CUDA extension."""

    types = ("BOFT",)
    title = "BOFT"
    prefix = "boft_"
    roles = {"boft_R": (None, IN, None, None), "boft_s": (OUT, None)}
    formula = "diag(s) W Rᵀ"
    adds = False
    table = {
        **Oft.table,
        "join in": Cell(DENSE, FAMILY, "all parts are adapted, and scale rows by the same factors"),
    }

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        _, count, side, _ = tensors["boft_R"].shape
        for name, have in (("boft_block_size", side), ("boft_block_num", count)):
            if self.config.get(name):  # 0: it follows from the other
                self.check_field(name, have, settings)
        return tensors["boft_s"].size, count * side

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        factors, scale = part["boft_R"], part["boft_s"]
        if rows is not None:
            scale = scale[rows]
        if columns is not None:
            _one_factor(part)
            factors = take_blocks(factors[0], columns)[None]
        into = part.into if columns is None else len(columns)
        return part.with_tensors(len(scale), into, boft_R=factors, boft_s=scale)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        return self.join_alike(parts, outs, OUT, "the parts are turned by different rotations")

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        for part in present(parts):
            _one_factor(part)
        if len({p["boft_R"].shape[-1] for p in present(parts)}) > 1:
            raise self.refusal("the parts have blocks of different sizes")
        return self.join_alike(
            parts, intos, IN, "rows of the parts are scaled by different factors"
        )

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        sides = {p["boft_R"].shape[-1] for p in parts.values()}
        counts = {p["boft_R"].shape[1] for p in parts.values()}
        if len(sides) == 1:
            return parts, {"boft_block_size": sides.pop(), "boft_block_num": 0}
        if len(counts) == 1:
            return parts, {"boft_block_size": 0, "boft_block_num": counts.pop()}
        raise self.refusal(
            "its modules would need blocks of different sizes, and it has one for all"
        )

    def delta(self, part: Part, weight: Weight) -> Wide:
        _one_factor(part)
        (skew, scale) = as_wide(part["boft_R"][0], part["boft_s"])
        skew = 0.5 * (skew - skew.swapaxes(-1, -2))
        base = need(weight)
        return rotated(base, cayley(-skew)) * scale.reshape(-1, 1) - base


def _one_factor(part: Part) -> None:
    if len(part["boft_R"]) > 1:
        raise NoImageError(
            "its rotation is a product of butterflies, which depend on the whole of in"
        )
