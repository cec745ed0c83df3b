"""Putting an adapter in the place of a loaded one, without new layers, so that nothing is compiled again."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.other import get_pattern_key
from torch import nn

from regraft.bridges.peft.holders import Place
from regraft.bridges.peft.known import Adapter
from regraft.bridges.peft.place import fill, pair
from regraft.bridges.peft.slots import Slot, adapter_slots, walk
from regraft.dialects.peft.scan import PREFIX
from regraft.dialects.peft.without_config import outside
from regraft.errors import BadInputError, Finding, RefusedError


def swap(place: Place, adapter: Adapter, adapter_name: str) -> None:
    """Replace the tensors, ranks and scales of the loaded LoRA called ``adapter_name``.

    Raises ``BadInputError`` or ``RefusedError`` with all findings; then nothing was changed.
    """
    holder: Any = place.peft_model or place.base
    configs = getattr(holder, "peft_config", None) or {}
    where = adapter.where
    if adapter_name not in configs:
        raise BadInputError(
            Finding(
                "no-such-adapter",
                f"the model has no adapter called {adapter_name!r} that this one could replace",
                where=where,
                fix="load it without hotswap first",
            )
        )
    old = configs[adapter_name]
    if adapter.peft_type != "LORA" or old.peft_type.value != "LORA":
        raise RefusedError(
            Finding("hotswap", "only a LoRA can take the place of a LoRA", where=where)
        )
    with adapter.config_folder() as folder:
        config = PeftConfig.from_pretrained(folder)
    config.inference_mode = old.inference_mode
    slots = adapter_slots(place.base, adapter_name, old)
    layers = {
        path: module
        for path, module in walk(place.base)
        if isinstance(module, LoraLayer) and adapter_name in module.scaling
    }
    pairs, findings = pair(place.base, slots, adapter.tensors, where)
    given = {key.removeprefix(PREFIX) for key in adapter.tensors}
    left = {key: slot for key, slot in slots.items() if slot.needed and key not in given}
    findings += _check_merged(layers, adapter_name, where)
    findings += _check_left(left, layers, where)
    findings += _check_shapes(pairs, adapter_name, where)
    if findings:
        raise BadInputError(findings)
    for key, slot in left.items():
        if key.split(".")[-2:][0].startswith("lora_B") or ".lora_embedding_B" in f".{key}":
            with torch.no_grad():
                slot.tensor.zero_()
    for _, slot, tensor in pairs:
        _swap_in(slot, tensor, adapter_name)
    for path, layer in layers.items():
        if any(slot.layer is layer for _, slot, _ in pairs):
            _set_scale(layer, path, adapter_name, config)
    configs[adapter_name] = config


def _check_merged(layers: dict[str, Any], adapter_name: str, where: str) -> list[Finding]:
    return [
        Finding(
            "hotswap",
            f"the adapter {adapter_name!r} is merged into the base here",
            where=where,
            key=path,
            fix="unmerge it first",
        )
        for path, layer in layers.items()
        if adapter_name in layer.merged_adapters
    ]


def _check_left(left: dict[str, Slot], layers: dict[str, Any], where: str) -> list[Finding]:
    """Layers that the new adapter has nothing for: a plain LoRA becomes zero, anything else cannot be left out."""
    lora = {id(layer) for layer in layers.values()}
    return [
        Finding(
            "missing",
            "the loaded adapter has this tensor, the new one has not, and zero would not be the base's own value",
            where=where,
            key=PREFIX + key,
            fix="load it under another name without hotswap",
        )
        for key, slot in left.items()
        if id(slot.layer) not in lora or "lora_magnitude_vector" in key
    ]


def _check_shapes(
    pairs: list[tuple[str, Slot, torch.Tensor]], adapter_name: str, where: str
) -> list[Finding]:
    """A rank may change; where the scale is held as a tensor the model is made for compiling and keeps its shapes."""
    findings = []
    for key, slot, tensor in pairs:
        have, new = tuple(slot.tensor.shape), tuple(tensor.shape)
        if have == new:
            continue
        rank = _rank_dim(slot, key)
        same = rank is not None and have[:rank] + have[rank + 1 :] == new[:rank] + new[rank + 1 :]
        if not same:
            why = f"it has the shape {new}, the loaded adapter {have}"
        elif _keeps_shape(slot, adapter_name) and (
            isinstance(slot.layer, ParamWrapper) or new[rank or 0] > have[rank or 0]
        ):
            why = (
                f"it has the shape {new}, and the model is prepared for ranks that fit into {have}"
            )
        else:
            continue
        findings.append(
            Finding(
                "hotswap",
                why,
                where=where,
                key=key,
                fix="load it under another name without hotswap",
            )
        )
    return findings


def _rank_dim(slot: Slot, key: str) -> int | None:
    """The dim of a factor that is its rank (times the number of experts)."""
    layer: Any = slot.layer
    if not isinstance(layer, LoraLayer):
        return None
    if ".lora_A." in key or key.endswith(".lora_embedding_A"):
        return 0
    if key.endswith((".lora_B.weight", ".lora_embedding_B")):
        return 1
    return None


def _keeps_shape(slot: Slot, adapter_name: str) -> bool:
    layer: Any = slot.layer
    return isinstance(layer, LoraLayer) and isinstance(layer.scaling[adapter_name], torch.Tensor)


def _swap_in(slot: Slot, tensor: torch.Tensor, adapter_name: str) -> None:
    have = slot.tensor
    if have.shape == tensor.shape:
        fill(slot, tensor)
        return
    with torch.no_grad():
        if _keeps_shape(slot, adapter_name):
            have.zero_()
            have[tuple(slice(size) for size in tensor.shape)].copy_(tensor)
        else:
            have.data = tensor.to(have.device, have.dtype)
    _tell_size(slot.owner)


def _tell_size(layer: nn.Module) -> None:
    """Let a factor's Linear say the sizes that it has."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape


def _set_scale(layer: Any, path: str, adapter_name: str, config: Any) -> None:
    name = _parameter_path(layer, path) if isinstance(layer, ParamWrapper) else path
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
    layer.r[adapter_name], layer.lora_alpha[adapter_name] = rank, alpha
    scale = alpha / rank**0.5 if config.use_rslora else alpha / rank
    if isinstance(layer.scaling[adapter_name], torch.Tensor):
        layer.scaling[adapter_name].fill_(scale)
    else:
        layer.scaling[adapter_name] = scale


def _parameter_path(layer: Any, path: str) -> str:
    """The path of an adapted parameter, without the wrappers that stand between it and its module."""
    return f"{outside(path)}.{layer.parameter_name}"
