"""Families whose effect depends on the task or the input: Poly and Lily.

Source: PEFT 0.21.2, ``peft/tuners/{poly,lily}/{layer,router,model}.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    FAMILY,
    LORA,
    NONE,
    Cell,
    Family,
    NoImageError,
    Part,
    UnreadableError,
    Wide,
    as_wide,
    cells,
    joined,
    narrowed,
    same_bits,
)
from regraft.adapters.form import Array
from regraft.names.keys import Ints, in_order

_A, _B, _LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"


class Poly(Family):
    """``A B / r``, both mixed for each task from several skills.

    A is (splits, skills, in/splits, r), B (splits, skills, r, out/splits).
    """

    types = ("POLY",)
    title = "Poly"
    prefix = "poly_"
    formula = "W + B A / r, mixed for each task"
    rank = "r"
    merges = False
    table = cells(
        join_out=Cell(NONE, FAMILY, "all parts are mixed by the same router, and n_splits is 1"),
        **dict.fromkeys(
            ("split_out", "split_in", "reorder_out", "reorder_in"),
            Cell(NONE, FAMILY, "n_splits is 1"),
        ),
        rest=Cell(NONE),
    )

    def sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any]
    ) -> tuple[int | None, int | None]:
        a, b = tensors[_A], tensors[_B]
        if a.ndim != 4 or b.ndim != 4:
            raise UnreadableError("poly_lora_A and poly_lora_B have four dims")
        return b.shape[0] * b.shape[3], a.shape[0] * a.shape[2]

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        if part[_A].shape[0] > 1:
            raise NoImageError("its rows and columns are split into groups (n_splits)")
        a, b = part[_A], part[_B]
        a = a if columns is None else a[:, :, columns]
        b = b if rows is None else b[..., rows]
        return part.with_tensors(b.shape[3], a.shape[2], **{_A: a, _B: b, _LOGITS: part[_LOGITS]})

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        there = [p for p in parts if p is not None]
        first = there[0]
        if first[_A].shape[0] > 1 or not same_bits([p[_LOGITS] for p in there]):
            raise NoImageError("the parts are mixed by different routers")
        rank = sum(p[_A].shape[3] for p in there)
        b = np.zeros(
            (*first[_B].shape[:2], rank, sum(outs)),
            joined([p[_B].reshape(-1) for p in there]).dtype,
        )
        at = row = 0
        for part, out in zip(parts, outs, strict=True):
            if part is not None:
                more = part[_B].shape[2]
                b[:, :, at : at + more, row : row + out] = part[_B]
                at += more
            row += out
        a = joined([p[_A] for p in there], axis=3)
        return first.with_tensors(row, first.into, **{_A: a, _B: b, _LOGITS: first[_LOGITS]})

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        old = int(self.config["r"])
        rank = max(p[_A].shape[3] for p in parts.values())
        if rank == old:
            return parts, {}
        made = {}
        for key, part in parts.items():
            more = rank - part[_A].shape[3]
            b = part[_B].astype(np.float64) * (rank / old)
            tensors = {
                _A: np.pad(part[_A], [(0, 0)] * 3 + [(0, more)]),
                _B: np.pad(narrowed(b, part[_B]), [(0, 0), (0, 0), (0, more), (0, 0)]),
                _LOGITS: part[_LOGITS],
            }
            made[key] = part.with_tensors(part.out, part.into, **tensors)
        return made, {"r": rank}

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        a, b, logits = as_wide(part[_A], part[_B], part[_LOGITS])
        if logits.shape[-2] != 1:
            raise NoImageError(
                f"what it adds depends on the task, of which it has {logits.shape[-2]}"
            )
        chosen = 1.0 / (1.0 + np.exp(-logits[..., 0, :].reshape(a.shape[:-2])))
        weights = chosen / (chosen.sum(axis=-1, keepdims=True) + 1e-12)
        mixed_a = np.einsum("...qs,...qsdr->...qdr", weights, a)
        mixed_b = np.einsum("...qs,...qsrd->...qrd", weights, b)
        rank = a.shape[-1]
        rows = mixed_a.reshape(*a.shape[:-4], part.into, rank).swapaxes(-1, -2)
        columns = mixed_b.swapaxes(-1, -2).reshape(*a.shape[:-4], part.out, rank)
        return narrowed(rows, part[_A]), narrowed(columns / rank, part[_B])


class PolyOfOneTask(Poly):
    """Poly with one task: its mix never changes, so it is a LoRA."""

    title = "Poly of one task"
    formula = "W + B A / r"
    table = {
        operation: Cell(LORA, cell.better, cell.when) if operation != "rename" else cell
        for operation, cell in Poly.table.items()
    }

    @classmethod
    def covers(cls, config: Mapping[str, Any]) -> bool:
        return super().covers(config) and config.get("n_tasks") == 1


class Lily(Family):
    """A and a mix of several B, by a router that reads the input; modules share A and B."""

    types = ("LILY",)
    title = "Lily"
    prefix = "lily_"
    formula = "W + scaling · (Σ pₑ Bₑ) A, p of the input; A and B shared"
    merges = False
    table = cells(rename=Cell(NONE, FAMILY, "the modules that share A and B stay together"))

    def sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any]
    ) -> tuple[int | None, int | None]:
        return tensors["lily_B.weight"].shape[1], tensors["lily_A.weight"].shape[1]

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        raise NoImageError("its effect depends on the input")

    def lora(self, part: Part, weight: Callable[[], Wide] | None) -> tuple[Array, Array]:
        raise NoImageError("its effect depends on the input")

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
