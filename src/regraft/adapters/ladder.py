"""Carrying an adapter of any family along: in the family where all of it can follow, otherwise as LoRAs.

The rungs of the ladder, from the top: in the family; exactly as LoRA; the same with the base's weights; and, only by
name, a delta of full rank. One adapter is of one family, so the lowest rung that one module needs is the rung of all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

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
from regraft.adapters.form import Array, Factors, Images, Lora
from regraft.adapters.kept import modules_of
from regraft.adapters.tuned import TunedModules
from regraft.dialects.peft.config import targets_module
from regraft.dialects.peft.modules import ModuleReader
from regraft.dialects.peft.scan import PREFIX, Scan
from regraft.dialects.peft.variants import reclaimed_names
from regraft.dialects.peft.writing import ConfigWriter, Result
from regraft.errors import Finding, RefusedError
from regraft.names.keys import group_names
from regraft.planning.model import ModelConfig
from regraft.planning.plan import Plan
from regraft.planning.side import Side
from regraft.rules.templates import match_group

MERGE = "merge the adapter into its base and convert the base"
STAY = "keep it with the layout that it was trained in; PEFT cannot merge it either"
DENSELY = "ask for deltas of full rank (--via dense), or merge the adapter into its base"
GIVE_BASE = "give the base's folder with its weights as --model"


_CLAIMED = (
    "for this model PEFT moves every LoRA with this module's name to the experts when it loads an adapter, "
    "and what prevents it (target_parameters) takes plain LoRA only"
)


@dataclass(slots=True)
class Carried:
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


class Carrier:
    """One adapter of a family on its way from a layout to another."""

    def __init__(
        self,
        family: type[Family],
        config: Mapping[str, Any],
        tensors: Mapping[str, Array],
        scan: Scan,
        known: Known,
        layout: str,
        target: str,
        where: str,
    ) -> None:
        shared = {name: tensor for name, tensor in tensors.items() if family.shares(name)}
        self.family = family(config, shared)
        self.config, self.tensors, self.scan = config, list(tensors.values()), scan
        self.known, self.where = known, where
        self.layout, self.target = layout, target
        self.base = BaseWeights.of(known, layout)

    def read(self) -> TunedModules:
        """The modules; sizes that neither tensors nor config tell come from the base's weights."""
        side = Side(self.known.books, self.layout, self.known.scopes)
        reader = ModuleReader(self.scan, self.tensors, self.family, side, self.where)
        tuned = reader.read()
        if tuned.unknown and self.base.weights is not None:
            shapes = self.base.shapes()
            reader = ModuleReader(self.scan, self.tensors, self.family, side, self.where, shapes)
            tuned = reader.read()
        self.family.survey(
            {
                tuned.headers.name(number).removesuffix(".weight"): part
                for number, part in enumerate(tuned.parts)
            }
        )
        return tuned

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
        claimed: tuple[str, ...] = ()
        if isinstance(self.family, LoraVariant):
            claimed = reclaimed_names(self.config, self.known, self.target)
        ids = sources_of(plan) if special or claimed else {}
        for name, number in ids.items():
            module = name.removesuffix(".weight")
            if module.rpartition(".")[2] in claimed:
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
                    f"{self.family.title} has no exact image here: {error.why}",
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
        for (reason, rule, base, _), keys in groups.items():
            more = f" ({len(keys)} like it)" if len(keys) > 1 else ""
            findings.append(
                Finding(
                    "needs-base-weights" if base else "no-image",
                    f"{self.family.title} has no exact image here: {reason}{more}",
                    where=self.where,
                    key=keys[0],
                    rule=rule or None,
                    fix=base or self._way_out(dense),
                )
            )
        return RefusedError(findings)

    def _way_out(self, dense: bool) -> str:
        cells = [self.family.cell(operation) for operation in ("stack", "join in")]
        if dense or all({cell.rung, cell.better} <= {NONE, FAMILY, None} for cell in cells):
            return MERGE if self.family.merges else STAY
        with_base = (
            ""
            if self.family.adds or self.base.weights is not None
            else (", with the base's weights as --model")
        )
        return (
            f"{DENSELY}{with_base}"
            if not with_base
            else (
                f"ask for deltas of full rank (--via dense{with_base}), or merge the adapter into its base"
            )
        )


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


