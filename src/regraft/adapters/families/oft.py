"""OFT.

Source: PEFT 0.21.2, ``peft/tuners/oft/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lcm
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    DENSE,
    FAMILY,
    IN,
    OUT,
    Cell,
    Family,
    Part,
    Sizes,
    UnreadableError,
    Weight,
    Wide,
    as_wide,
    block_diagonal,
    cells,
    each,
    need,
    present,
)
from regraft.adapters.families.low_rank import laid_out
from regraft.adapters.families.orthogonal import (
    cayley,
    cayley_neumann,
    pack,
    rotated,
    side_of,
    take_blocks,
    unpack,
)
from regraft.adapters.form import Array
from regraft.names.keys import Ints
from regraft.values import replace


class Oft(Family):
    """``W blockdiag(R)^T`` with R a Cayley transform of skew matrices, of which the upper triangles are stored."""

    types = ("OFT",)
    title = "OFT"
    prefix = "oft_"
    roles = {"oft_R.weight": (None, None), "oft_r": (None, None)}
    formula = "W blockdiag(R)ᵀ"
    adds = False
    table = cells(
        join_out=Cell(DENSE, FAMILY, "all parts are adapted, by the same rotations"),
        join_in=FAMILY,
        split_out=FAMILY,
        split_in=Cell(DENSE, FAMILY, "the cut lies between two blocks"),
        reorder_out=FAMILY,
        reorder_in=Cell(DENSE, FAMILY, "blocks stay together"),
        transpose=DENSE,
        stack=DENSE,
    )

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        (packed,) = tensors.values()
        if self.config.get("block_share"):
            if len(packed) != 1:
                raise UnreadableError(
                    f"adapter_config.json says that all blocks are one (block_share), and it has {len(packed)}"
                )
            return None, None
        count, side = packed.shape[0], side_of(packed.shape[1])
        for name, have in (("r", count), ("oft_block_size", side)):
            told = self.config.get(name)
            if (
                told and count * side % told == 0
            ):  # 0: it follows from the other; else PEFT chooses a divisor
                self.check_field(name, have, settings)
        return None, count * side

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        out = part.out if rows is None else len(rows)
        if columns is None:
            return replace(part, out=out)
        return _packed(part, take_blocks(self._skew(part), columns), out, len(columns))

    def _skew(self, part: Part) -> Array:
        """The skew matrices, (blocks, side, side)."""
        packed = _stored(part)
        side = side_of(packed.shape[1])
        if self.config.get("block_share"):
            packed = np.broadcast_to(packed[:1], (part.into // side, packed.shape[1]))
        return unpack(packed, side)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        return self.join_alike(parts, outs, OUT, "the parts are turned by different rotations")

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        first = present(parts)[0]
        skews = each(self._skew, parts)
        side = lcm(*(s.shape[-1] for s in skews if s is not None))
        if any(into % side for into in intos):
            raise self.refusal("the parts have blocks of different sizes")
        joint = laid_out(
            each(lambda s: _in_blocks_of(s, side), skews),
            (IN, None, None),
            IN,
            [into // side for into in intos],
        )
        return _packed(first, joint, first.out, sum(intos))

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        sides = {key: side_of(_stored(p).shape[1]) for key, p in parts.items()}
        if len(set(sides.values())) > 1:
            counts = {p.into // sides[key] for key, p in parts.items()}
            if not self.config.get("r") or counts != {self.config["r"]}:
                raise self.refusal(
                    "its modules would need blocks of different sizes, and it has one for all"
                )
            return parts, {}
        changes: dict[str, Any] = {"r": 0, "oft_block_size": next(iter(sides.values()))}
        if self.config.get("block_share"):
            changes["block_share"] = False
            parts = {key: self._spread(p) for key, p in parts.items()}
        return parts, changes

    def _spread(self, part: Part) -> Part:
        packed = _stored(part)
        if len(packed) == part.into // side_of(packed.shape[1]):
            return part
        return _packed(part, self._skew(part), part.out, part.into)

    def delta(self, part: Part, weight: Weight) -> Wide:
        base = need(weight)
        return rotated(base, self.rotations(part)) - base

    def rotations(self, part: Part) -> Wide:
        """The rotations, (blocks, side, side)."""
        (skew,) = as_wide(self._skew(part))
        if self.config.get("coft"):
            bound = self.config.get("eps", 6e-5) / np.sqrt(len(_stored(part)))
            length = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
            skew = np.where(length <= bound, skew, bound * skew / np.where(length == 0, 1, length))
        if self.config.get("use_cayley_neumann", True):
            return cayley_neumann(skew, self.config.get("num_cayley_neumann_terms", 5))
        return cayley(-skew)


def _stored(part: Part) -> Array:
    """What is stored of the skew matrices; its role was called ``oft_r`` before PEFT 0.17."""
    (packed,) = part.tensors.values()
    return packed


def _packed(part: Part, skew: Array, out: int, into: int) -> Part:
    (role,) = part.tensors
    return part.with_tensors(out, into, **{role: pack(skew)})


def _in_blocks_of(skew: Array, side: int) -> Array:
    """Skew matrices as blocks of larger ones, (blocks, side, side)."""
    times = side // skew.shape[-1]
    blocks = [block_diagonal(list(skew[i : i + times])) for i in range(0, len(skew), times)]
    return np.stack(blocks)
