"""MiSS.

Source: PEFT 0.21.2, ``peft/tuners/miss/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lcm
from typing import Any, ClassVar

import numpy as np

from regraft.adapters.families.base import (
    FAMILY,
    LORA,
    OUT,
    Cell,
    Family,
    NoImageError,
    Pair,
    Part,
    Sizes,
    Weight,
    Wide,
    as_wide,
    cells,
    each,
    need,
    present,
)
from regraft.adapters.families.low_rank import laid_out
from regraft.adapters.form import Array
from regraft.names.keys import Ints


class Miss(Family):
    """``block^T T`` where T repeats the identity along in; all modules share one r."""

    types = ("MISS",)
    title = "MiSS"
    prefix = "miss_"
    formula = "W + miss_blockᵀ (1 1 … 1)"
    rank = "r"
    block: ClassVar[str] = "miss_block"
    """Its only role."""
    table = cells(
        join_out=FAMILY,
        split_out=FAMILY,
        split_in=FAMILY,
        reorder_out=FAMILY,
        reorder_in=Cell(LORA, FAMILY, "columns are shifted by a constant"),
        rest=LORA,
    )

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        block = tensors[self.block]
        self.check_rank(block.shape[0] if block.ndim == 2 else block.shape[-1], settings)
        if block.ndim == 3:
            return block.shape[0] * block.shape[1], None
        return (None if self._mini else block.shape[1]), None

    @property
    def _mini(self) -> bool:
        return self.config.get("init_weights") == "mini"

    def _block(self, part: Part) -> Array:
        """(r, out)."""
        block = part[self.block]
        if block.ndim == 3:
            raise NoImageError("what it adds depends on the base weight (init_weights is 'bat')")
        return np.tile(block, (1, part.out // block.shape[1])) if self._mini else block

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        block = self._block(part)
        if rows is not None:
            block = block[:, rows]
        into = part.into
        if columns is not None:
            into = len(columns)
            shift = int(columns[0])
            if ((columns - np.arange(into) - shift) % len(block)).any():
                raise NoImageError("its columns repeat, and they would not any more")
            block = np.roll(block, -(shift % len(block)), axis=0)
        return part.with_tensors(block.shape[1], into, **{self.block: block})

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        there = present(parts)
        rank = lcm(*(len(self._block(p)) for p in there))
        blocks = each(lambda p: self._at_rank(p, rank), parts)
        joint = laid_out(blocks, (None, OUT), OUT, outs)
        return there[0].grown(OUT, sum(outs), **{self.block: joint})

    def _at_rank(self, part: Part, rank: int) -> Array:
        """(rank, out), for a multiple of the part's rank: the block again and again."""
        block = self._block(part)
        return np.tile(block, (rank // len(block), 1))

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        rank = lcm(*(len(self._block(p)) for p in parts.values()))
        if any(rank > p.into for p in parts.values()):
            raise self.refusal("its modules would need different ranks, and it has one for all")
        made = {
            key: p.with_tensors(p.out, p.into, **{self.block: self._at_rank(p, rank)})
            for key, p in parts.items()
        }
        return made, {"r": rank, **({"init_weights": True} if self._mini else {})}

    def lora(self, part: Part, weight: Weight) -> Pair:
        block = part[self.block]
        if self.config.get("init_weights") == "bat":
            raise NoImageError("what it adds depends on the base weight, and has full rank")
        if self._mini:
            block = np.tile(block, part.out // block.shape[-1])
        rank = block.shape[-2]
        ones = (np.arange(part.into) % rank == np.arange(rank)[:, None]).astype(block.dtype)
        return np.broadcast_to(ones, (*block.shape[:-2], *ones.shape)), block.swapaxes(-1, -2)

    def delta(self, part: Part, weight: Weight) -> Wide:
        if self.config.get("init_weights") != "bat":
            return super().delta(part, weight)
        (block,) = as_wide(part[self.block])
        base = need(weight)
        side = block.shape[-1]
        tiles = base.reshape(len(base) // side, side, base.shape[1] // side, side)
        made = tiles.transpose(2, 0, 1, 3) @ block + block
        return np.asarray(made.transpose(1, 2, 0, 3).reshape(base.shape))
