"""C3A.

Source: PEFT 0.21.2, ``peft/tuners/c3a/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    Weight,
    Wide,
    as_wide,
    cells,
    each,
    present,
    whole_groups,
)
from regraft.adapters.families.low_rank import laid_out
from regraft.adapters.form import Array
from regraft.names.keys import Ints


class C3a(Family):
    """Circulant blocks, divided by the size of in."""

    types = ("C3A",)
    title = "C3A"
    prefix = "c3a_"
    fields = {"block_size": "block_size_pattern"}
    formula = "W + circulant blocks / in"
    anchored = True
    table = cells(
        join_out=Cell(DENSE, FAMILY, "blocks have one size"),
        join_in=Cell(DENSE, FAMILY, "blocks have one size"),
        split_out=Cell(DENSE, FAMILY, "blocks stay whole"),
        split_in=Cell(DENSE, FAMILY, "blocks stay whole"),
        reorder_out=Cell(DENSE, FAMILY, "blocks stay whole"),
        reorder_in=Cell(DENSE, FAMILY, "blocks stay whole"),
        transpose=FAMILY,
        stack=DENSE,
    )

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        rows, columns, side = tensors["c3a_kernel"].shape
        self.check_field("block_size", side, settings)
        return rows * side, columns * side

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        kernel = part["c3a_kernel"]
        side = kernel.shape[-1]
        for axis, index in enumerate((rows, columns)):
            if index is not None:
                blocks = whole_groups(index, side)
                if blocks is None:
                    raise self.refusal("its blocks would be cut")
                kernel = kernel.take(blocks, axis=axis)
        out, into = kernel.shape[0] * side, kernel.shape[1] * side
        return part.with_tensors(out, into, c3a_kernel=_ratio(kernel, into, part.into))

    def turn(self, part: Part) -> Part:
        kernel = np.roll(np.flip(part["c3a_kernel"], -1), 1, -1).swapaxes(0, 1)
        return part.with_tensors(
            part.into, part.out, c3a_kernel=_ratio(kernel, part.out, part.into)
        )

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        return self._join(parts, outs, OUT)

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        return self._join(parts, intos, IN)

    def _join(self, parts: Sequence[Part | None], sizes: Sequence[int], along: str) -> Part:
        there = present(parts)
        side = there[0]["c3a_kernel"].shape[-1]
        if any(p["c3a_kernel"].shape[-1] != side for p in there) or any(s % side for s in sizes):
            raise self.refusal("the parts have blocks of different sizes")
        into = sum(sizes) if along == IN else there[0].into
        kernels = each(lambda p: _ratio(p["c3a_kernel"], into, p.into), parts)
        joint = laid_out(kernels, (OUT, IN, None), along, [size // side for size in sizes])
        return there[0].grown(along, sum(sizes), c3a_kernel=joint)

    def delta(self, part: Part, weight: Weight) -> Wide:
        (kernel,) = as_wide(part["c3a_kernel"])
        side = kernel.shape[-1]
        turn = (np.arange(side) - np.arange(side)[:, None]) % side
        return np.asarray(
            kernel[:, :, turn].transpose(0, 2, 1, 3).reshape(part.out, part.into) / part.into
        )


def _ratio(kernel: Array, new: int, old: int) -> Array:
    """A kernel for another size of in, by which PEFT divides."""
    return kernel if new == old else (kernel.astype(np.float64) * (new / old)).astype(kernel.dtype)
