"""VB-LoRA.

Source: PEFT 0.21.2, ``peft/tuners/vblora/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    FAMILY,
    IN,
    LORA,
    OUT,
    RANK,
    Cell,
    NoImageError,
    Pair,
    Part,
    Sizes,
    UnreadableError,
    Weight,
    Wide,
    as_wide,
    cells,
    narrowed,
    whole_groups,
)
from regraft.adapters.families.low_rank import LowRank
from regraft.adapters.form import Array
from regraft.names.keys import Ints
from regraft.values import replace


class VbLora(LowRank):
    """LoRA factors put together from the vectors of a bank, which all modules share."""

    types = ("VBLORA",)
    title = "VB-LoRA"
    prefix = "vblora_"
    roles = {
        "vblora_logits_A": (RANK, IN, None),
        "vblora_logits_B": (OUT, RANK, None),
        "vblora_logits_A_topk_indices": (RANK, IN, None),
        "vblora_logits_B_topk_indices": (OUT, RANK, None),
        "vblora_logits_A_topk_weights": (RANK, IN, None),
        "vblora_logits_B_topk_weights": (OUT, RANK, None),
    }
    shared = ("base_model.vblora_vector_bank",)
    formula = "W + B A, both of vectors of one bank"
    rank = "r"
    table = cells(
        join_out=Cell(LORA, FAMILY, "all parts are adapted, with the same other factor"),
        join_in=Cell(LORA, FAMILY, "all parts are adapted, with the same other factor"),
        split_out=Cell(LORA, FAMILY, "vectors stay whole"),
        split_in=Cell(LORA, FAMILY, "vectors stay whole"),
        reorder_out=Cell(LORA, FAMILY, "vectors stay whole"),
        reorder_in=Cell(LORA, FAMILY, "vectors stay whole"),
        transpose=FAMILY,
        stack=LORA,
    )

    @property
    def _length(self) -> int:
        return int(self.config["vector_length"])

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        out, into = super().sizes(tensors, settings)
        if out is None or into is None:
            raise UnreadableError("its logits of A or of B are missing")
        for name in ("vblora_logits_A", "vblora_logits_B"):
            if name in tensors:
                self.check_field("num_vectors", tensors[name].shape[2], settings)
        return out * self._length, into * self._length

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        vectors = [None if index is None else self._vectors(index) for index in (rows, columns)]
        made = super().take(part, *vectors)
        out = part.out if rows is None else len(rows)
        into = part.into if columns is None else len(columns)
        return replace(made, out=out, into=into)

    def _vectors(self, index: Ints) -> Ints:
        vectors = whole_groups(index, self._length)
        if vectors is None:
            raise self.refusal("its vectors would be cut")
        return vectors

    def join_ranks(self, parts: Sequence[Part | None], sizes: Sequence[int], along: str) -> Part:
        return self.join_alike(parts, sizes, along, "ranks add, and all modules share one r")

    def lora(self, part: Part, weight: Weight) -> Pair:
        bank = self.common.get(self.shared[0])
        if bank is None:
            raise NoImageError("its vector bank is not in the file")
        a = self._mixed(part, "A", bank)
        b = self._mixed(part, "B", bank)
        rows = a.reshape(*a.shape[:-2], -1)
        columns = b.swapaxes(-1, -2)
        columns = columns.reshape(*columns.shape[:-3], -1, columns.shape[-1])
        return narrowed(rows, bank), narrowed(columns, bank)

    def _mixed(self, part: Part, letter: str, bank: Array) -> Wide:
        (wide,) = as_wide(bank)
        whole = part.tensors.get(f"vblora_logits_{letter}")
        if whole is not None:
            count = int(self.config["topk"])
            (logits,) = as_wide(whole)
            index = np.argsort(-logits, axis=-1, kind="stable")[..., :count]
            top = np.take_along_axis(logits, index, axis=-1)
            weights = np.exp(top - top.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
        else:
            index = part[f"vblora_logits_{letter}_topk_indices"].astype(np.int64)
            (weights,) = as_wide(part[f"vblora_logits_{letter}_topk_weights"])
            last = 1.0 - weights.sum(axis=-1, keepdims=True)
            if weights.shape[-1] + 1 == index.shape[-1]:
                weights = np.concatenate([weights, last], axis=-1)
        return np.asarray((weights[..., None] * wide[index]).sum(axis=-2))
