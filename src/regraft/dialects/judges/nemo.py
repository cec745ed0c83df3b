"""What NeMo Automodel does with an adapter.

Source: nemo-automodel 0.7.0, ``components/moe/state_dict_mixin.py`` (``_convert_paramwrapper_to_native``,
``_recombine_lora_expert_keys``), ``components/checkpoint/addons.py`` and ``checkpointing.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regraft.adapters.form import Array
from regraft.dialects.judges.peft_like import (
    EXPERT,
    STACK,
    Module,
    PeftLike,
    beyond_layers,
    doubled,
    missing_experts,
    not_read,
    swapped,
)
from regraft.dialects.judging import (
    FAILS,
    IGNORED,
    LOADED,
    WRONG_SCALE,
    WRONG_VALUES,
    Files,
    Judgement,
)
from regraft.dialects.nemo import NATIVE, OWN, STAMP, own_config, stamped
from regraft.dialects.peft.packing import BEFORE
from regraft.dialects.served import count_experts, demands_table, language_config
from regraft.dialects.tool_files import PREFIX
from regraft.dialects.unread import says_grouped
from regraft.errors import RegraftError

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_FIELDS = ("r", "lora_alpha")


class NemoReader:
    """NeMo Automodel's loading of an adapter that its recipes go on with."""

    tool = "nemo"
    versions = ("0.7.0",)
    basis = "its source"
    to = "nemo"

    def judge(self, files: Files, version: str) -> Judgement:
        """What it would do."""
        judged = Judgement()
        if not_read(files, "NeMo Automodel", judged):
            return judged
        source, own = PeftLike.of(files), self._own(files, judged)
        missing = [name for name in _FIELDS if name not in source.config]
        if missing:
            judged.failures.append(f"adapter_config.json has no {', '.join(missing)}")
        if judged.failures:
            return judged
        types = files.types
        demands = demands_table("nemo").for_model(types)
        lost = missing_experts(source.modules, _PROJECTIONS, files.model)
        for name in source.others:
            judged.add(name, *_other(name, source, own))
        for module in source.modules.values():
            if module.leaf in demands.unknown or module.embedding:
                judged.add(module.path, IGNORED, f"{module.leaf} is no layer that it adapts")
            elif (module.packed or EXPERT.fullmatch(module.path)) and not demands.experts:
                judged.add(module.path, FAILS, "it has other experts for this model")
            else:
                judged.add(module.path, *self._module(module, source, lost, files, own))
        return judged

    def _own(self, files: Files, judged: Judgement) -> dict[str, Any]:
        """Its own config beside the adapter."""
        try:
            own = own_config(files.folder)
        except RegraftError as error:
            judged.failures.append(error.findings[0].message)
            return {}
        if not (files.folder / OWN).is_file():
            judged.failures.append(f"there is no {OWN}, from which it takes what is adapted")
        elif own.get(STAMP) is not None and stamped(own[STAMP]) is None:
            judged.failures.append(f"{OWN} has a {STAMP} that it does not know ({own[STAMP]!r})")
        return own

    def _module(
        self,
        module: Module,
        source: PeftLike,
        lost: dict[str, list[str]],
        files: Files,
        own: dict[str, Any],
    ) -> tuple[str, str]:
        if module.b is None:
            return IGNORED, "it has no lora_B, which stays zero"
        if module.a is None:
            return WRONG_VALUES, "it has no lora_A, which stays as it is initialised"
        beyond = beyond_layers(module, files.model)
        if doubled(module.path) or STACK.fullmatch(module.path) or beyond:
            return IGNORED, "no module of the model has this path"
        misfit = source.misfit(module)
        if misfit is not None:
            return FAILS, misfit.reason
        if module.packed:
            wrong = _packed(module, source, files, own)
            if wrong is not None:
                return wrong
        hit = EXPERT.fullmatch(module.path)
        if hit is not None:
            if _apart(hit["leaf"], lost.get(hit["stem"], [])):
                return IGNORED, "not every expert is there, so that they are not put together"
            if hit["leaf"] == "up_proj" and _own_factor(files, module.path):
                return (
                    WRONG_VALUES,
                    "it takes gate's lora_A for up as well, and this is another one",
                )
        return _scale(module, source, files, scaled=bool(own.get("moe_rank_scaling")))


def _packed(
    module: Module, source: PeftLike, files: Files, own: dict[str, Any]
) -> tuple[str, str] | None:
    """What is wrong with packed experts."""
    stem = module.path.removesuffix(".base_layer")
    if not {stem, f"{stem}.base_layer"} <= set(source.modules):
        return FAILS, "it takes factors of one parameter alone for those of down_proj"
    if says_grouped(source.config):
        return WRONG_VALUES, "Unsloth packed it by expert, and NeMo reads the columns as PEFT does"
    stamp, packing = own.get(STAMP), stamped(own.get(STAMP))
    if files.model is None:
        return None
    old = swapped(source, module, files.model)
    if packing is not None and (packing == BEFORE) != old and _told(files):
        return FAILS, f"{OWN} says {stamp!r}, and the shapes say otherwise"
    if stamp is None and not _told(files):
        return FAILS, f"{OWN} has no {STAMP}, and the shapes do not tell how experts are packed"
    return None


def _apart(leaf: str, missing: list[str]) -> bool:
    """Whether one of the experts' projections that this one is put together with is missing."""
    inner = ("gate_proj", "up_proj")
    return any((key.endswith(inner)) == (leaf in inner) for key in missing)


def _told(files: Files) -> bool:
    """Whether the base's sizes tell the two ways to pack experts apart."""
    config = language_config(files.model)
    hidden = config.get("hidden_size")
    inner = config.get("moe_intermediate_size") or config.get("intermediate_size")
    known = isinstance(hidden, int) and isinstance(inner, int) and count_experts(files.model)
    return bool(known) and hidden not in (inner, 2 * inner)  # type: ignore[operator]


def _own_factor(files: Files, path: str) -> bool:
    """Whether up's lora_A is another one than gate's."""
    up, gate = (
        files.tensors.get(f"{PREFIX}{name}.lora_A.weight")
        for name in (path, path.removesuffix("up_proj") + "gate_proj")
    )
    return up is not None and gate is not None and not _same(up, gate)


def _same(one: Array, other: Array) -> bool:
    return one.shape == other.shape and np.array_equal(one, other)


def _scale(module: Module, source: PeftLike, files: Files, *, scaled: bool) -> tuple[str, str]:
    """The one rank and scale that it has against what the config says of this module."""
    config = source.config
    assert module.a is not None
    rank = module.a[-2]
    experts = count_experts(files.model)
    if module.packed and experts:
        rank //= experts
    if rank != config["r"] and not (module.packed and (scaled or not experts)):
        return FAILS, f"the tensors' rank is {rank}, and its layers have the config's {config['r']}"
    meant = source.scale(module)
    whole = config["lora_alpha"] / config["r"]
    if meant is not None and meant.value != whole and not scaled:
        why = "use_rslora" if config.get("use_rslora") else "alpha_pattern"
        return WRONG_SCALE, f"it does not read {why}: {whole:g} instead of {meant.value:g}"
    return LOADED, ""


def _other(name: str, source: PeftLike, own: dict[str, Any]) -> tuple[str, str]:
    """What becomes of a tensor that is no factor of PEFT's."""
    if NATIVE.fullmatch(name):
        return LOADED, ""
    if "magnitude" in name and source.config.get("use_dora"):
        return LOADED, ""
    return IGNORED, "it reads factors only"


READER = NemoReader()
