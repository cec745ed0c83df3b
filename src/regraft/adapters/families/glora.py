"""Families that change biases: BEFT adds to them, GLoRA changes weight and bias together.

Source: PEFT 0.21.2, ``peft/tuners/{beft,glora}/layer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    DENSE,
    FAMILY,
    NONE,
    OUT,
    Cell,
    Family,
    NoImageError,
    Part,
    UnreadableError,
    Wide,
    block_diagonal,
    cells,
    joined,
    need,
    same_bits,
)
from regraft.adapters.form import Array
from regraft.names.keys import Ints

_BIAS = "it changes the bias, which would be added once for each piece"
_NO_BIAS = "it changes the module's bias, and nothing of the other layout has one"


class Beft(Family):
    """Adds to the bias."""

    types = ("BEFT",)
    title = "BEFT"
    prefix = "beft_"
    roles = {"beft_bias": (None, OUT)}
    formula = "W, and the bias + beft_bias"
    changes_bias = True
    table = cells(
        join_out=Cell(FAMILY),
        split_out=Cell(FAMILY),
        reorder_out=Cell(FAMILY),
        reorder_in=Cell(FAMILY),
        rest=Cell(NONE),
    )

    def may_take(self, part: Part, rows: Ints | None, columns: Ints | None) -> None:
        if columns is not None and len(columns) != part.into:
            raise NoImageError(_BIAS)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        first = next(p for p in parts if p is not None)
        made = [
            np.zeros((1, out), first["beft_bias"].dtype) if p is None else p["beft_bias"]
            for p, out in zip(parts, outs, strict=True)
        ]
        return first.with_tensors(sum(outs), first.into, beft_bias=joined(made, axis=1))

    def delta(self, part: Part, weight: Callable[[], Wide] | None) -> Wide:
        return np.zeros((part.out, part.into))

    def bias(self, part: Part, bias: Wide) -> Wide:
        return np.asarray(bias + part["beft_bias"].astype(np.float64).reshape(-1))

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        raise NoImageError(_NO_BIAS)


class GLora(Family):
    """``W + W o A + B`` and ``b + b o D + E + W C``.

    Every letter is a product of two factors, a vector, one number, or nothing.
    """

    types = ("GLORA",)
    title = "GLoRA"
    prefix = "glora_"
    formula = "W + W ∘ A + B, and the bias + b ∘ D + E + W C"
    adds = False
    changes_bias = True
    batches = False
    table = cells(
        join_out=Cell(NONE, FAMILY, "C and single numbers are the same in all parts"),
        split_out=Cell(FAMILY),
        reorder_out=Cell(FAMILY),
        reorder_in=Cell(FAMILY),
        join_in=Cell(NONE, FAMILY, "it does not change biases"),
        split_in=Cell(NONE, FAMILY, "it does not change biases"),
        transpose=Cell(NONE, FAMILY, "it does not change biases"),
        stack=Cell(NONE, DENSE, "it does not change biases"),
    )

    def sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any]
    ) -> tuple[int | None, int | None]:
        out = into = None
        for letter in "AB":
            if f"glora_{letter}.Xd" in tensors:
                out = tensors[f"glora_{letter}.Xd"].shape[0]
                into = tensors[f"glora_{letter}.Xu"].shape[1]
            elif f"glora_{letter}.zeros" in tensors:
                out, into = tensors[f"glora_{letter}.zeros"].shape
            elif f"glora_{letter}.X" not in tensors:
                raise UnreadableError(f"glora_{letter} is missing")
            elif tensors[f"glora_{letter}.X"].ndim == 2:
                out = tensors[f"glora_{letter}.X"].shape[0]
        for role, tensor in tensors.items():
            if role in ("glora_C.Xd", "glora_C.X", "glora_C.zeros"):
                into = tensor.shape[0]
            if role[:8] in ("glora_D.", "glora_E.") and (tensor.size > 1 or role.endswith("zeros")):
                out = tensor.shape[0]
        return out, into

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        if columns is not None and len(columns) != part.into:
            self._keep_bias(part, _BIAS)
        tensors = {}
        for role, tensor in part.tensors.items():
            for dim, along in enumerate(_along(role, tensor)):
                index = rows if along == "out" else columns if along == "in" else None
                if index is not None:
                    tensor = tensor.take(index, axis=dim)
            tensors[role] = tensor
        out = part.out if rows is None else len(rows)
        into = part.into if columns is None else len(columns)
        return part.with_tensors(out, into, **tensors)

    def turn(self, part: Part) -> Part:
        self._keep_bias(part, "what stands on out would have to stand on in")
        tensors = {}
        for role, tensor in part.tensors.items():
            name, _, end = role.partition(".")
            if name in ("glora_A", "glora_B"):
                if end == "X" and tensor.ndim == 2:
                    raise NoImageError("its factors stand on out, and would have to stand on in")
                end = {"Xd": "Xu", "Xu": "Xd"}.get(end, end)
                tensors[f"{name}.{end}"] = tensor.T
            else:
                shape = tuple(
                    {"out": part.into, "in": part.out}.get(along or "", size)
                    for along, size in zip(_along(role, tensor), tensor.shape, strict=True)
                )
                tensors[role] = np.zeros(shape, tensor.dtype)
        return part.with_tensors(part.into, part.out, **tensors)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        there = [p for p in parts if p is not None]
        first = there[0]
        whole = len(there) == len(parts)
        tensors = {}
        for role, tensor in first.tensors.items():
            own = [p[role] for p in there]
            if role in ("glora_A.Xu", "glora_B.Xu"):
                tensors[role] = joined(own)
                continue
            if "out" not in _along(role, tensor):
                idle = not any(_works(p, role[:7]) for p in there)
                if not idle and not (whole and same_bits(own)):
                    raise NoImageError("the parts change by different numbers")
                tensors[role] = tensor
                continue
            blocks = [
                np.zeros(_shape_for(role, tensor, out), tensor.dtype) if p is None else p[role]
                for p, out in zip(parts, outs, strict=True)
            ]
            tensors[role] = block_diagonal(blocks) if role.endswith("Xd") else joined(blocks)
        return first.with_tensors(sum(outs), first.into, **tensors)

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        turned = [None if part is None else self.turn(part) for part in parts]
        return self.turn(self.join_out(turned, intos))

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        ranks = [p[role].shape[1] for p in parts.values() for role in _XD if role in p.tensors]
        if not ranks:
            return parts, {}
        rank = max(ranks)
        made = {}
        for key, part in parts.items():
            tensors = {}
            for role, tensor in part.tensors.items():
                if role.endswith("Xd"):
                    tensor = np.pad(tensor, [(0, 0), (0, rank - tensor.shape[1])])
                elif role.endswith("Xu"):
                    tensor = np.pad(tensor, [(0, rank - tensor.shape[0]), (0, 0)])
                tensors[role] = tensor
            made[key] = part.with_tensors(part.out, part.into, **tensors)
        return made, {"r": rank}

    def delta(self, part: Part, weight: Callable[[], Wide] | None) -> Wide:
        self._keep_bias(part, _NO_BIAS)
        a, b = (self._matrix(part, f"glora_{letter}") for letter in "AB")
        if a.any():
            return np.asarray(need(weight) * a + b)
        return b

    def _matrix(self, part: Part, name: str) -> Wide:
        tensors = part.tensors
        if f"{name}.Xd" in tensors:
            return np.asarray(
                tensors[f"{name}.Xd"].astype(np.float64) @ tensors[f"{name}.Xu"].astype(np.float64)
            )
        given = tensors.get(f"{name}.X", tensors.get(f"{name}.zeros"))
        assert given is not None
        return np.asarray(np.broadcast_to(given.astype(np.float64), (part.out, part.into)))

    def _keep_bias(self, part: Part, why: str) -> None:
        """Raise where a bias changes."""
        if any(_works(part, f"glora_{letter}") for letter in "CDE"):
            raise NoImageError(why)


_XD = ("glora_A.Xd", "glora_B.Xd", "glora_C.Xd")


def _works(part: Part, name: str) -> bool:
    """Whether a letter is anything but zero."""
    found = [tensor for role, tensor in part.tensors.items() if role.startswith(name)]
    return bool(found) and all(tensor.any() for tensor in found)


def _along(role: str, tensor: Array) -> tuple[str | None, ...]:
    """Which dims of a tensor run along out and in."""
    name, _, end = role.partition(".")
    if name == "glora_C":
        return (None, None) if end == "Xu" else ("in", None)
    if name in ("glora_D", "glora_E"):
        return ("out",) if end == "zeros" or tensor.size > 1 else (None,)
    if end == "X":
        return ("out", None) if tensor.ndim == 2 else (None,)
    return {"Xd": ("out", None), "Xu": (None, "in"), "zeros": ("out", "in")}[end]


def _shape_for(role: str, like: Array, out: int) -> tuple[int, ...]:
    """The shape of a part's tensor that is not adapted."""
    if role.endswith("Xd"):
        return out, 0
    return out, *like.shape[1:]
