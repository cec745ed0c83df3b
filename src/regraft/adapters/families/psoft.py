"""PSOFT.

Source: PEFT 0.21.2, ``peft/tuners/psoft/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    BASE,
    Family,
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
    need,
)
from regraft.adapters.families.orthogonal import cayley, cayley_neumann, unpack
from regraft.adapters.families.seeded import (
    svd_like_torch,
)
from regraft.adapters.form import Array


class Psoft(Family):
    """``U S (R - 1) V`` with the first singular components of the base and an orthogonal R with factors around it."""

    types = ("PSOFT",)
    title = "PSOFT"
    prefix = "psoft_"
    formula = "W + U S (diag(b) R diag(a) − 1) V, of the base's first r components"
    rank = "r"
    adds = False
    batches = False
    base_helps = True
    fixed = "it stands on the singular vectors of the whole base weight"
    table = cells(rest=BASE)

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        rank = int(self.config["r"])
        shape = (rank * (rank - 1) // 2,) if self.config.get("psoft_orth", True) else (rank, rank)
        if tensors["psoft_R.weight"].shape != shape:
            raise UnreadableError(
                f"psoft_R is {list(tensors['psoft_R.weight'].shape)}, and {list(shape)} goes with r = {rank}"
            )
        return None, None

    def lora(self, part: Part, weight: Weight) -> Pair:
        if self.config.get("psoft_svd", "full") != "full":
            raise NoImageError("its singular vectors are found with random numbers (psoft_svd)")
        u, s, v = svd_like_torch(need(weight, self.fixed))
        rank = int(self.config["r"])
        u, s, v = u[:, :rank], s[:rank], v[:rank]
        if self.config.get("ab_svd_init", "psoft_init") == "pissa_init":
            u, v = u * np.sqrt(s), v * np.sqrt(s)[:, None]
        else:
            u = u * s
        like = part["psoft_R.weight"]
        return narrowed(v, like), narrowed(u @ (self._turning(part) - np.eye(rank)), like)

    def _turning(self, part: Part) -> Wide:
        """R with the factors around it."""
        (given,) = as_wide(part["psoft_R.weight"])
        rank = int(self.config["r"])
        r = given if given.ndim == 2 else self._rotation(given, rank)
        for role, spread in (("psoft_R.vector_b", (-1, 1)), ("psoft_R.vector_a", (1, -1))):
            if role in part.tensors:
                r = r * part[role].astype(np.float64).reshape(spread)
        return r

    def _rotation(self, given: Wide, rank: int) -> Wide:
        q = unpack(given, rank)
        if not self.config.get("use_cayley_neumann"):
            return cayley(q)
        longest, length = self.config.get("cayley_neumann_eps"), np.linalg.norm(q)
        if longest is not None and length > longest:
            q = q * (longest / (length + 1e-12))
        return cayley_neumann(q, int(self.config["num_cayley_neumann_terms"]))
