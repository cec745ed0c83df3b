"""OSF.

Source: PEFT 0.21.2, ``peft/tuners/osf/{layer,utils}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    BASE,
    IN,
    OUT,
    RANK,
    Family,
    Pair,
    Part,
    Weight,
    as_wide,
    cells,
    narrowed,
    need,
)
from regraft.storage.expressions import expression


class Osf(Family):
    """The base's last singular components in a trained form; the first ones stay."""

    types = ("OSF",)
    title = "OSF"
    prefix = "osf_svd_params"
    roles = {
        "osf_svd_params.U_low": (OUT, RANK),
        "osf_svd_params.S_low": (RANK,),
        "osf_svd_params.V_low": (RANK, IN),
    }
    fields = {"effective_rank": "rank_pattern"}
    formula = "W − (its last k components) + U S V"
    rank = "2 k"
    adds = False
    batches = False
    base_helps = True
    fixed = "it stands on the singular vectors of the whole base weight"
    table = cells(rest=BASE)

    def check_rank(self, rank: int | None, settings: Mapping[str, Any]) -> None:
        pass  # the config's is that of what stays

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

    def lora(self, part: Part, weight: Weight) -> Pair:
        base = need(weight, self.fixed)
        u, s, v = as_wide(*(part[role] for role in self.roles))
        old_u, old_s, old_v = np.linalg.svd(base, full_matrices=False)
        first = min(base.shape) - len(s)
        a = np.concatenate([v, old_v[first:]])
        b = np.concatenate([u * s, -old_u[:, first:] * old_s[first:]], axis=1)
        like = part["osf_svd_params.U_low"]
        return narrowed(a, like), narrowed(b, like)
