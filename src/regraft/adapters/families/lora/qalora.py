"""QA-LoRA.

Source: PEFT 0.21.2, ``peft/tuners/lora/{layer,variants}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    FAMILY,
    LORA,
    RANK,
    Cell,
    Pair,
    Part,
    Sizes,
    Weight,
    as_wide,
    cells,
    narrowed,
)
from regraft.adapters.families.lora_variants import LoraVariant
from regraft.adapters.form import Array
from regraft.names.keys import Ints


class QaLora(LoraVariant):
    """A LoRA that reads the mean of each group of inputs, times the number of groups; A is (r, in/group)."""

    title = "QA-LoRA"
    switches = ("use_qalora",)
    roles = {**LoraVariant.roles, "A": (RANK, None)}
    formula = "W + scale · B A (sums of groups) · in/group²"
    rank = "r"
    table = cells(join_out=FAMILY, split_out=FAMILY, reorder_out=FAMILY, rest=Cell(LORA))

    @property
    def _group(self) -> int:
        return int(self.config.get("qalora_group_size") or 16)

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        out, _ = super().sizes(tensors, settings)
        return out, tensors["A"].shape[1] * self._group

    def may_take(self, part: Part, rows: Ints | None, columns: Ints | None) -> None:
        super().may_take(part, rows, columns)
        if columns is not None:
            raise self.refusal("its inputs are put together in groups")

    def turn(self, part: Part) -> Part:
        raise self.refusal("its inputs are put together in groups")

    def lora(self, part: Part, weight: Weight) -> Pair:
        a, b = super().lora(part, weight)
        (wide,) = as_wide(a)
        spread = np.repeat(wide, self._group, axis=-1) * (wide.shape[-1] / self._group)
        return narrowed(spread, a), b
