"""LoKr.

Source: PEFT 0.21.2, ``peft/tuners/lokr/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    FAMILY,
    LORA,
    Family,
    Pair,
    Part,
    Sizes,
    UnreadableError,
    Weight,
    Wide,
    as_wide,
    cells,
    narrowed,
)
from regraft.adapters.form import Array
from regraft.adapters.scale import Scale


class LoKr(Family):
    """``scale * kron(w1, w2)``, where each may be a product of two."""

    types = ("LOKR",)
    title = "LoKr"
    prefix = "lokr_"
    fields = {"r": "rank_pattern", "alpha": "alpha_pattern"}
    formula = "W + alpha/r kron(w1, w2)"
    rank = "rank w1 · rank w2"
    fixed = "how its factors are cut depends on the whole matrix"
    table = cells(transpose=FAMILY, rest=LORA)

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        if "lokr_t2" in tensors or any(t.ndim != 2 for t in tensors.values()):
            return None, None
        for name in ("lokr_w1_b", "lokr_w2_b"):
            self.check_rank(tensors[name].shape[0] if name in tensors else None, settings)
        (b1, a1), (b2, a2) = (_ends(tensors, name) for name in ("lokr_w1", "lokr_w2"))
        out, into = b1 * b2, a1 * a2
        factor = self.config.get("decompose_factor")
        # Columns of two factors may be those of a convolution, each of them once for every cell of its kernel.
        kernels = _divisors(a2) if "lokr_w2_b" in tensors else [1]
        if factor is not None and (
            _cut(out, factor) != b1 or all(_cut(into // kernel, factor) != a1 for kernel in kernels)
        ):
            raise UnreadableError(
                f"adapter_config.json gives decompose_factor {factor}, which cuts {out} x {into} otherwise than its "
                f"tensors are cut ({b1} x {a1} times {b2} x {a2})"
            )
        rank = settings.get("r", self.config.get("r"))
        for name, most in (("lokr_w1", max(b1, a1)), ("lokr_w2", max(b2, a2))):
            if not isinstance(rank, int) or (
                name == "lokr_w1" and not self.config.get("decompose_both")
            ):
                continue
            if (name in tensors) == (rank < most / 2):
                parted = "two factors" if name in tensors else "one matrix"
                raise UnreadableError(f"with the rank {rank} PEFT makes {parted} of {name}")
        return out, into

    def turn(self, part: Part) -> Part:
        self._check_linear(part)
        swap = {"a": "b", "b": "a"}
        tensors = {
            name[:-1] + swap[name[-1]] if name[-2] == "_" else name: tensor.T
            for name, tensor in part.tensors.items()
        }
        return part.with_tensors(part.into, part.out, **tensors)

    def lora(self, part: Part, weight: Weight) -> Pair:
        self._check_linear(part)
        b1, a1 = _factors(part.tensors, "lokr_w1")
        b2, a2 = _factors(part.tensors, "lokr_w2")
        b = _kron(b1, b2) * Scale(part.settings["r"], part.settings["alpha"]).value
        like = next(iter(part.tensors.values()))
        return narrowed(_kron(a1, a2), like), narrowed(b, like)

    def _check_linear(self, part: Part) -> None:
        if "lokr_t2" in part.tensors:
            raise self.refusal(
                "a convolution's kernel has a factor of its own here (use_effective_conv2d)"
            )


def _cut(size: int, factor: int) -> int:
    """The smaller of the two numbers that PEFT cuts a size into (``factorization`` in ``lokr/layer.py``)."""
    if factor > 0 and size % factor == 0:
        return factor
    most = size if factor < 0 else factor
    best = 1
    for low in range(2, size + 1):
        if low * low > size or low > most:
            break
        if size % low == 0:
            best = low
    return best


def _divisors(size: int) -> list[int]:
    """All of a number, 1 first.

    >>> _divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    low = [n for n in range(1, isqrt(size) + 1) if size % n == 0]
    return list(dict.fromkeys([*low, *(size // n for n in reversed(low))]))


def _ends(tensors: Mapping[str, Array], name: str) -> tuple[int, int]:
    if name in tensors:
        return tensors[name].shape[0], tensors[name].shape[1]
    return tensors[name + "_a"].shape[0], tensors[name + "_b"].shape[1]


def _factors(tensors: Mapping[str, Array], name: str) -> tuple[Wide, Wide]:
    """A factor as a product: itself beside the identity where it is whole."""
    if name not in tensors:
        b, a = as_wide(tensors[name + "_a"], tensors[name + "_b"])
        return b, a
    (whole,) = as_wide(tensors[name])
    rows, columns = whole.shape[-2:]
    if rows <= columns:
        return np.broadcast_to(np.eye(rows), (*whole.shape[:-2], rows, rows)), whole
    return whole, np.broadcast_to(np.eye(columns), (*whole.shape[:-2], columns, columns))


def _kron(first: Wide, second: Wide) -> Wide:
    product = first[..., :, None, :, None] * second[..., None, :, None, :]
    head = product.shape[:-4]
    rows = first.shape[-2] * second.shape[-2]
    return np.asarray(product.reshape(*head, rows, first.shape[-1] * second.shape[-1]))
