"""Carrying an adapter of any family along: in the family where all of it can follow, otherwise as LoRAs.

The rungs of the ladder, from the top: in the family; exactly as LoRA; the same with the base's weights; and, only by
name, a delta of full rank. One adapter is of one family, so the lowest rung that one module needs is the rung of all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import Struct, field

from regraft.adapters.base_weights import BaseWeights
from regraft.adapters.detect import Known
from regraft.adapters.families.base import (
    BASE,
    DENSE,
    FAMILY,
    LORA,
    NONE,
    Family,
    NoImageError,
    Part,
)
from regraft.adapters.families.lora_variants import LoraVariant
from regraft.adapters.follow import Followed, as_loras, follow
from regraft.adapters.form import Factors, Images, Lora
from regraft.adapters.tuned import TunedModules
from regraft.adapters.uncalled import modules_of
from regraft.errors import Finding, RefusedError
from regraft.names.keys import group_names
from regraft.planning.plan import Plan
from regraft.rules.templates import match_group

MERGE = "merge the adapter into its base and convert the base"
STAY = "keep it with the layout that it was trained in; PEFT cannot merge it either"
GIVE_BASE = "give the base's folder with its weights as --model"


_CLAIMED = (
    "for this model PEFT moves every LoRA with this module's name to the experts when it loads an adapter, "
    "and what prevents it (target_parameters) takes plain LoRA only"
)


class Carried(Struct):
    """What became of a family's modules: parts of the family by key, or LoRA factors by base weight."""

    rung: str
    parts: dict[str, Part] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    factors: Factors | None = None
    based: set[str] = field(default_factory=set)
    """Keys of base weights that were needed."""
    why: str = ""
    """Why it did not stay in the family."""
    moved: bool = False
    """Whether tensors changed and not only names."""


