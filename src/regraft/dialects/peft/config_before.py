"""The config that a file's metadata says an adapter had before: whether it says the same as one that is made anew.

Anybody can write metadata, so it only decides how things are spelled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from regraft.adapters.families.lora_variants import changes_base
from regraft.adapters.form import Saved, Written
from regraft.dialects.peft.config import patterns_of, targets_parameter
from regraft.dialects.peft.config_check import check_fields
from regraft.dialects.peft.packing import packing_of_version
from regraft.dialects.peft.saved import owner_of, token_rows
from regraft.dialects.peft.targeting import Targeting
from regraft.dialects.peft.writing import check_config
from regraft.storage.slow_expressions import find_slow

REWRITTEN = frozenset(
    {
        "alpha_pattern",
        "exclude_modules",
        "fan_in_fan_out",
        "feedforward_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "modules_to_save",
        "peft_version",
        "r",
        "rank_pattern",
        "target_modules",
        "target_parameters",
        "trainable_token_indices",
    }
)
"""Fields that a conversion writes anew."""


def is_sound(before: Mapping[str, Any], now: Mapping[str, Any], more: Iterable[str] = ()) -> bool:
    """Whether a config differs from one that was made anew only in what a conversion writes.

    ``more`` are a family's own fields among them.
    """
    rewritten = REWRITTEN.union(more)
    other = {
        name
        for name in {*before, *now} - rewritten
        if before.get(name) != now.get(name) or type(before.get(name)) is not type(now.get(name))
    }
    if other or check_fields(before, "") or changes_base(before) != changes_base(now):
        return False
    return not find_slow(patterns_of(before), ())


def targets_all(before: Mapping[str, Any], paths: Iterable[tuple[str, str]]) -> bool:
    """Whether a config targets modules, or the parameters of them that are given beside."""
    targeting = Targeting(before)
    parameters = before.get("target_parameters")
    return all(
        targeting.targets(module) or targets_parameter(parameters, name) for module, name in paths
    )


def saves_the_same(
    before: Mapping[str, Any], now: Mapping[str, Any], saved: Sequence[Saved]
) -> bool:
    """Whether two configs save the same modules and train the same rows of the same embeddings."""
    whole = [item.new for item in saved if not item.rows]
    for name in whole:
        if _owned(now, name) != _owned(before, name):
            return False
    if not _idle(before, whole) <= _idle(now, whole):
        return False
    tokens = [config.get("trainable_token_indices") for config in (before, now)]
    if type(tokens[0]) is not type(tokens[1]) or len(tokens[0] or ()) != len(tokens[1] or ()):
        return False
    return all(
        token_rows(before, item.new) == token_rows(now, item.new) for item in saved if item.rows
    )


def says_the_same(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    written: Sequence[Written],
    saved: Sequence[Saved],
    packing: str,
) -> bool:
    """Whether two configs of a plain LoRA mean the same for what was written."""
    if not is_sound(before, now) or check_config(before, written):
        return False
    if (
        any(w.parameter for w in written)
        and (packing_of_version(before.get("peft_version")) or packing) != packing
    ):
        return False
    paths = ((w.module, f"{w.module}.{w.parameter or 'weight'}") for w in written)
    return targets_all(before, paths) and saves_the_same(before, now, saved)


def _entries(config: Mapping[str, Any]) -> list[str]:
    return config.get("modules_to_save") or []


def _owned(config: Mapping[str, Any], name: str) -> bool:
    return any(owner_of(name, entry) is not None for entry in _entries(config))


def _idle(config: Mapping[str, Any], names: Sequence[str]) -> set[str]:
    """Entries of ``modules_to_save`` that save nothing that is there."""
    return {
        entry for entry in _entries(config) if all(owner_of(name, entry) is None for name in names)
    }
