"""SuperTuning: trained numbers at stored places of the weight, and a LoRA beside them.

Source: PEFT 0.21.2, ``peft/tuners/supertuning/layer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    DENSE,
    FAMILY,
    IN,
    OUT,
    Cell,
    Family,
    NoImageError,
    Part,
    Wide,
    block_diagonal,
    cells,
    joined,
)
from regraft.adapters.form import Array, rescale
from regraft.names.keys import Ints

_A, _B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"


class SuperTuning(Family):
    """Values are added at places of the flattened weight; PEFT expects ``int(size * (1 - sparsity))`` of them."""

    types = ("SUPERTUNING",)
    title = "SuperTuning"
    prefix = "supertuning_"
    roles = {
        "supertuning_values": (None,),
        "supertuning_indices": (None,),
        _A: (None, IN),
        _B: (OUT, None),
    }
    formula = "W + single elements + alpha/r · B A"
    batches = False
    table = cells(stack=Cell(DENSE), rest=Cell(FAMILY))

    def _places(self, part: Part) -> Ints:
        """(2, n): rows and columns."""
        if "supertuning_indices" not in part.tensors:
            raise NoImageError(
                "its places are not in the file, and go by the size of the base's numbers; load it with PEFT, set "
                "save_precomputed_indices and save it again"
            )
        return np.stack(np.divmod(part["supertuning_indices"].astype(np.int64), part.into))

    def _made(
        self, part: Part, out: int, into: int, places: Ints, values: Array, lora: list[Array]
    ) -> Part:
        flat = (places[0] * into + places[1]).astype(part["supertuning_indices"].dtype)
        tensors = {"supertuning_values": values, "supertuning_indices": flat}
        return part.with_tensors(out, into, **tensors, **dict(zip((_A, _B), lora, strict=False)))

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        places, values = self._places(part), part["supertuning_values"]
        sizes = [part.out, part.into]
        lora = [part[role] for role in (_A, _B) if role in part.tensors]
        for axis, index in enumerate((rows, columns)):
            if index is None:
                continue
            new = np.full(sizes[axis], -1)
            new[index] = np.arange(len(index))
            sizes[axis] = len(index)
            kept = new[places[axis]] >= 0
            places, values = places[:, kept], values[kept]
            places[axis] = new[places[axis]]
            if lora:
                lora[1 - axis] = lora[1 - axis].take(index, axis=axis)
        return self._made(part, sizes[0], sizes[1], places, values, lora)

    def turn(self, part: Part) -> Part:
        places = self._places(part)[::-1]
        lora = [part[role].T for role in (_B, _A) if role in part.tensors]
        return self._made(part, part.into, part.out, places, part["supertuning_values"], lora)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        there = [p for p in parts if p is not None]
        first = there[0]
        starts = np.cumsum([0, *outs])
        places = [
            self._places(part) + np.array([[start], [0]])
            for part, start in zip(parts, starts, strict=False)
            if part is not None
        ]
        lora = []
        if _A in first.tensors:
            blocks = [
                np.zeros((out, 0), first[_B].dtype) if p is None else p[_B]
                for p, out in zip(parts, outs, strict=True)
            ]
            lora = [joined([p[_A] for p in there]), block_diagonal(blocks)]
        values = joined([p["supertuning_values"] for p in there])
        return self._made(
            first, sum(outs), first.into, np.concatenate(places, axis=1), values, lora
        )

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        turned = [None if part is None else self.turn(part) for part in parts]
        return self.turn(self.join_out(turned, intos))

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        wanted = {key: len(p["supertuning_values"]) for key, p in parts.items()}
        sizes = {key: p.out * p.into for key, p in parts.items()}
        sparsity = float(self.config["sparsity"])
        if any(int(sizes[key] * (1 - sparsity)) < wanted[key] for key in parts):
            # Half a place more than the fullest one has, so that rounding down finds them all.
            sparsity = min(1 - (wanted[key] + 0.5) / sizes[key] for key in parts)
        if sparsity < 0:
            raise NoImageError("its modules would need more elements than the weight has")
        changes: dict[str, Any] = {"sparsity": sparsity}
        rank = max((len(p[_A]) for p in parts.values() if _A in p.tensors), default=None)
        if rank is not None:
            old = int(self.config["r"])
            changes |= {"r": rank, "lora_alpha": self.config["lora_alpha"] * rank / old}
        made = {}
        for key, part in parts.items():
            tensors = _padded(part, int(sizes[key] * (1 - sparsity)))
            if rank is not None:
                more = rank - len(part[_A])
                tensors[_A] = np.pad(part[_A], [(0, more), (0, 0)])
                tensors[_B] = np.pad(part[_B], [(0, 0), (0, more)])
            made[key] = part.with_tensors(part.out, part.into, **tensors)
        return made, changes

    def delta(self, part: Part, weight: Callable[[], Wide] | None) -> Wide:
        made = np.zeros((part.out, part.into))
        np.add.at(made, tuple(self._places(part)), part["supertuning_values"].astype(np.float64))
        if _A in part.tensors:
            scale = float(self.config["lora_alpha"]) / int(self.config["r"])
            b = rescale(part[_B].astype(np.float64), scale)[0]
            made += b @ part[_A].astype(np.float64)
        return made

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        self._places(part)
        raise NoImageError("single elements are no LoRA of lower rank")


def _padded(part: Part, count: int) -> dict[str, Array]:
    """Zeros at free places until there are as many as PEFT expects."""
    places, values = part["supertuning_indices"], part["supertuning_values"]
    missing = count - len(values)
    free = np.setdiff1d(np.arange(part.out * part.into), places)[:missing]
    return {
        "supertuning_indices": np.concatenate([places, free.astype(places.dtype)]),
        "supertuning_values": np.concatenate([values, np.zeros(missing, values.dtype)]),
    }
