"""PEANuT.

Source: PEFT 0.21.2, ``peft/tuners/peanut/layer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from regraft.adapters.families.base import (
    BASE,
    FAMILY,
    IN,
    OUT,
    RANK,
    Cell,
    NoImageError,
    Pair,
    Part,
    Weight,
    Wide,
    cells,
    is_order,
    narrowed,
    need,
)
from regraft.adapters.families.low_rank import LowRank
from regraft.names.keys import Ints

_FUNCTIONS: Mapping[str, Callable[[Wide], Wide]] = {
    "relu": lambda x: x.clip(0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)),
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "swish": lambda x: x / (1.0 + np.exp(-x)),
    "relu6": lambda x: x.clip(0, 6),
    "linear": lambda x: x,
}


class Peanut(LowRank):
    """``scaling B f(A W)``: a small network that reads every column of the base weight by itself."""

    types = ("PEANUT",)
    title = "PEANuT"
    prefix = "peanut_"
    roles = {
        "peanut_A.weight": (RANK, OUT),
        "peanut_encoders.": (RANK, RANK),
        "peanut_decoders.": (RANK, RANK),
        "peanut_B.weight": (OUT, RANK),
    }
    formula = "W + scaling · B f(A W)"
    rank = "r"
    adds = False
    batches = False
    base_helps = True
    one_rank = True
    table = cells(
        join_out=FAMILY,
        reorder_out=FAMILY,
        split_in=FAMILY,
        reorder_in=FAMILY,
        join_in=Cell(BASE, FAMILY, "all parts are adapted, with the same tensors"),
        rest=BASE,
    )

    def may_take(self, part: Part, rows: Ints | None, columns: Ints | None) -> None:
        if not is_order(rows, part.out):
            raise self.refusal("its network reads whole columns of the base")

    def turn(self, part: Part) -> Part:
        raise self.refusal("its network reads columns of the base")

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        return self.join_alike(parts, intos, IN, "the parts are read by different networks")

    def lora(self, part: Part, weight: Weight) -> Pair:
        name = self.config["act_fn"]
        if name not in _FUNCTIONS:
            raise NoImageError(f"regraft does not know the activation {name!r} that it uses")
        function = _FUNCTIONS[name]
        tensors = {role: tensor.astype(np.float64) for role, tensor in part.tensors.items()}
        hidden = function(
            tensors["peanut_A.weight"] @ need(weight, "its network reads the base weight")
        )
        depth = int(self.config["depth"])
        passed = []
        for number in range(depth):
            passed.append(hidden)
            hidden = function(tensors[f"peanut_encoders.{number}.weight"] @ hidden)
        for number in range(depth):
            hidden = function(tensors[f"peanut_decoders.{number}.weight"] @ hidden) + passed.pop()
        like = part["peanut_B.weight"]
        b = tensors["peanut_B.weight"] * float(self.config["scaling"])
        return narrowed(hidden, like), narrowed(b, like)
