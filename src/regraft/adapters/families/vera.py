"""VeRA.

Source: PEFT 0.21.2, ``peft/tuners/vera/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from regraft.adapters.families.base import (
    LORA,
    OUT,
    RANK,
    Family,
    NoImageError,
    Pair,
    Part,
    UnreadableError,
    Weight,
    as_wide,
    cells,
    narrowed,
)
from regraft.adapters.families.seeded import (
    random_uniform,
)
from regraft.adapters.form import Array


class Vera(Family):
    """``diag(b) B diag(d) A`` with A and B shared by all modules, each taking the first rows and columns."""

    types = ("VERA",)
    title = "VeRA"
    prefix = "vera_lambda_"
    roles = {"vera_lambda_b": (OUT,), "vera_lambda_d": (RANK,)}
    shared = ("base_model.vera_A", "base_model.vera_B")
    formula = "W + diag(b) B diag(d) A, A and B shared"
    rank = "r"
    spread: ClassVar[int] = 1
    """How many times as many rows A has as the rank."""
    fixed = "all modules share one A and one B, whose first rows and columns they take"
    table = cells(rest=LORA)

    def __init__(self, config: Mapping[str, Any], shared: Mapping[str, Array]) -> None:
        super().__init__(config, shared)
        self._largest = 0, 0

    def check_rank(self, rank: int | None, settings: Mapping[str, Any]) -> None:
        if rank is not None and rank % self.spread:
            raise UnreadableError(f"{rank} numbers are no {self.spread} times a rank")
        super().check_rank(None if rank is None else rank // self.spread, settings)

    def survey(self, parts: Mapping[str, Part]) -> None:
        self._largest = max(p.out for p in parts.values()), max(p.into for p in parts.values())

    def _projections(self) -> Pair:
        """A (rank, largest in) and B (largest out, rank): PEFT draws them again where it did not save them."""
        a, b = (self.common.get(name) for name in self.shared)
        if a is None or b is None:
            if self.config.get("save_projection", True):
                raise NoImageError(
                    "its projections are not in the file, though save_projection is on"
                )
            out, into = self._largest
            rank = int(self.config["r"])
            shapes = (rank * self.spread, into), (out, rank)
            a, b = random_uniform(shapes, int(self.config["projection_prng_key"]))
        return a, b

    def lora(self, part: Part, weight: Weight) -> Pair:
        a, b = self._projections()
        lb, ld = as_wide(*(part[role] for role in self.roles))
        rank = ld.shape[-1]
        a, b = a[:rank, : part.into], b[: part.out]
        wide = lb[..., :, None] * b.astype(np.float64) * ld[..., None, :]
        made = np.broadcast_to(a, (*lb.shape[:-1], *a.shape))
        return made, narrowed(wide, *part.tensors.values(), b)
