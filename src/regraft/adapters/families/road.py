"""RoAd.

Source: PEFT 0.21.2, ``peft/tuners/road/layer.py``.
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
    need,
    present,
    tensors_of,
    whole_groups,
)
from regraft.adapters.families.low_rank import laid_out
from regraft.adapters.form import Array
from regraft.names.keys import Ints
from regraft.values import replace


class Road(Family):
    """Rotations and scales of pairs of rows, half a group apart; it acts on the bias as well."""

    types = ("ROAD",)
    title = "RoAd"
    prefix = "road_"
    roles = {"road_theta": (None,), "road_alpha": (None,)}
    formula = "R W, R of 2×2 rotations of rows"
    adds = False
    changes_bias = True
    table = cells(
        join_out=FAMILY,
        join_in=Cell(DENSE, FAMILY, "all parts are adapted, by the same rotations"),
        split_out=Cell(DENSE, FAMILY, "the cut lies between two groups"),
        split_in=FAMILY,
        reorder_out=Cell(DENSE, FAMILY, "groups stay together"),
        reorder_in=FAMILY,
        transpose=DENSE,
        stack=DENSE,
    )

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        return int(tensors["road_theta"].size * 2 / self._per_pair), None

    @property
    def _per_pair(self) -> int:
        """How many numbers a pair of rows has: 1, 2 or 4."""
        return int(self.config["variant"][-1])

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        into = part.into if columns is None else len(columns)
        if rows is None:
            return replace(part, into=into)
        size = self.config["group_size"]
        groups = whole_groups(rows, size)
        if groups is None:
            raise self.refusal("rows of one group do not stay together")
        tensors = {
            role: t.reshape(part.out // size, -1)[groups].reshape(-1)
            for role, t in part.tensors.items()
        }
        return part.with_tensors(len(rows), into, **tensors)

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        group = self.config["group_size"]
        if any(out % group for out in outs):
            raise self.refusal("a part is no whole number of groups")
        counts = [out * self._per_pair // 2 for out in outs]
        tensors = {
            role: laid_out(tensors_of(parts, role), (OUT,), OUT, counts, neutral)
            for role, neutral in (("road_theta", 0.0), ("road_alpha", 1.0))
        }
        return present(parts)[0].grown(OUT, sum(outs), **tensors)

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        return self.join_alike(parts, intos, IN, "the parts are turned by different rotations")

    def bias(self, part: Part, bias: Wide) -> Wide:
        return bias + self.delta(part, lambda: bias[:, None])[:, 0]

    def delta(self, part: Part, weight: Weight) -> Wide:
        base = need(weight)
        theta, alpha = as_wide(part["road_theta"], part["road_alpha"])
        half = self.config["group_size"] // 2
        if self._per_pair == 1:
            theta, alpha = (
                x.reshape(-1, half).repeat(2, axis=0).reshape(-1) for x in (theta, alpha)
            )
        if self._per_pair == 4:
            t, a = (x.reshape(-1, 2, 2 * half) for x in (theta, alpha))
            first = (a[:, 0] * np.cos(t[:, 0])).reshape(-1)
            second = (a[:, 1] * np.sin(t[:, 1])).reshape(-1)
        else:
            first, second = alpha * np.cos(theta), alpha * np.sin(theta)
        halves = base.reshape(-1, 2, half, base.shape[1])
        turned = np.stack([-halves[:, 1], halves[:, 0]], axis=1).reshape(base.shape)
        return np.asarray(base * (first[:, None] - 1.0) + turned * second[:, None])
