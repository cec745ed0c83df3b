"""Lily.

Source: PEFT 0.21.2, ``peft/tuners/lily/{layer,model}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regraft.adapters.families.base import (
    FAMILY,
    NONE,
    Cell,
    Family,
    NoImageError,
    Pair,
    Part,
    Sizes,
    Weight,
    cells,
    same_bits,
)
from regraft.adapters.form import Array
from regraft.names.keys import in_order


class Lily(Family):
    """A and a mix of several B, by a router that reads the input; modules share A and B."""

    types = ("LILY",)
    title = "Lily"
    prefix = "lily_"
    formula = "W + scaling · (Σ pₑ Bₑ) A, p of the input; A and B shared"
    merges = False
    fixed = "its effect depends on the input"
    table = cells(rename=Cell(NONE, FAMILY, "the modules that share A and B stay together"))

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        a, b = tensors["lily_A.weight"], tensors["lily_B.weight"]
        self.check_rank(a.shape[0], settings)
        self.check_field("num_B", b.shape[0] // a.shape[0], settings)
        return b.shape[1], a.shape[1]

    def lora(self, part: Part, weight: Weight) -> Pair:
        raise self.refusal(self.fixed)

    def confirm(self, config: Mapping[str, Any], parts: Mapping[str, Part]) -> None:
        # PEFT shares B among modules of one entry and one shape, and A among runs of stride_A of them.
        entries = config.get("target_modules")
        groups: dict[object, list[str]] = {}
        for path, part in parts.items():
            named = (
                [entry for entry in entries if path.endswith(entry)]
                if isinstance(entries, list)
                else [str(entries)]
            )
            if len(named) > 1:
                raise NoImageError(f"several entries of target_modules name {path}")
            groups.setdefault((*named, part.out, part.into), []).append(path)
        stride = int(config.get("stride_A") or 1)
        for paths in groups.values():
            paths.sort(key=in_order)
            runs = [paths[i : i + stride] for i in range(0, len(paths), stride)]
            if not same_bits([parts[path]["lily_B.weight"] for path in paths]) or not all(
                same_bits([parts[path]["lily_A.weight"] for path in run]) for run in runs
            ):
                raise NoImageError("other modules than before would share their A and B")
