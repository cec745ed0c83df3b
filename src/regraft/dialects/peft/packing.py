"""How PEFT packs the factors of stacked experts into two matrices (``target_parameters``).

A is ``(E * rank, x)`` with the expert slowest, B is ``(y, rank * E)`` with the expert fastest. Since 0.19, x is the
experts' in axis and y their out axis. Before, x was the parameter's dim 1 and y its dim 2, whatever they meant; so
where the parameter is stored (E, out, in), the two factors had changed places. Source: ``ParamWrapper`` in
``peft/tuners/lora/layer.py`` of PEFT 0.18.1 and 0.21.2.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from regraft.adapters.form import Array

BEFORE = "peft-0.18"
SINCE = "peft-0.19"
_TILE = 8
"""How many experts are turned at a time: their lines of the processor's cache are still there at the next one."""
PACKINGS = (BEFORE, SINCE)
"""How PEFT packed the factors of stacked experts before 0.19, and how it has since."""


def packing_of_version(version: Any) -> str | None:
    """The packing that a ``peft_version`` writes; ``None`` where there is no version (before 0.18).

    >>> packing_of_version("0.18.1"), packing_of_version("0.21.2")
    ('peft-0.18', 'peft-0.19')
    """
    found = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if found is None:
        return None
    return SINCE if (int(found[1]), int(found[2])) >= (0, 19) else BEFORE


def swaps(packing: str, kind: str, experts: int) -> bool:
    """Whether the packed A is the out factor.

    Since 0.19 PEFT looks for a mark (``is_transposed``) on modules that store (E, in, out); transformers 5 sets it,
    transformers 4 does not. With one expert PEFT multiplies B and A as for a Linear and adds the product to the
    stored slice, so there only the way that the slice is stored matters.
    """
    if experts == 1:
        return kind != "experts"
    if kind == "experts":
        return packing == BEFORE
    return kind == "experts-unmarked" and packing == SINCE


def unpack(a: Array, b: Array, experts: int, *, swapped: bool) -> tuple[Array, Array]:
    """Packed A (E * rank, x) and B (y, rank * E) as (E, rank, in) and (E, out, rank); views, no copies.

    >>> a, b = unpack(np.zeros((6, 5)), np.zeros((7, 6)), 3, swapped=False)
    >>> a.shape, b.shape
    ((3, 2, 5), (3, 7, 2))
    """
    first = a.reshape(experts, -1, a.shape[1])
    second = b.reshape(b.shape[0], -1, experts)
    if swapped:
        return second.transpose(2, 1, 0), first.transpose(0, 2, 1)
    return first, second.transpose(2, 0, 1)


def pack(a: Array, b: Array, *, swapped: bool) -> tuple[Array, Array]:
    """(E, rank, in) and (E, out, rank) as PEFT's two matrices; the inverse of ``unpack``."""
    if swapped:
        a, b = b.transpose(0, 2, 1), a.transpose(0, 2, 1)
    experts, rank, _ = a.shape
    return a.reshape(experts * rank, -1), fast_experts(b)


def fast_experts(b: Array) -> Array:
    """(E, out, rank) as PEFT packs it: (out, rank * E), the expert fastest.

    A few experts at a time: numpy goes through the result in its order, where neighbours are from places that are far
    apart.
    """
    experts, out, rank = b.shape
    turned = b.transpose(1, 2, 0)
    if not turned.flags.c_contiguous:
        turned = np.empty((out, rank, experts), b.dtype)
        for first in range(0, experts, _TILE):
            some = slice(first, first + _TILE)
            turned[:, :, some] = b[some].transpose(1, 2, 0)
    return turned.reshape(out, rank * experts)
