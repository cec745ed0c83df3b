"""PEFT's own folder for the denoiser of an image model: an ``adapter_config.json`` beside diffusers' names.

What ``get_peft_model(pipeline.unet, config).save_pretrained`` writes. The config says what files of other tools have in
tensors or in their header; here it is put there when a folder is opened, so that one reader serves all.

Sources: PEFT 0.21.2 (``tuners/lora/config.py``, ``tuners/loha``, ``tuners/lokr``, ``utils/other.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from regraft.adapters.families.settings import Patterns
from regraft.adapters.form import Array, is_float
from regraft.dialects.image.convert import OpenedImage, opened_image
from regraft.dialects.image.families import FAMILIES
from regraft.dialects.image.header import ADAPTER_METADATA
from regraft.dialects.image.leaves import split_key
from regraft.dialects.image.recognise import CONFIG, config_beside
from regraft.dialects.peft.config import targets_module
from regraft.dialects.peft.config_check import check_fields
from regraft.dialects.peft.variants import names_of
from regraft.errors import BadInputError, Finding, RefusedError
from regraft.storage.header import read_header
from regraft.storage.safetensors import open_tensors

_SCALED = ("LOHA", "LOKR")
"""Kinds beside LoRA that are read."""
_COMPONENTS = tuple(dict.fromkeys(family.component for family in FAMILIES))


def open_folder(path: Path) -> OpenedImage:
    """Open an adapter by its weights file.

    Raises ``BadInputError``, and ``RefusedError`` for families that are not read.
    """
    header = read_header(path)
    config = config_beside(path)
    if config is None:
        message = f"{CONFIG} is not there, or no JSON object with a peft_type"
        fix = f"put the {CONFIG} that was saved with these weights beside them"
        raise BadInputError(Finding("config", message, where=str(path.parent), fix=fix))
    return opened_folder(str(path), open_tensors(path, header), dict(header.metadata), config)


def opened_folder(
    where: str, tensors: dict[str, Array], metadata: dict[str, str], config: Mapping[str, Any]
) -> OpenedImage:
    """The same from what the files have. Raises what `open_folder` raises."""
    kind = config["peft_type"]
    if kind not in ("LORA", *_SCALED):
        raise RefusedError(
            Finding(
                "dialect",
                f"this is PEFT's {kind} on an image model, which regraft does not read",
                where=where,
                fix="export it as LoRA, or merge it with PEFT and convert the base",
            )
        )
    _check(config, tensors, where)
    if kind in _SCALED:
        return opened_image(where, _with_alphas(tensors, config), metadata)
    return opened_image(where, tensors, {**metadata, **said_in_header(config)})


_USUAL = {"r": 8, "lora_alpha": 8, "alpha": 8}
"""What PEFT takes where a config does not say it."""
_READ = ("DoRA", "lora_bias")
"""Variants of LoRA whose tensors say what they are."""


def _check(config: Mapping[str, Any], tensors: Iterable[str], where: str) -> None:
    """Check a config, and that PEFT would load every module.

    Raises ``BadInputError``, and ``RefusedError`` for what makes a LoRA something else.
    """
    given = {**_USUAL, **{name: value for name, value in config.items() if value is not None}}
    findings = check_fields(given, where)
    if findings:
        raise BadInputError(findings)
    more = [name for name in names_of(config) if name not in _READ]
    if config["peft_type"] == "LORA" and more:
        raise RefusedError(
            Finding(
                "no-image",
                f"it is a LoRA with {', '.join(more)}, which is more than what its factors add",
                where=where,
                fix="merge it with PEFT and convert the base",
            )
        )
    targets, exclude = config.get("target_modules"), config.get("exclude_modules")
    for stem in dict.fromkeys(leaf.stem for leaf in map(split_key, tensors) if leaf is not None):
        path = stem.removeprefix("base_model.model.")
        excluded = bool(exclude) and targets_module(exclude, path)
        if excluded or not targets_module(targets, path):
            what = "exclude_modules names it" if excluded else "target_modules does not name it"
            findings.append(
                Finding(
                    "config",
                    f"{what}, so PEFT gives this module no adapter and leaves its tensors unread",
                    where=where,
                    key=stem,
                    fix=f"use the {CONFIG} that was saved with these weights",
                )
            )
    if findings:
        raise BadInputError(findings)


def said_in_header(config: Mapping[str, Any]) -> dict[str, str]:
    """What diffusers would have in the header of a file with this adapter."""
    if config["peft_type"] != "LORA":
        return {}
    settings = {"r": 8, "lora_alpha": 8, **{k: v for k, v in config.items() if v is not None}}
    said = {
        f"{component}.{name}": settings[name]
        for component in _COMPONENTS
        for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
        if name in settings
    }
    return {ADAPTER_METADATA: json.dumps(said)}


def _with_alphas(tensors: Mapping[str, Array], config: Mapping[str, Any]) -> dict[str, Array]:
    """LoHa's and LoKr's with a key for each alpha, as LyCORIS has them.

    A LoKr whose factors are both whole has no scale there, and PEFT's is alpha / rank: it goes into the first one.
    """
    alphas, ranks = (_Setting.of(config, *names) for names in (("alpha", 8), ("r", 8)))
    modules: dict[str, set[str]] = {}
    for name in tensors:
        leaf = split_key(name)
        if leaf is not None:
            modules.setdefault(leaf.stem, set()).add(leaf.role)
    made = dict(tensors)
    for stem, roles in modules.items():
        path = stem.removeprefix("base_model.model.")
        alpha = alphas.find(path)
        if {"lokr_w1", "lokr_w2"} <= roles:
            key = next(n for n in tensors if n.startswith(f"{stem}.lokr_w1"))
            scale = alpha / ranks.find(path)
            if scale != 1 and is_float(tensors[key].dtype):
                made[key] = (tensors[key].astype(np.float64) * scale).astype(np.float32)
        made[f"{stem}.alpha"] = np.array(alpha, np.float32)
    return made


class _Setting:
    """A number of the config, and the modules that have another one."""

    def __init__(self, usual: float, patterns: Patterns) -> None:
        self.usual, self.patterns = usual, patterns

    @staticmethod
    def of(config: Mapping[str, Any], name: str, default: float) -> _Setting:
        """A number by its name."""
        value = config.get(name)
        field = "rank_pattern" if name == "r" else f"{name}_pattern"
        patterns = config.get(field)
        return _Setting(
            float(default if value is None else value),
            Patterns(patterns if isinstance(patterns, dict) else None, field),
        )

    def find(self, path: str) -> float:
        """That of a module."""
        found = self.patterns.find(path)
        return self.usual if found is None else float(found)