def write_parts(parts: Mapping[str, Part], family: Family) -> Result:
    """The tensors of a family's modules under PEFT's names."""
    result = Result()
    for key, part in parts.items():
        module = key.removesuffix(".weight")
        for end, tensor in family.write(part).items():
            result.tensors[f"{PREFIX}{module}.{end}"] = tensor
        result.wrappers[module] = 1
    return result


def write_family_config(
    config: Mapping[str, Any],
    family: Family,
    parts: Mapping[str, Part],
    changes: Mapping[str, Any],
    model: ModelConfig | None,
    renamed: Mapping[str, str],
    there: Side,
) -> dict[str, Any]:
    """The config of a family after its modules have moved; ``renamed`` maps old modules to new ones."""
    made = dict(config)
    writer = ConfigWriter(config, Result(), model, there)
    modules = {key.removesuffix(".weight"): part for key, part in parts.items()}
    if "target_modules" in config:
        made["target_modules"] = writer.target_modules(list(modules))
    for name in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if config.get(name) is not None:
            made[name] = None
    made.update(changes)
    for name, pattern in family.fields.items():
        if pattern is None:
            continue
        values = {path: part.settings[name] for path, part in modules.items()}
        made[name], patterns = one_for_most(values, config.get(name), writer, family.anchored)
        if patterns or config.get(pattern):
            made[pattern] = family.spell(patterns)
    if "feedforward_modules" in config:
        _write_feedforward(made, modules, writer)
    if config.get("peft_type") == "ADALORA" and config.get("rank_pattern"):
        made["rank_pattern"] = _renamed_budget(config["rank_pattern"], renamed)
    return made


def one_for_most(
    values: Mapping[str, Any], old: Any, writer: ConfigWriter, anchored: bool
) -> tuple[Any, dict[str, Any]]:
    """One value for most modules, and patterns that exclude each other for the rest."""
    counts = Counter(values.values())
    best = max(counts.values())
    common = old if counts.get(old) == best else next(v for v in counts if counts[v] == best)
    return common, writer.exceptions(values, common, anchored)


def _write_feedforward(
    made: dict[str, Any], modules: Mapping[str, Part], writer: ConfigWriter
) -> None:
    """``feedforward_modules``: PEFT compares ends of paths, and wants every entry in ``target_modules``, too."""
    forward = {path for path, part in modules.items() if part.settings["feedforward"]}
    entries = made["feedforward_modules"] or []

    def right(names: Sequence[str]) -> bool:
        return all(any(p.endswith(n) for n in names) == (p in forward) for p in modules)

    if not isinstance(entries, list) or not right(entries):
        entries = writer.shorten(sorted(forward))
        if not right(entries):
            entries = sorted(forward)
    kept = [e for e in entries if any(targets_module([e], p) for p in forward)]
    made["feedforward_modules"] = kept
    missing = [entry for entry in kept if entry not in made["target_modules"]]
    made["target_modules"] = [*made["target_modules"], *missing]


def _renamed_budget(patterns: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """AdaLoRA's ``rank_pattern``, which names the tensors of modules."""
    result = {}
    for key, value in patterns.items():
        module, _, leaf = key.rpartition(".lora_E")
        path = module.removeprefix(PREFIX)
        new = next(
            (
                renamed[p]
                for p in (path, f"model.{path}", path.removeprefix("model."))
                if p in renamed
            ),
            path,
        )
        result[f"{module.removesuffix(path)}{new}.lora_E{leaf}"] = value
    return result


_VARIANT_FIELDS = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
_COMMON_FIELDS = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "peft_version",
)


def lora_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a plain LoRA that adapts what another family adapted."""
    if config.get("peft_type") == "LORA":
        made = {k: v for k, v in config.items() if k not in _VARIANT_FIELDS}
        made["init_lora_weights"] = True
        made["use_rslora"] = False
        return made
    made = {name: config[name] for name in _COMMON_FIELDS if name in config}
    bias = config.get("bias", "none")
    made.update(
        peft_type="LORA",
        r=1,
        lora_alpha=1,
        lora_dropout=0.0,
        fan_in_fan_out=False,
        bias=bias if bias in ("none", "all") else "lora_only",
        use_rslora=False,
        init_lora_weights=True,
        rank_pattern={},
        alpha_pattern={},
    )
    return made


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
