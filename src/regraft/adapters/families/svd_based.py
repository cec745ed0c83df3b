"""Families that train something between the singular vectors of the base weight: PSOFT and OSF.

Source: PEFT 0.21.2, ``peft/tuners/{psoft,osf}/{layer,model,utils}.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    BASE,
    IN,
    OUT,
    Cell,
    Family,
    NoImageError,
    Part,
    UnreadableError,
    Wide,
    as_wide,
    cells,
    narrowed,
    need,
)
from regraft.adapters.families.seeded import svd_like_torch
from regraft.adapters.form import Array
from regraft.names.keys import Ints
from regraft.storage.expressions import expression

_WHOLE = "it stands on the singular vectors of the whole base weight"


class Psoft(Family):
    """``U S (R - 1) V`` with the first singular components of the base and an orthogonal R with factors around it."""

    types = ("PSOFT",)
    title = "PSOFT"
    prefix = "psoft_"
    formula = "W + U S (diag(b) R diag(a) − 1) V, of the base's first r components"
    rank = "r"
    adds = False
    batches = False
    table = cells(rest=Cell(BASE))

    def sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any]
    ) -> tuple[int | None, int | None]:
        rank = int(self.config["r"])
        shape = (rank * (rank - 1) // 2,) if self.config.get("psoft_orth", True) else (rank, rank)
        if tensors["psoft_R.weight"].shape != shape:
            raise UnreadableError(
                f"psoft_R is {list(tensors['psoft_R.weight'].shape)}, and {list(shape)} goes with r = {rank}"
            )
        return None, None

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        raise NoImageError(_WHOLE, needs_base=True)

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        if self.config.get("psoft_svd", "full") != "full":
            raise NoImageError("its singular vectors are found with random numbers (psoft_svd)")
        u, s, v = svd_like_torch(need(weight, _WHOLE))
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
        q = np.zeros((rank, rank))
        q[np.triu_indices(rank, 1)] = given
        q -= q.T
        one = np.eye(rank)
        if not self.config.get("use_cayley_neumann"):
            return np.asarray(np.linalg.solve((one - q).T, (one + q).T).T)
        longest, length = self.config.get("cayley_neumann_eps"), np.linalg.norm(q)
        if longest is not None and length > longest:
            q = q * (longest / (length + 1e-12))
        terms = int(self.config["num_cayley_neumann_terms"])
        powers = [np.linalg.matrix_power(q, k) for k in range(1, terms)]
        if len(powers) < 2:
            return np.asarray(one + 2.0 * sum(powers))
        return np.asarray(one + 2.0 * sum(powers[:-1]) + powers[-1])


class Osf(Family):
    """The base's last singular components in a trained form; the first ones stay."""

    types = ("OSF",)
    title = "OSF"
    prefix = "osf_svd_params"
    roles = {
        "osf_svd_params.U_low": (OUT, None),
        "osf_svd_params.S_low": (None,),
        "osf_svd_params.V_low": (None, IN),
    }
    fields = {"effective_rank": "rank_pattern"}
    formula = "W − (its last k components) + U S V"
    rank = "2 k"
    adds = False
    batches = False
    table = cells(rest=Cell(BASE))

    def varies(self) -> bool:
        return bool(self.config.get("rank_pattern"))

    def settings(self, path: str) -> dict[str, Any]:
        for pattern, rank in (self.config.get("rank_pattern") or {}).items():
            if expression(pattern, "rank_pattern").search(path):
                return {"effective_rank": rank}
        return {"effective_rank": self.config.get("effective_rank")}

    @classmethod
    def spell(cls, patterns: Mapping[str, Any]) -> dict[str, Any]:
        # PEFT searches for them anywhere in a path.
        return {
            (key if key.startswith("^") else rf"(^|\.){key}") + "$": rank
            for key, rank in patterns.items()
        }

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        raise NoImageError(_WHOLE, needs_base=True)

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        base = need(weight, _WHOLE)
        u, s, v = as_wide(*(part[role] for role in self.roles))
        old_u, old_s, old_v = np.linalg.svd(base, full_matrices=False)
        first = min(base.shape) - len(s)
        a = np.concatenate([v, old_v[first:]])
        b = np.concatenate([u * s, -old_u[:, first:] * old_s[first:]], axis=1)
        like = part["osf_svd_params.U_low"]
        return narrowed(a, like), narrowed(b, like)