class Ladder:
    """One adapter of a family on its way to another layout."""

    def __init__(
        self,
        family: Family,
        known: Known,
        target: str,
        where: str,
        base: BaseWeights,
        claimed: Sequence[str] = (),
        *,
        held: bool = True,
    ) -> None:
        self.held = held
        """Whether the dialect of the result can hold the family."""
        self.family, self.known, self.target, self.where = family, known, target, where
        self.base = base
        self.claimed = tuple(claimed) if isinstance(family, LoraVariant) else ()
        """Last segments of modules that the reader of the result would take for something else."""

    def carry(self, plan: Plan | None, tuned: TunedModules, via: str | None) -> Carried:
        """The best rung that is exact, full rank where there is none and it is allowed, or what was asked for.

        Raises ``RefusedError`` with everything that has no image there.
        """
        if via is not None and via.startswith("svd:"):
            return self._densely(plan, tuned)
        try:
            return self._exactly(plan, tuned)
        except RefusedError:
            if via is None:
                raise
            return self._densely(plan, tuned)

    def _exactly(self, plan: Plan | None, tuned: TunedModules) -> Carried:
        followed = self._follow(plan, tuned)
        if not self.held and not followed.failed:
            gone = NoImageError(f"the format that was asked for does not have {self.family.title}")
            followed.failed = dict.fromkeys(range(len(tuned.parts)), (gone, ""))
        if not followed.failed:
            if plan is None or all(entry.moves_nothing for entry in plan.entries):
                return Carried(FAMILY, followed.parts)
            try:
                parts, changes = self.family.settle(followed.parts)
            except NoImageError as error:
                followed.failed[0] = error, ""
            else:
                return Carried(FAMILY, parts, changes, moved=True)
        why = next(iter(followed.failed.values()))[0].why
        made = as_loras(tuned, self.family, None)
        rung = LORA
        if made.failed and self.base.weights is not None:
            made = as_loras(tuned, self.family, self._weight)
            rung = BASE
        if made.failed:
            raise self._refusal(tuned, followed, made.failed)
        return Carried(rung, factors=made.factors, based=made.based, why=why)

    def _weight(self, name: str, kind: str) -> Any:
        return self.base.matrix(name, kind)

    def _follow(self, plan: Plan | None, tuned: TunedModules) -> Followed:
        if plan is None:
            names = [tuned.headers.name(i) for i in range(len(tuned.parts))]
            return Followed(dict(zip(names, tuned.parts, strict=True)))
        followed = follow(plan, tuned, self.family)
        special = [m for m in modules_of(self.known, self.target) if not m.called]
        ids = sources_of(plan) if special or self.claimed else {}
        for name, number in ids.items():
            module = name.removesuffix(".weight")
            if module.rpartition(".")[2] in self.claimed:
                followed.failed[number] = NoImageError(_CLAIMED), ""
            (group,) = group_names([module])
            for table in special:
                if match_group(table.module, group) is not None:
                    followed.failed[number] = (
                        NoImageError(f"it has no effect there: {table.why}"),
                        "",
                    )
        return followed

    def _densely(self, plan: Plan | None, tuned: TunedModules) -> Carried:
        weight = self._weight if self.base.weights is not None else None
        made = as_loras(tuned, self.family, weight, dense=True)
        if made.failed:
            raise self._refusal(tuned, Followed(), made.failed, dense=True)
        if self.family.changes_bias:
            self._check_biases(tuned)
        return Carried(DENSE, factors=made.factors, based=made.based)

    def _check_biases(self, tuned: TunedModules) -> None:
        findings = []
        for number, part in enumerate(tuned.parts):
            name = tuned.headers.name(number).removesuffix("weight") + "bias"
            found = self.base.find(name)
            bias = np.zeros(part.out) if found is None else found.astype(np.float64)
            if (self.family.bias(part, bias) != bias).any():
                findings.append(
                    Finding(
                        "no-image",
                        f"{self.family.title} changes the module's bias as well, and a LoRA does not",
                        where=self.where,
                        key=name,
                        fix=MERGE,
                    )
                )
        if findings:
            raise RefusedError(findings)

    def confirm(self, config: Mapping[str, Any], parts: Mapping[str, Part]) -> None:
        """Check that PEFT reads from a new config what the parts say.

        Raises ``RefusedError``.
        """
        try:
            self.family.confirm(
                config, {key.removesuffix(".weight"): part for key, part in parts.items()}
            )
        except NoImageError as error:
            raise RefusedError(
                Finding(
                    "no-image",
                    f"{self.family.title} has no exact equivalent here: {error.why}",
                    where=self.where,
                    key=next(iter(parts)),
                    fix=self._way_out(dense=False),
                )
            ) from None

    def _refusal(
        self,
        tuned: TunedModules,
        followed: Followed,
        failed: Mapping[int, NoImageError],
        *,
        dense: bool = False,
    ) -> RefusedError:
        """Why modules cannot go on, those with one reason together, and what would help."""
        groups: dict[tuple[str, str, str, str], list[str]] = {}
        first = failed.keys() & followed.failed.keys()
        for number, error in failed.items():
            key = tuned.headers.name(number)
            stays, rule = followed.failed.get(number, (None, ""))
            if first and number not in first and not error.needs_base:
                continue
            if stays is not None and stays.why != error.why:
                reason = f"{stays.why}; {error.why}"
            elif stays is None and followed.failed:
                reason = f"others of its modules have to become LoRA, and {error.why}"
            else:
                reason = error.why
            needs = error.needs_base or (stays is not None and stays.needs_base)
            alike = re.sub(r"\.\d+(?=\.)", ".#", key)
            groups.setdefault((reason, rule, GIVE_BASE if needs else "", alike), []).append(key)
        findings = []
        shapes = [tuple(tuned.headers.shapes[number]) for number in failed]
        for (reason, rule, base, _), keys in groups.items():
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            findings.append(
                Finding(
                    "needs-base-weights" if base else "no-image",
                    f"{self.family.title} has no exact equivalent here: {reason}{more}",
                    where=self.where,
                    key=keys[0],
                    rule=rule or None,
                    fix=base or self._way_out(shapes, dense=dense),
                )
            )
        return RefusedError(findings)

    def _way_out(self, shapes: Sequence[tuple[int, ...]] = (), *, dense: bool) -> str:
        """What else there is, each with its size and its error; ``shapes`` are those of the adapted base tensors."""
        cells = [self.family.cell(operation) for operation in ("stack", "join in")]
        if dense or all({cell.rung, cell.better} <= {NONE, FAMILY, None} for cell in cells):
            return MERGE if self.family.merges else STAY
        base = "" if self.family.adds or self.base.weights is not None else " --model BASE"
        full, low = _sizes(shapes)
        return (
            f"--via dense{base}: a LoRA of full rank, exact{full}; --via svd:{_RANK}{base}: a LoRA of rank {_RANK}, "
            f"approximate{low}, its error is measured and shown (svd:1e-3 bounds it); or merge the adapter into its "
            "base: exact, a whole model"
        )


_RANK = 16
"""What is proposed."""


def _sizes(shapes: Sequence[tuple[int, ...]]) -> tuple[str, str]:
    """How large LoRAs of full rank and of the proposed one are, in words; nothing where shapes are not known.

    >>> _sizes([(1000, 500)])
    (', 750k numbers', ', 24k numbers')
    """
    matrices = [shape for shape in shapes if len(shape) == 2]
    if not matrices:
        return "", ""
    full = sum(min(shape) * sum(shape) for shape in matrices)
    low = sum(min(_RANK, *shape) * sum(shape) for shape in matrices)
    return f", {_count(full)} numbers", f", {_count(low)} numbers"


def _count(number: float) -> str:
    """A number for people: 1234567 is 1.23M."""
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}G"


def sources_of(plan: Plan) -> dict[str, int]:
    """One source of every target that has one."""
    found: dict[str, int] = {}
    for entry in plan.entries:
        for term in entry.written:
            keys = entry.keys(term)
            each = len(keys) // len(entry)
            for row, name in enumerate(keys.names()):
                ids = entry.sources[0][row // each].reshape(-1)
                if ids[0] >= 0:
                    found[name] = int(ids[0])
    for carried in plan.carried:
        found.update(zip(carried.group.names(), carried.group.ids.tolist(), strict=True))
    return found


def unmoved_images(factors: Factors) -> list[Images]:
    """LoRAs where nothing moves."""
    made = []
    for keys, kind in factors.kinds:
        ids = keys.ids.tolist()
        loras: list[Lora | None] = [
            Lora(factors.a[i], factors.b[i], factors.scales[i]) for i in ids
        ]
        made.append(Images(keys, kind, loras))
    return made
