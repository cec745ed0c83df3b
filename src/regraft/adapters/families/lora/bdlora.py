"""BdLoRA.

Source: PEFT 0.21.2, ``peft/tuners/lora/{layer,variants}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    LORA,
    Pair,
    Part,
    Sizes,
    Weight,
    block_diagonal,
    cells,
)
from regraft.adapters.families.lora_variants import LoraVariant
from regraft.adapters.form import Array, rescale


class BdLora(LoraVariant):
    """A LoRA with one block-diagonal factor, of which the blocks are stored one below the other."""

    title = "BdLoRA"
    switches = ("use_bdlora",)
    formula = "W + scale · B A, A or B block-diagonal"
    rank = "r"
    fixed = "its config names modules by parts of their names"
    table = cells(rename=LORA, rest=LORA)

    def varies(self) -> bool:
        return True

    def settings(self, path: str) -> dict[str, Any]:
        return {**super().settings(path), "name": path.rpartition(".")[2]}

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        a, b = self._dense(tensors, settings["name"])
        return b.shape[-2], a.shape[-1]

    def rename(self, part: Part, old: str, new: str) -> Part:
        raise self.refusal(self.fixed)

    def _dense(self, tensors: Mapping[str, Array], name: str) -> Pair:
        options = self.config["use_bdlora"]
        count = int(options.get("nblocks") or 1)
        found = {}
        for role, field in (("A", "target_modules_bd_a"), ("B", "target_modules_bd_b")):
            tensor = tensors[role]
            if any(text in name for text in options.get(field) or ()):
                tensor = block_diagonal(np.split(tensor, count))
            found[role] = tensor
        return found["A"], found["B"]

    def lora(self, part: Part, weight: Weight) -> Pair:
        a, b = self._dense(part.tensors, part.settings["name"])
        return a, rescale(b, self.scale(part).value)[0]
