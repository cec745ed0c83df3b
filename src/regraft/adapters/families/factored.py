"""Families whose tensors are an A (rank, in) and a B (out, rank), with something more: AdaLoRA, HiRA, DeLoRA.

Source: PEFT 0.21.2, ``peft/tuners/{adalora,hira,delora}/layer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    DENSE,
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
    is_order,
    joined,
    narrowed,
    need,
)
from regraft.adapters.form import Array
from regraft.names.keys import Ints


class AdaLora(Family):
    """``scale * B diag(E) A``; every module has as many components as its budget left it."""

    types = ("ADALORA",)
    title = "AdaLoRA"
    prefix = "lora_"
    roles = {"lora_A": (None, IN), "lora_B": (OUT, None), "lora_E": (None, None)}
    fields = {"lora_alpha": None, "init_r": None, "r": None}
    formula = "W + alpha/(init_r + 1e-5) B diag(E) A"
    rank = "r"
    table = cells(
        split_out=Cell(FAMILY),
        split_in=Cell(FAMILY),
        transpose=Cell(FAMILY),
        reorder_out=Cell(FAMILY),
        reorder_in=Cell(FAMILY),
        rest=Cell(LORA),
    )

    def turn(self, part: Part) -> Part:
        return part.with_tensors(
            part.into,
            part.out,
            lora_A=part["lora_B"].T,
            lora_B=part["lora_A"].T,
            lora_E=part["lora_E"],
        )

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        raise NoImageError("all modules share one init_r, and ranks add where weights are joined")

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        return self.join_out(parts, intos)

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        a, b, e = part["lora_A"], part["lora_B"], part["lora_E"]
        alpha = part.settings["lora_alpha"]
        scale = (alpha if alpha > 0 else float(part.settings["r"])) / (
            part.settings["init_r"] + 1e-5
        )
        wide_b, wide_e = as_wide(b, e)
        return a, narrowed(wide_b * wide_e.swapaxes(-1, -2) * scale, b, e)


class Hira(Family):
    """``W o (1 + B A)``: a Hadamard product, so it follows whatever moves elements."""

    types = ("HIRA",)
    title = "HiRA"
    prefix = "hira_"
    roles = {
        "hira_A": (None, IN),
        "hira_B": (OUT, None),
        "hira_embedding_A": (None, IN),
        "hira_embedding_B": (OUT, None),
    }
    formula = "W ∘ (1 + B A)"
    adds = False
    table = cells(stack=Cell(DENSE), rest=Cell(FAMILY))

    def turn(self, part: Part) -> Part:
        a, b = _pair(part)
        return _paired(part, b.T, a.T, part.into, part.out)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        there = [_pair(p) for p in parts if p is not None]
        bs = [
            np.zeros((out, 0), there[0][1].dtype) if p is None else _pair(p)[1]
            for p, out in zip(parts, outs, strict=True)
        ]
        like = next(p for p in parts if p is not None)
        a = joined([a for a, _ in there])
        return _paired(like, a, block_diagonal(bs), sum(outs), like.into)

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        turned = [None if part is None else self.turn(part) for part in parts]
        return self.turn(self.join_out(turned, intos))

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        # PEFT 0.21 reads rank_pattern and then gives every module the common r.
        rank = max(len(_pair(p)[0]) for p in parts.values())
        return {key: _filled(p, rank) for key, p in parts.items()}, {"r": rank}

    def delta(self, part: Part, weight: Callable[[], Wide] | None) -> Wide:
        a, b = as_wide(*_pair(part))
        return np.asarray(need(weight) * (b @ a))


def _pair(part: Part) -> tuple[Array, Array]:
    infix = "embedding_" if "hira_embedding_A" in part.tensors else ""
    return part[f"hira_{infix}A"], part[f"hira_{infix}B"]


def _paired(part: Part, a: Array, b: Array, out: int, into: int) -> Part:
    infix = "embedding_" if "hira_embedding_A" in part.tensors else ""
    tensors = {f"hira_{infix}A": a, f"hira_{infix}B": b}
    return replace(part, tensors=tensors, out=out, into=into)


def _filled(part: Part, rank: int) -> Part:
    """Components of zeros up to a rank."""
    a, b = _pair(part)
    more = rank - len(a)
    if not more:
        return part
    a = np.concatenate([a, np.zeros((more, part.into), a.dtype)])
    b = np.concatenate([b, np.zeros((part.out, more), b.dtype)], axis=1)
    return _paired(part, a, b, part.out, part.into)


class Delora(Family):
    """``B diag(lambda / (r |a_j| |b_j|)) A`` with columns scaled by the norms that the base had."""

    types = ("DELORA",)
    title = "DeLoRA"
    prefix = "delora_"
    roles = {
        "delora_A": (None, IN),
        "delora_B": (OUT, None),
        "delora_lambda": (None,),
        "delora_w_norm": (IN,),
    }
    fields = {"r": "rank_pattern", "delora_lambda": "lambda_pattern"}
    formula = "W + B diag(λ / (r ‖a‖ ‖b‖)) A diag(w_norm)"
    rank = "r"
    table = cells(reorder_out=Cell(FAMILY), reorder_in=Cell(FAMILY), rest=Cell(LORA))

    def may_take(self, part: Part, rows: Ints | None, columns: Ints | None) -> None:
        if not is_order(rows, part.out) or not is_order(columns, part.into):
            raise NoImageError(
                "its factors are divided by their norms, which a part of them has not"
            )

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        a, b, scale, norm = (part[role] for role in self.roles)
        wide_a, wide_b, wide_scale, wide_norm = as_wide(a, b, scale, norm)
        lengths = np.linalg.norm(wide_a, axis=-1).clip(1e-4) * np.linalg.norm(wide_b, axis=-2).clip(
            1e-4
        )
        each = wide_scale / (a.shape[-2] * lengths)
        return (
            narrowed(wide_a * wide_norm[..., None, :], a, norm),
            narrowed(wide_b * each[..., None, :], b, scale),
        )
