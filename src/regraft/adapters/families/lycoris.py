"""LoHa and LoKr: Hadamard and Kronecker products of small factors.

Source: PEFT 0.21.2, ``peft/tuners/loha/layer.py``, ``peft/tuners/lokr/layer.py``.
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
from regraft.adapters.form import Array, common_dtype, rescale
from regraft.adapters.scale import Scale
from regraft.names.keys import Ints


def scale_of(settings: Mapping[str, Any]) -> Scale:
    """Rank and alpha of a module whose scale is alpha / r."""
    return Scale(settings["r"], settings["alpha"])


class LoHa(Family):
    """``scale * (w1_a w1_b) o (w2_a w2_b)``."""

    types = ("LOHA",)
    title = "LoHa"
    prefix = "hada_"
    roles = {
        "hada_w1_a": (OUT, None),
        "hada_w1_b": (None, IN),
        "hada_w2_a": (OUT, None),
        "hada_w2_b": (None, IN),
    }
    fields = {"r": "rank_pattern", "alpha": "alpha_pattern"}
    formula = "W + alpha/r (w1_a w1_b) ∘ (w2_a w2_b)"
    rank = "r²"
    table = cells(stack=Cell(LORA), rest=Cell(FAMILY))

    def sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any]
    ) -> tuple[int | None, int | None]:
        if "hada_t1" in tensors:
            return tensors["hada_w1_a"].shape[1], None
        return super().sizes(tensors, settings)

    def may_take(self, part: Part, rows: Ints | None, columns: Ints | None) -> None:
        _check_linear(part, "hada_t1")

    def turn(self, part: Part) -> Part:
        _check_linear(part, "hada_t1")
        return part.with_tensors(
            part.into,
            part.out,
            hada_w1_a=part["hada_w1_b"].T,
            hada_w1_b=part["hada_w1_a"].T,
            hada_w2_a=part["hada_w2_b"].T,
            hada_w2_b=part["hada_w2_a"].T,
        )

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        there = [p for p in parts if p is not None]
        scale = scale_of(there[0].settings)
        a1, a2 = [], []
        for part, out in zip(parts, outs, strict=True):
            if part is None:
                like = there[0]["hada_w1_a"]
                a1.append(np.zeros((out, 0), like.dtype))
                a2.append(np.zeros((out, 0), like.dtype))
                continue
            _check_linear(part, "hada_t1")
            a1.append(rescale(part["hada_w1_a"], scale_of(part.settings).ratio_to(scale))[0])
            a2.append(part["hada_w2_a"])
        b1 = joined([p["hada_w1_b"] for p in there])
        b2 = joined([p["hada_w2_b"] for p in there])
        rank = len(b1)
        settings = {**there[0].settings, "r": rank, "alpha": scale.at_rank(rank).alpha}
        made = there[0].with_tensors(
            sum(outs),
            there[0].into,
            hada_w1_a=block_diagonal(a1),
            hada_w1_b=b1,
            hada_w2_a=block_diagonal(a2),
            hada_w2_b=b2,
        )
        return replace(made, settings=settings)

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        turned = [None if part is None else self.turn(part) for part in parts]
        return self.turn(self.join_out(turned, intos))

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        _check_linear(part, "hada_t1")
        a1, b1, a2, b2 = (part[role] for role in self.roles)
        scale = scale_of(part.settings).value
        dtype = common_dtype({a1.dtype, np.dtype(np.float32)})
        columns = a1[..., :, :, None].astype(np.float64) * a2[..., :, None, :] * scale
        rows = b1[..., :, None, :].astype(np.float64) * b2[..., None, :, :]
        rank = a1.shape[-1] ** 2
        return (
            rows.reshape(*rows.shape[:-3], rank, b1.shape[-1]).astype(dtype),
            columns.reshape(*columns.shape[:-2], rank).astype(dtype),
        )

    def delta(self, part: Part, weight: Callable[[], Wide] | None) -> Wide:
        _check_linear(part, "hada_t1")
        a1, b1, a2, b2 = as_wide(*(part[role] for role in self.roles))
        return np.asarray((a1 @ b1) * (a2 @ b2) * scale_of(part.settings).value)


def _check_linear(part: Part, tensor: str) -> None:
    if tensor in part.tensors:
        raise NoImageError(
            "a convolution's kernel has a factor of its own here (use_effective_conv2d)"
        )


class LoKr(Family):
    """``scale * kron(w1, w2)``, where each may be a product of two."""

    types = ("LOKR",)
    title = "LoKr"
    prefix = "lokr_"
    fields = {"r": "rank_pattern", "alpha": "alpha_pattern"}
    formula = "W + alpha/r kron(w1, w2)"
    rank = "rank w1 · rank w2"
    table = cells(
        transpose=Cell(FAMILY),
        rest=Cell(LORA),
    )

    def sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any]
    ) -> tuple[int | None, int | None]:
        if "lokr_t2" in tensors or any(t.ndim != 2 for t in tensors.values()):
            return None, None
        (b1, a1), (b2, a2) = (_ends(tensors, name) for name in ("lokr_w1", "lokr_w2"))
        return b1 * b2, a1 * a2

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        raise NoImageError("how its factors are cut depends on the whole matrix")

    def turn(self, part: Part) -> Part:
        _check_linear(part, "lokr_t2")
        swap = {"a": "b", "b": "a"}
        tensors = {
            name[:-1] + swap[name[-1]] if name[-2] == "_" else name: tensor.T
            for name, tensor in part.tensors.items()
        }
        return replace(part, tensors=tensors, out=part.into, into=part.out)

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        _check_linear(part, "lokr_t2")
        b1, a1 = _factors(part.tensors, "lokr_w1")
        b2, a2 = _factors(part.tensors, "lokr_w2")
        b = _kron(b1, b2) * scale_of(part.settings).value
        like = next(iter(part.tensors.values()))
        return narrowed(_kron(a1, a2), like), narrowed(b, like)


def _ends(tensors: Mapping[str, Array], name: str) -> tuple[int, int]:
    if name in tensors:
        return tensors[name].shape[0], tensors[name].shape[1]
    return tensors[name + "_a"].shape[0], tensors[name + "_b"].shape[1]


def _factors(tensors: Mapping[str, Array], name: str) -> tuple[Wide, Wide]:
    """A factor as a product: itself beside the identity where it is whole."""
    if name not in tensors:
        b, a = as_wide(tensors[name + "_a"], tensors[name + "_b"])
        return b, a
    (whole,) = as_wide(tensors[name])
    rows, columns = whole.shape[-2:]
    if rows <= columns:
        return np.broadcast_to(np.eye(rows), (*whole.shape[:-2], rows, rows)), whole
    return whole, np.broadcast_to(np.eye(columns), (*whole.shape[:-2], columns, columns))


def _kron(first: Wide, second: Wide) -> Wide:
    product = first[..., :, None, :, None] * second[..., None, :, None, :]
    head = product.shape[:-4]
    rows = first.shape[-2] * second.shape[-2]
    return np.asarray(product.reshape(*head, rows, first.shape[-1] * second.shape[-1]))
