"""LoRA factors inside a full state dict, as runs that shard a model with its adapters save them.

What is around one module keeps its name and moves with it. Factors of modules that are stacked or fused in the other
layout have no module there: they move as an adapter does, by the base's rules, and stand where PEFT puts them around
the parameter. A state dict has no scales; what multiplies the factors is the model's before and after, so each
module counts with the same one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regraft.layouts.names import Layout
from regraft.live.mapping import Mapping as LiveMapping
from regraft.names.modules import without_wrappers
from regraft.names.resolve import Part, Resolved

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<letter>[AB])\.(?:(?P<name>.+)\.)?weight")


@dataclass(frozen=True, slots=True)
class Moved:
    """The state dict with the factors under their new names, and what they were made of."""

    state_dict: dict[str, Any]
    made: tuple[str, ...]
    """The new keys, each below its part's prefix."""


def move_factors(
    mapping: LiveMapping, resolved: Resolved, state_dict: Mapping[str, Any], layout: str | None
) -> Moved | None:
    """The factors that no module of the models is for, in a layout or, without one, in each model's own.

    ``None`` where there are none.

    Raises what converting an adapter raises.
    """
    gone: set[str] = set()
    made: dict[str, Any] = {}
    for part in resolved.parts:
        found = _factors(part, resolved)
        for name, factors in found.items():
            tensors = {own: state_dict[key] for own, key in factors.items()}
            if any(getattr(tensor, "is_meta", False) for tensor in tensors.values()):
                continue
            moved = _convert(mapping, part, tensors, layout)
            inserted = f".{name}.weight" if name else ".weight"
            for key, tensor in moved.items():
                made[part.prefix + key.removesuffix(".weight") + inserted] = tensor
            gone.update(factors.values())
    if not gone:
        return None
    kept = {key: tensor for key, tensor in state_dict.items() if key not in gone}
    return Moved({**kept, **made}, tuple(made))


def _factors(part: Part, resolved: Resolved) -> dict[str, dict[str, str]]:
    """For each adapter's name its unmatched factors: as PEFT's files spell them, and the key."""
    found: dict[str, dict[str, str]] = {}
    for key in resolved.unmatched:
        match = _FACTOR.fullmatch(key[len(part.prefix) :]) if key.startswith(part.prefix) else None
        if match is not None:
            own = f"{_bare(match['module'])}.lora_{match['letter']}.weight"
            found.setdefault(match["name"] or "", {})[own] = key
    return found


def _bare(module: str) -> str:
    """A module without wrappers; PEFT's nesting tells two parameters of one module apart and stays.

    >>> _bare("_fsdp_wrapped_module.layers.0.experts.base_layer")
    'layers.0.experts.base_layer'
    """
    depth = len(module) - len(module.removesuffix(".base_layer"))
    return without_wrappers(module[: len(module) - depth]) + module[len(module) - depth :]


def _convert(
    mapping: LiveMapping, part: Part, factors: Mapping[str, Any], layout: str | None
) -> dict[str, Any]:
    from regraft.adapters.convert import convert_adapter
    from regraft.bridges.peft.known import (
        LiveTransformers,
        known_model,
        live_layout,
        to_numpy,
        to_torch,
    )
    from regraft.dialects.peft.scan import PREFIX
    from regraft.dialects.peft.source import Source

    base = mapping.live.models[part.model].module
    ranks = {
        key.removesuffix(".lora_A.weight"): int(tensor.shape[0])
        for key, tensor in factors.items()
        if key.endswith(".lora_A.weight")
    }
    most = max(ranks.values(), default=1)
    other = {module: rank for module, rank in ranks.items() if rank != most}
    config = {
        "peft_type": "LORA",
        "r": most,
        "lora_alpha": most,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(ranks),
    }
    tensors = {PREFIX + key: to_numpy(tensor) for key, tensor in factors.items()}
    source = Source("", "the LoRA in the state dict", config, tensors)
    to = live_layout() if layout is None else Layout(layout)
    done = convert_adapter(source, to, known_model(base), foreign=LiveTransformers(base))
    return {key.removeprefix(PREFIX): to_torch(tensor) for key, tensor in done.tensors.items()}
