"""Families whose delta is a function of the base weight: DEFT and PEANuT.

Source: PEFT 0.21.2, ``peft/tuners/{deft,peanut}/layer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    BASE,
    FAMILY,
    IN,
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
    same_bits,
)
from regraft.adapters.form import Array, rescale
from regraft.names.keys import Ints

_ALIKE = "all parts are adapted, with the same tensors"


class Deft(Family):
    """``P (scale R - right.T W)`` where right is P's positive part, or both are an orthonormal basis of P."""

    types = ("DEFT",)
    title = "DEFT"
    prefix = "deft_"
    roles = {"deft_P": (OUT, None), "deft_R": (None, IN)}
    fields = {"r": None, "alpha": None}
    formula = "W + Q (scale R − Q₊ᵀ W), Q of P"
    rank = "r"
    adds = False
    batches = False
    table = cells(
        join_out=Cell(BASE, FAMILY, "decomposition_method is 'relu'"),
        reorder_out=Cell(BASE, FAMILY, "decomposition_method is 'relu'"),
        split_in=Cell(FAMILY),
        reorder_in=Cell(FAMILY),
        join_in=Cell(BASE, FAMILY, "all parts are adapted, with the same P"),
        rest=Cell(BASE),
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
            raise NoImageError("what it takes off goes by all rows of the base", needs_base=True)

    def turn(self, part: Part) -> Part:
        raise NoImageError("what it takes off goes by the rows of the base", needs_base=True)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        if not self._plain:
            raise NoImageError(
                "a basis of several parts is not those of the parts", needs_base=True
            )
        there = [p for p in parts if p is not None]
        first = there[0]
        blocks = [
            np.zeros((out, 0), first["deft_P"].dtype) if p is None else p["deft_P"]
            for p, out in zip(parts, outs, strict=True)
        ]
        tensors = {"deft_P": block_diagonal(blocks)}
        scale = self._scale(first)
        if "deft_R" in first.tensors:
            tensors["deft_R"] = joined(
                [rescale(p["deft_R"], self._scale(p) / scale)[0] for p in there]
            )
        joint = first.with_tensors(sum(outs), first.into, **tensors)
        return replace(joint, settings={**first.settings, "scale": scale})

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        there = [p for p in parts if p is not None]
        if len(there) < len(parts) or not same_bits([p["deft_P"] for p in there]):
            raise NoImageError("the parts lose different directions", needs_base=True)
        tensors = {"deft_P": there[0]["deft_P"]}
        if "deft_R" in there[0].tensors:
            tensors["deft_R"] = joined([p["deft_R"] for p in there], axis=1)
        return there[0].with_tensors(there[0].out, sum(intos), **tensors)

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        rank = max(int(self.config["r"]), *(p["deft_P"].shape[1] for p in parts.values()))
        alpha = self.config.get("alpha")
        if alpha:
            first = next(iter(parts.values()))
            alpha = self._scale(first) * min(rank, first.out)
        made = {}
        for key, part in parts.items():
            # PEFT gives no module a higher rank than it has rows.
            wanted = min(rank, part.out)
            more = wanted - part["deft_P"].shape[1]
            if more < 0 or (more and not self._plain):
                raise NoImageError("all modules share one r", needs_base=True)
            tensors = {"deft_P": np.pad(part["deft_P"], [(0, 0), (0, more)])}
            if "deft_R" in part.tensors:
                ratio = self._scale(part) * wanted / alpha if alpha else 1.0
                r = np.pad(part["deft_R"], [(0, more), (0, 0)])
                tensors["deft_R"] = rescale(r, ratio)[0]
            made[key] = part.with_tensors(part.out, part.into, **tensors)
        return made, {"r": rank, "alpha": alpha}

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        base = need(weight, "it takes a part of the base weight off")
        (p,) = as_wide(part["deft_P"])
        q, right = (p, p.clip(0)) if self._plain else (np.linalg.qr(p)[0],) * 2
        a = -right.T @ base
        if "deft_R" in part.tensors:
            a = a + part["deft_R"].astype(np.float64) * self._scale(part)
        return narrowed(a, part["deft_P"]), narrowed(q, part["deft_P"])


_FUNCTIONS: Mapping[str, Callable[[Wide], Wide]] = {
    "relu": lambda x: x.clip(0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)),
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "swish": lambda x: x / (1.0 + np.exp(-x)),
    "relu6": lambda x: x.clip(0, 6),
    "linear": lambda x: x,
}


