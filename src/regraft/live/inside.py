"""LoRA factors inside a full state dict, as runs that shard a model with its adapters save them.

What is around one module keeps its name and moves with it. Factors of modules that are stacked or fused in the other
layout have no module there: they move as an adapter does, by the base's rules, and stand where PEFT puts them around
the parameter. A state dict has no scales; what multiplies the factors is the model's before and after, so each
module counts with the same one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from regraft.bridges.torch_tensors import state_of
from regraft.dialects.peft.scan import PREFIX
from regraft.dialects.peft.without_config import (
    configs_of,
    outside,
    split_factor,
    with_one_a,
)
from regraft.layouts.names import Layout
from regraft.live.mapping import Mapping as LiveMapping
from regraft.names.modules import without_wrappers
from regraft.names.resolve import Part, Resolved

_STACK = 3
"""The dims of a stacked parameter: experts, and two more."""


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

    In another layout than a model's own, those around its stacked parameters move, too, whether or not the model has
    adapters there.

    ``None`` where there are none.

    Raises what converting an adapter raises.
    """
    gone: set[str] = set()
    made: dict[str, Any] = {}
    for part in resolved.parts:
        keys = list(resolved.unmatched)
        if layout not in (None, mapping.imported[part.model].layout):
            keys += [key for key in resolved.carried if _is_packed(mapping, part, key)]
        found = _factors(part, keys)
        for name, factors in found.items():
            tensors = {own: state_dict[key] for own, key in factors.items()}
            if any(getattr(tensor, "is_meta", False) for tensor in tensors.values()):
                continue
            moved = _convert(mapping, part, tensors, layout)
            if layout is None:
                state = state_of(mapping.live.root)
                moved = with_one_a(moved, partial(_stacks, mapping, part), state)
            inserted = f".{name}.weight" if name else ".weight"
            for key, tensor in moved.items():
                made[part.prefix + key.removesuffix(".weight") + inserted] = tensor
            gone.update(factors.values())
    if not gone:
        return None
    kept = {key: tensor for key, tensor in state_dict.items() if key not in gone}
    return Moved({**kept, **made}, tuple(made))


def _factors(part: Part, keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """For each adapter's name its factors among some keys: as PEFT's files spell them, and the key."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        factor = split_factor(key[len(part.prefix) :]) if key.startswith(part.prefix) else None
        if factor is not None:
            module, end, name = factor
            found.setdefault(name, {})[_bare(module) + end] = key
    return found


def _bare(module: str) -> str:
    """A module without wrappers; PEFT's nesting tells two parameters of one module apart and stays.

    >>> _bare("_fsdp_wrapped_module.layers.0.experts.base_layer")
    'layers.0.experts.base_layer'
    """
    depth = len(module) - len(module.removesuffix(".base_layer"))
    return without_wrappers(module[: len(module) - depth]) + module[len(module) - depth :]


def _stacks(mapping: LiveMapping, part: Part, module: str) -> dict[str, tuple[int, ...]]:
    """The stacked parameters of a module, in the order in which PEFT wraps them; the first is the innermost."""
    start = f"{module}."
    tensors = mapping.live.models[part.model].skeleton.tensors
    return {
        name: tuple(shape)
        for name, shape in tensors.items()
        if name.startswith(start) and "." not in name[len(start) :] and len(shape) == _STACK
    }


def _is_packed(mapping: LiveMapping, part: Part, key: str) -> bool:
    """Whether a key is that of a factor around a stacked parameter."""
    factor = split_factor(key[len(part.prefix) :]) if key.startswith(part.prefix) else None
    return factor is not None and bool(_stacks(mapping, part, outside(_bare(factor[0]))))


def _convert(
    mapping: LiveMapping, part: Part, factors: Mapping[str, Any], layout: str | None
) -> dict[str, Any]:
    from regraft.adapters.convert import convert_adapter
    from regraft.bridges.peft.known import (
        LiveTransformers,
        known_model,
        layout_in_memory,
        to_numpy,
        to_torch,
    )
    from regraft.dialects.peft.source import Source

    base = mapping.live.models[part.model].module
    to = layout_in_memory(base) if layout is None else Layout(layout)
    made: dict[str, Any] = {}
    for config, mine in configs_of(factors, partial(_stacks, mapping, part)):
        tensors = {PREFIX + key: to_numpy(factors[key]) for key in mine}
        source = Source("", "the LoRA in the state dict", config, tensors)
        done = convert_adapter(source, to, known_model(base), foreign=LiveTransformers(base))
        made |= {key.removeprefix(PREFIX): to_torch(t) for key, t in done.tensors.items()}
    return made
