"""GLoRA.

Source: PEFT 0.21.2, ``peft/tuners/glora/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    DENSE,
    FAMILY,
    IN,
    NONE,
    OUT,
    RANK,
    Cell,
    Dims,
    Family,
    Part,
    Sizes,
    UnreadableError,
    Weight,
    Wide,
    cells,
    each,
    need,
    present,
    same_bits,
    tensors_of,
)
from regraft.adapters.families.low_rank import laid_out
from regraft.adapters.form import Array
from regraft.names.keys import Ints

_BIAS = "it changes the bias, which would be added once for each piece"

_NO_BIAS = "it changes the module's bias, and nothing of the other layout has one"


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
        split_out=FAMILY,
        reorder_out=FAMILY,
        reorder_in=FAMILY,
        join_in=Cell(NONE, FAMILY, "it does not change biases"),
        split_in=Cell(NONE, FAMILY, "it does not change biases"),
        transpose=Cell(NONE, FAMILY, "it does not change biases"),
        stack=Cell(NONE, DENSE, "it does not change biases"),
    )

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        for letter in "AB":
            if not any(f"glora_{letter}.{end}" in tensors for end in ("Xd", "X", "zeros")):
                raise UnreadableError(f"glora_{letter} is missing")
        return super().sizes(tensors, settings)

    @classmethod
    def dims(cls, role: str, tensor: Array) -> Dims | None:
        letter, _, end = role.removeprefix("glora_").partition(".")
        if letter == "C":
            return (None, None) if end == "Xu" else (IN, None)
        if letter in ("D", "E"):
            return (OUT,) if end == "zeros" or tensor.size > 1 else (None,)
        if end == "X":
            return (OUT, None) if tensor.ndim == 2 else (None,)
        return {"Xd": (OUT, RANK), "Xu": (RANK, IN), "zeros": (OUT, IN)}[end]

    def may_take(self, part: Part, rows: Ints | None, columns: Ints | None) -> None:
        if columns is not None and len(columns) != part.into:
            self._keep_bias(part, _BIAS)

    def turn(self, part: Part) -> Part:
        self._keep_bias(part, "what stands on out would have to stand on in")
        tensors = {}
        for role, tensor in part.tensors.items():
            name, _, end = role.partition(".")
            if name in ("glora_A", "glora_B"):
                if end == "X" and tensor.ndim == 2:
                    raise self.refusal("its factors stand on out, and would have to stand on in")
                end = {"Xd": "Xu", "Xu": "Xd"}.get(end, end)
                tensors[f"{name}.{end}"] = tensor.T
            else:
                shape = tuple(
                    {OUT: part.into, IN: part.out}.get(along or "", size)
                    for along, size in zip(self.along(role, tensor), tensor.shape, strict=True)
                )
                tensors[role] = np.zeros(shape, tensor.dtype)
        return part.with_tensors(part.into, part.out, **tensors)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        there = present(parts)
        first = there[0]
        tensors = {}
        for role, tensor in first.tensors.items():
            dims = self.along(role, tensor)
            if OUT in dims or RANK in dims:
                tensors[role] = laid_out(tensors_of(parts, role), dims, OUT, outs)
                continue
            idle = not any(_works(p, role[:7]) for p in there)
            alike = len(there) == len(parts) and same_bits([p[role] for p in there])
            if not idle and not alike:
                raise self.refusal("the parts change by different numbers")
            tensors[role] = tensor
        return first.grown(OUT, sum(outs), **tensors)

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        return self.turn(self.join_out(each(self.turn, parts), intos))

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        ranks = [
            p[role].shape[1] for p in parts.values() for role in p.tensors if role.endswith("Xd")
        ]
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

    def delta(self, part: Part, weight: Weight) -> Wide:
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
            raise self.refusal(why)


def _works(part: Part, name: str) -> bool:
    """Whether a letter is anything but zero."""
    found = [tensor for role, tensor in part.tensors.items() if role.startswith(name)]
    return bool(found) and all(tensor.any() for tensor in found)
