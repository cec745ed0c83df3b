"""IA³.

Source: PEFT 0.21.2, ``peft/tuners/ia3/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    DENSE,
    FAMILY,
    IN,
    OUT,
    Cell,
    Family,
    Part,
    Sizes,
    UnreadableError,
    Weight,
    Wide,
    as_wide,
    cells,
    each,
    need,
    present,
    same_bits,
)
from regraft.adapters.families.low_rank import laid_out
from regraft.adapters.form import Array
from regraft.names.keys import Ints
from regraft.storage.expressions import expression
from regraft.values import replace


class Ia3(Family):
    """A factor for each row (``l`` is (out, 1)), or for each column where the module is a feedforward one."""

    types = ("IA3",)
    title = "IA³"
    prefix = "ia3_"
    formula = "diag(l) W, or W diag(l) in feedforward_modules"
    adds = False
    changes_bias = True
    table = cells(
        join_out=Cell(DENSE, FAMILY, "factors stand on out, or are the same"),
        join_in=Cell(DENSE, FAMILY, "factors stand on in, or are the same"),
        split_out=FAMILY,
        split_in=FAMILY,
        reorder_out=FAMILY,
        reorder_in=FAMILY,
        transpose=FAMILY,
        stack=DENSE,
    )

    def varies(self) -> bool:
        return True

    def settings(self, path: str) -> dict[str, Any]:
        named = self.config.get("feedforward_modules") or ()
        if isinstance(named, str):
            return {
                "feedforward": expression(named, "feedforward_modules").fullmatch(path) is not None
            }
        return {"feedforward": any(path.endswith(name) for name in named)}

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        factors = tensors["ia3_l"]
        size = factors.size
        if factors.shape[0 if settings["feedforward"] else 1] != 1:
            raise UnreadableError(
                f"ia3_l is {list(factors.shape)}, which does not go with feedforward_modules"
            )
        return (None, size) if settings["feedforward"] else (size, None)

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        forward = part.settings["feedforward"]
        index = columns if forward else rows
        out = part.out if rows is None else len(rows)
        into = part.into if columns is None else len(columns)
        factors = _factors_of(part)
        return _scaled(
            part, factors if index is None else factors[index], out, into, forward=forward
        )

    def turn(self, part: Part) -> Part:
        forward = not part.settings["feedforward"]
        return _scaled(part, _factors_of(part), part.into, part.out, forward=forward)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        return self._join(parts, outs, OUT)

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        return self._join(parts, intos, IN)

    def _join(self, parts: Sequence[Part | None], sizes: Sequence[int], along: str) -> Part:
        there = present(parts)
        first = there[0].grown(along, sum(sizes))
        forward = {p.settings["feedforward"] for p in there}
        factors = each(_factors_of, parts)
        if forward == {along == IN}:
            made = laid_out(factors, (along,), along, sizes, fill=1.0)
        elif (
            len(forward) == 1
            and len(there) == len(parts)
            and same_bits([_factors_of(p) for p in there])
        ):
            made = _factors_of(there[0])
        else:
            raise self.refusal("the parts are multiplied by different factors across the joint")
        return _scaled(first, made, first.out, first.into, forward=forward.pop())

    def delta(self, part: Part, weight: Weight) -> Wide:
        (factors,) = as_wide(_factors_of(part))
        spread = factors[None, :] if part.settings["feedforward"] else factors[:, None]
        return np.asarray(need(weight) * (spread - 1.0))

    def bias(self, part: Part, bias: Wide) -> Wide:
        if part.settings["feedforward"]:
            return bias
        return np.asarray(bias * _factors_of(part).astype(np.float64))


def _factors_of(part: Part) -> Array:
    return part["ia3_l"].reshape(-1)


def _scaled(part: Part, factors: Array, out: int, into: int, *, forward: bool) -> Part:
    shaped = factors[None, :] if forward else factors[:, None]
    settings = {**part.settings, "feedforward": forward}
    return replace(part, tensors={"ia3_l": shaped}, out=out, into=into, settings=settings)
