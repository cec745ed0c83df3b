"""A family's tensors and config as PEFT has them, after its modules have moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from regraft.adapters.families.base import Family, Part
from regraft.dialects.peft.config import targets_module
from regraft.dialects.peft.scan import PREFIX
from regraft.dialects.peft.writing import ConfigWriter, Result
from regraft.planning.model import ModelConfig
from regraft.planning.side import Side


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
    # Where the field is absent PEFT chooses modules itself, by the old names: the result says them.
    if modules or "target_modules" in config:
        made["target_modules"] = writer.target_modules(list(modules))
    for name in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if config.get(name) is not None:
            made[name] = None
    made.update(changes)
    for name, pattern in family.fields.items():
        if pattern is None:
            continue
        values = {path: part.settings[name] for path, part in modules.items()}
        made[name], patterns = one_for_most(
            values, config.get(name), writer, anchored=family.anchored
        )
        if patterns or config.get(pattern):
            made[pattern] = family.spell(patterns)
    if "feedforward_modules" in config:
        _write_feedforward(made, modules, writer)
    if config.get("peft_type") == "ADALORA" and config.get("rank_pattern"):
        made["rank_pattern"] = _renamed_budget(config["rank_pattern"], renamed)
    return made


def one_for_most(
    values: Mapping[str, Any], old: Any, writer: ConfigWriter, *, anchored: bool
) -> tuple[Any, dict[str, Any]]:
    """One value for most modules, and patterns that exclude each other for the rest."""
    counts = Counter(values.values())
    best = max(counts.values())
    common = old if counts.get(old) == best else next(v for v in counts if counts[v] == best)
    return common, writer.exceptions(values, common, anchored=anchored)


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


def fresh_config(
    base: str | None, task: str | None, kind: str = "LORA", said: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The config of an adapter that comes from another dialect; the writer fills in targets, ranks and alphas.

    What another family needs beside these, its reader says in ``said`` under PEFT's names of the fields.
    """
    if kind != "LORA":
        common: dict[str, Any] = {
            "task_type": task,
            "base_model_name_or_path": base,
            "inference_mode": True,
            "target_modules": [],
            "modules_to_save": None,
        }
        return {**common, **(said or {}), "peft_type": kind}
    more = {name: said[name] for name in _VARIANT_FIELDS if name in said} if said else {}
    return more | {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": 1,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": [],
        "modules_to_save": None,
    }
