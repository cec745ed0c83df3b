"""SHiRA.

Source: PEFT 0.21.2, ``peft/tuners/shira/layer.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

from regraft.adapters.families.base import (
    DENSE,
    FAMILY,
    Family,
    Part,
    Weight,
    Wide,
    cells,
    each,
)
from regraft.adapters.families.elements import Elements, join_below, join_beside
from regraft.names.keys import Ints


class Shira(Family):
    """Single elements of the weight, at stored places; every module has r (in + out) of them."""

    types = ("SHIRA",)
    title = "SHiRA"
    prefix = "shira_"
    formula = "W + single elements"
    table = cells(stack=DENSE, rest=FAMILY)

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        return _part(part, _elements(part).take(rows, columns))

    def turn(self, part: Part) -> Part:
        return _part(part, _elements(part).turn())

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        return _joint(parts, join_below(each(_elements, parts), outs))

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        return _joint(parts, join_beside(each(_elements, parts), intos))

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        rank = max(ceil(p["shira_weight"].size / (p.out + p.into)) for p in parts.values())
        if any(rank * (p.out + p.into) > p.out * p.into for p in parts.values()):
            raise self.refusal("its modules would need more elements than the weight has")
        made = {
            key: _part(part, _elements(part).padded(rank * (part.out + part.into)))
            for key, part in parts.items()
        }
        return made, {"r": rank}

    def delta(self, part: Part, weight: Weight) -> Wide:
        return _elements(part).dense()


def _elements(part: Part) -> Elements:
    return Elements(part["shira_indices"], part["shira_weight"], part.out, part.into)


def _part(like: Part, made: Elements) -> Part:
    return like.with_tensors(
        made.out, made.into, shira_indices=made.places, shira_weight=made.values
    )


def _joint(parts: Sequence[Part | None], made: Elements) -> Part:
    return _part(next(part for part in parts if part is not None), made)
