"""GraLoRA: a grid of blocks, each a small LoRA, and beside it one LoRA for the whole weight.

Source: PEFT 0.21.2, ``peft/tuners/gralora/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    FAMILY,
    LORA,
    Cell,
    Family,
    NoImageError,
    Pair,
    Part,
    Sizes,
    UnreadableError,
    Weight,
    as_wide,
    cells,
    narrowed,
)
from regraft.adapters.form import Array
from regraft.names.keys import Ints

_INSIDE = "blocks stay where they are"


class GraLora(Family):
    """``alpha/(r + hybrid_r)`` times a grid of k x k blocks, and a LoRA of rank hybrid_r.

    With s = r / k, block (p, q) is ``B[p, qs:qs+s].T @ A[q, :, ps:ps+s].T``; A is (k, in/k, r) and B (k, r, out/k).
    """

    types = ("GRALORA",)
    title = "GraLoRA"
    prefix = "gralora_"
    formula = "W + alpha/(r + hybrid_r) · (k × k blocks Bₚ A_q + B A)"
    rank = "k r + hybrid_r"
    table = cells(
        transpose=FAMILY,
        reorder_out=Cell(LORA, FAMILY, _INSIDE),
        reorder_in=Cell(LORA, FAMILY, _INSIDE),
        rest=LORA,
    )

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        a, b = tensors["gralora_A"], tensors["gralora_B"]
        if a.ndim != 3 or b.ndim != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
            raise UnreadableError(
                f"gralora_A is {list(a.shape)}, gralora_B {list(b.shape)}: they are no grid of blocks"
            )
        self.check_rank(a.shape[2], settings)
        self.check_field("gralora_k", a.shape[0], settings)
        return b.shape[0] * b.shape[2], a.shape[0] * a.shape[1]

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        tensors = dict(part.tensors)
        if rows is not None:
            b = tensors["gralora_B"]
            tensors["gralora_B"] = np.take_along_axis(b, _inside(rows, b, 2)[:, None, :], axis=2)
            if "gralora_B_general.weight" in tensors:
                tensors["gralora_B_general.weight"] = tensors["gralora_B_general.weight"][rows]
        if columns is not None:
            a = tensors["gralora_A"]
            tensors["gralora_A"] = np.take_along_axis(a, _inside(columns, a, 1)[:, :, None], axis=1)
            if "gralora_A_general.weight" in tensors:
                general = tensors["gralora_A_general.weight"]
                tensors["gralora_A_general.weight"] = general[:, columns]
        return part.with_tensors(part.out, part.into, **tensors)

    def turn(self, part: Part) -> Part:
        tensors = {
            "gralora_A": part["gralora_B"].swapaxes(1, 2),
            "gralora_B": part["gralora_A"].swapaxes(1, 2),
        }
        if "gralora_A_general.weight" in part.tensors:
            tensors["gralora_A_general.weight"] = part["gralora_B_general.weight"].T
            tensors["gralora_B_general.weight"] = part["gralora_A_general.weight"].T
        return part.with_tensors(part.into, part.out, **tensors)

    def lora(self, part: Part, weight: Weight) -> Pair:
        (wide_a, wide_b) = as_wide(part["gralora_A"], part["gralora_B"])
        count, inner, rank = wide_a.shape[-3:]
        outer, each = wide_b.shape[-1], wide_a.shape[-1] // count
        batch = wide_a.shape[:-3]
        a = np.zeros((*batch, count, count, each, part.into))
        b = np.zeros((*batch, part.out, count, count, each))
        for p in range(count):
            for q in range(count):
                mine, beside = slice(p * each, (p + 1) * each), slice(q * each, (q + 1) * each)
                columns = slice(q * inner, (q + 1) * inner)
                rows = slice(p * outer, (p + 1) * outer)
                a[..., p, q, :, columns] = wide_a[..., q, :, mine].swapaxes(-1, -2)
                b[..., rows, p, q, :] = wide_b[..., p, beside, :].swapaxes(-1, -2)
        a = a.reshape(*batch, count * count * each, part.into)
        b = b.reshape(*batch, part.out, count * count * each)
        general = 0
        if "gralora_A_general.weight" in part.tensors:
            wide = as_wide(part["gralora_A_general.weight"], part["gralora_B_general.weight"])
            general = wide[0].shape[-2]
            a, b = np.concatenate([a, wide[0]], axis=-2), np.concatenate([b, wide[1]], axis=-1)
        b *= float(self.config["alpha"]) / (rank + general)
        like = part["gralora_A"], part["gralora_B"]
        return narrowed(a, *like), narrowed(b, *like)


def _inside(index: Ints, blocks: Array, axis: int) -> Ints:
    """An order within each block, (k, size); refused where something leaves its block."""
    count, size = blocks.shape[0], blocks.shape[axis]
    starts = np.arange(count)[:, None] * size
    if len(index) == count * size:
        places = index.reshape(count, size) - starts
        if (places >= 0).all() and (places < size).all():
            return np.asarray(places)
    raise NoImageError("it is laid out in a grid, and rows or columns would leave their blocks")