class Peanut(Family):
    """``scaling B f(A W)``: a small network that reads every column of the base weight by itself."""

    types = ("PEANUT",)
    title = "PEANuT"
    prefix = "peanut_"
    formula = "W + scaling · B f(A W)"
    rank = "r"
    adds = False
    batches = False
    table = cells(
        join_out=Cell(FAMILY),
        reorder_out=Cell(FAMILY),
        split_in=Cell(FAMILY),
        reorder_in=Cell(FAMILY),
        join_in=Cell(BASE, FAMILY, _ALIKE),
        rest=Cell(BASE),
    )

    def sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any]
    ) -> tuple[int | None, int | None]:
        return tensors["peanut_B.weight"].shape[0], None

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        tensors = dict(part.tensors)
        if rows is not None:
            if not is_order(rows, part.out):
                raise NoImageError("its network reads whole columns of the base", needs_base=True)
            tensors["peanut_A.weight"] = tensors["peanut_A.weight"][:, rows]
            tensors["peanut_B.weight"] = tensors["peanut_B.weight"][rows]
        into = part.into if columns is None else len(columns)
        return part.with_tensors(part.out, into, **tensors)

    def turn(self, part: Part) -> Part:
        raise NoImageError("its network reads columns of the base", needs_base=True)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        there = [p for p in parts if p is not None]
        first = there[0]
        tensors = {}
        for role, tensor in first.tensors.items():
            blocks = [None if p is None else p[role] for p in parts]
            filled = [
                _nothing(role, out, tensor) if block is None else block
                for block, out in zip(blocks, outs, strict=True)
            ]
            tensors[role] = block_diagonal(filled)
        return first.with_tensors(sum(outs), first.into, **tensors)

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        there = [p for p in parts if p is not None]
        if len(there) < len(parts) or any(
            not same_bits([p[role] for p in there]) for role in there[0].tensors
        ):
            raise NoImageError("the parts are read by different networks", needs_base=True)
        return there[0].with_tensors(there[0].out, sum(intos), **there[0].tensors)

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        rank = max(p["peanut_B.weight"].shape[1] for p in parts.values())
        made = {}
        for key, part in parts.items():
            more = rank - part["peanut_B.weight"].shape[1]
            tensors = {}
            for role, tensor in part.tensors.items():
                down = 0 if role == "peanut_B.weight" else more
                right = 0 if role == "peanut_A.weight" else more
                tensors[role] = np.pad(tensor, [(0, down), (0, right)])
            made[key] = part.with_tensors(part.out, part.into, **tensors)
        return made, {"r": rank}

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        name = self.config["act_fn"]
        if name not in _FUNCTIONS:
            raise NoImageError(f"regraft does not know the activation {name!r} that it uses")
        function = _FUNCTIONS[name]
        tensors = {role: tensor.astype(np.float64) for role, tensor in part.tensors.items()}
        hidden = function(
            tensors["peanut_A.weight"] @ need(weight, "its network reads the base weight")
        )
        depth = int(self.config["depth"])
        passed = []
        for number in range(depth):
            passed.append(hidden)
            hidden = function(tensors[f"peanut_encoders.{number}.weight"] @ hidden)
        for number in range(depth):
            hidden = function(tensors[f"peanut_decoders.{number}.weight"] @ hidden) + passed.pop()
        like = part["peanut_B.weight"]
        b = tensors["peanut_B.weight"] * float(self.config["scaling"])
        return narrowed(hidden, like), narrowed(b, like)


def _nothing(role: str, out: int, like: Array) -> Array:
    """A block of a part that is not adapted."""
    shape = {"peanut_A.weight": (0, out), "peanut_B.weight": (out, 0)}.get(role, (0, 0))
    return np.zeros(shape, like.dtype)
