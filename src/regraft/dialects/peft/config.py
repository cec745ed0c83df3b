"""How PEFT reads ``adapter_config.json``: which modules are adapted, with which rank, alpha and scale.

Source: PEFT 0.18.1 and 0.21.2, ``peft/utils/other.py`` (``get_pattern_key``), ``peft/tuners/tuners_utils.py``
(``check_target_module_exists``, ``inject_adapter``) and ``peft/tuners/lora/layer.py`` (scaling).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from regraft.adapters.families.settings import Patterns, whole_path
from regraft.adapters.protocol import Promise
from regraft.adapters.scale import Scale
from regraft.storage.expressions import expression

ALL_LINEAR = "all-linear"

VARIANTS = {
    "use_dora": "DoRA",
    "lora_bias": "lora_bias",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "use_bdlora": "BdLoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
"""Config fields that make a LoRA something else than ``scale * B @ A``, and what that is called."""


class LoraConfig:
    """A LoRA's ``adapter_config.json`` as PEFT resolves it, module by module."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.rslora = bool(data.get("use_rslora"))
        # Whether all modules have one scale.
        self.is_uniform = not (data.get("rank_pattern") or data.get("alpha_pattern"))
        if not self.is_uniform:
            self._ranks = Patterns(data.get("rank_pattern"), "rank_pattern")
            self._alphas = Patterns(data.get("alpha_pattern"), "alpha_pattern")

    def scale(self, path: str) -> Scale:
        """Rank and alpha of a module (or of a parameter, by the module's path and the parameter's name)."""
        if self.is_uniform:
            return Scale(self.data["r"], self.data["lora_alpha"], self.rslora)
        rank = self._ranks.find(path)
        alpha = self._alphas.find(path)
        return Scale(
            self.data["r"] if rank is None else rank,
            self.data["lora_alpha"] if alpha is None else alpha,
            self.rslora,
        )

    def variants(self) -> list[str]:
        """What makes this more than a plain LoRA, by the names people use."""
        return [name for field, name in VARIANTS.items() if self.data.get(field)]


def patterns_of(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The regular expressions of a config, each with its field, as PEFT fits them to whole paths."""
    for field in ("target_modules", "exclude_modules", "feedforward_modules"):
        value = config.get(field)
        if isinstance(value, str):
            yield field, value
    for field in ("rank_pattern", "alpha_pattern"):
        for key in config.get(field) or ():
            yield field, whole_path(key)
    layers = config.get("layers_pattern") or ()
    for key in [layers] if isinstance(layers, str) else layers:
        yield "layers_pattern", rf".*\.{key}\.(\d+)\..*"


def targets_module(target_modules: str | Sequence[str] | None, path: str) -> bool:
    """Whether ``target_modules`` names a module. ``None`` (PEFT's own default) counts as naming everything.

    >>> targets_module(["q_proj"], "model.layers.0.self_attn.q_proj")
    True
    """
    if target_modules is None:
        return True
    if isinstance(target_modules, str):
        if target_modules.lower() == ALL_LINEAR:
            return True
        return expression(target_modules, "target_modules").fullmatch(path) is not None
    return any(path == target or path.endswith("." + target) for target in target_modules)


def promise_of(config: Mapping[str, Any]) -> Promise | None:
    """That every module with a listed name was adapted; ``None`` where something filters them."""
    entries = config.get("target_modules")
    filtered = config.get("layers_to_transform") is not None or config.get("exclude_modules")
    if not isinstance(entries, list) or filtered:
        return None
    return Promise(tuple(entries), "target_modules")


def tail_of(path: str) -> str:
    """What follows the last number of a path: an entry that is the same in every layer.

    >>> tail_of("model.layers.0.mlp.experts.gate_up_proj")
    'mlp.experts.gate_up_proj'
    """
    segments = path.split(".")
    last = next((i for i in range(len(segments) - 1, -1, -1) if segments[i].isdigit()), -1)
    return ".".join(segments[last + 1 :]) or path


def targets_parameter(target_parameters: Iterable[str] | None, name: str) -> bool:
    """Whether ``target_parameters`` names a parameter (module path, dot, parameter name)."""
    return any(name == entry or name.endswith("." + entry) for entry in target_parameters or ())
