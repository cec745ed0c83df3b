"""SuperTuning.

Source: PEFT 0.21.2, ``peft/tuners/supertuning/layer.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    DENSE,
    FAMILY,
    IN,
    OUT,
    RANK,
    Pair,
    Part,
    Weight,
    Wide,
    cells,
    each,
    present,
)
from regraft.adapters.families.elements import Elements, join_below, join_beside
from regraft.adapters.families.low_rank import LowRank
from regraft.adapters.form import rescale
from regraft.names.keys import Ints

_A, _B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"


class SuperTuning(LowRank):
    """A value for some elements of the weight, and a LoRA beside them.

    Places are those of the flattened weight; PEFT expects ``int(size * (1 - sparsity))`` of them.
    """

    types = ("SUPERTUNING",)
    title = "SuperTuning"
    prefix = "supertuning_"
    roles = {_A: (RANK, IN), _B: (OUT, RANK)}
    formula = "W + single elements + alpha/r · B A"
    batches = False
    table = cells(stack=DENSE, rest=FAMILY)

    def elements(self, part: Part) -> Elements:
        """The single elements of a module."""
        if "supertuning_indices" not in part.tensors:
            raise self.refusal(
                "its places are not in the file, and go by the size of the base's numbers; load it with PEFT, set "
                "save_precomputed_indices and save it again"
            )
        flat = part["supertuning_indices"].astype(np.int64)
        places = np.stack(np.divmod(flat, part.into))
        return Elements(places, part["supertuning_values"], part.out, part.into)

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        made = self.elements(part).take(rows, columns)
        return _both(part, made, super().take(_factors(part), rows, columns))

    def turn(self, part: Part) -> Part:
        return _both(part, self.elements(part).turn(), super().turn(_factors(part)))

    def join_ranks(self, parts: Sequence[Part | None], sizes: Sequence[int], along: str) -> Part:
        join = join_below if along == OUT else join_beside
        made = join(each(self.elements, parts), sizes)
        factors = super().join_ranks(each(_factors, parts), sizes, along)
        return _both(present(parts)[0], made, factors)

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        wanted = {key: len(p["supertuning_values"]) for key, p in parts.items()}
        sizes = {key: p.out * p.into for key, p in parts.items()}
        sparsity = float(self.config["sparsity"])
        if any(int(sizes[key] * (1 - sparsity)) < wanted[key] for key in parts):
            # Half a place more than the fullest one has, so that rounding down finds them all.
            sparsity = min(1 - (wanted[key] + 0.5) / sizes[key] for key in parts)
        if sparsity < 0:
            raise self.refusal("its modules would need more elements than the weight has")
        changes: dict[str, Any] = {"sparsity": sparsity}
        ranks = [self.rank_of(_factors(p)) for p in parts.values() if _A in p.tensors]
        rank = max(ranks, default=0)
        if ranks:
            old = int(self.config["r"])
            changes |= {"r": rank, "lora_alpha": self.config["lora_alpha"] * rank / old}
        made = {}
        for key, part in parts.items():
            elements = self.elements(part).padded(int(sizes[key] * (1 - sparsity)))
            made[key] = _both(part, elements, self.padded(_factors(part), rank))
        return made, changes

    def delta(self, part: Part, weight: Weight) -> Wide:
        made = self.elements(part).dense()
        if _A in part.tensors:
            scale = float(self.config["lora_alpha"]) / int(self.config["r"])
            b = rescale(part[_B].astype(np.float64), scale)[0]
            made += b @ part[_A].astype(np.float64)
        return made

    def lora(self, part: Part, weight: Weight) -> Pair:
        self.elements(part)
        raise self.refusal("single elements are no LoRA of lower rank")


def _factors(part: Part) -> Part:
    """The LoRA alone, where there is one."""
    tensors = {role: tensor for role, tensor in part.tensors.items() if role in (_A, _B)}
    return part.with_tensors(part.out, part.into, **tensors)


def _both(like: Part, elements: Elements, factors: Part) -> Part:
    """Elements with their places in the flattened weight, and the LoRA."""
    flat = elements.places[0] * elements.into + elements.places[1]
    tensors = {
        "supertuning_values": elements.values,
        "supertuning_indices": flat.astype(like["supertuning_indices"].dtype),
        **factors.tensors,
    }
    return factors.with_tensors(elements.out, elements.into, **tensors)
