"""LoRA factors inside a full state dict, as runs that shard a model with its adapters save them.

What is around one module keeps its name and moves with it. Factors of modules that are stacked or fused in the other
layout have no module there: they move as an adapter does, by the base's rules, and stand where PEFT puts them around
the parameter. A state dict has no scales; what multiplies the factors is the model's before and after, so each
module counts with the same one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from regraft.layouts.names import Layout
from regraft.live.mapping import Mapping as LiveMapping
from regraft.names.modules import without_wrappers
from regraft.names.resolve import Part, Resolved

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<letter>[AB])\.(?:(?P<name>.+)\.)?weight")

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
                moved = _with_one_a(mapping, part, moved)
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
    match = _FACTOR.fullmatch(key[len(part.prefix) :]) if key.startswith(part.prefix) else None
    if match is None:
        return False
    return bool(_stacks(mapping, part, _outside(_bare(match["module"]))))


def _outside(module: str) -> str:
    """A module without PEFT's nesting."""
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return module


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
    from regraft.dialects.peft.scan import PREFIX
    from regraft.dialects.peft.source import Source

    base = mapping.live.models[part.model].module
    to = layout_in_memory(base) if layout is None else Layout(layout)
    made: dict[str, Any] = {}
    for config, mine in _configs(mapping, part, factors):
        tensors = {PREFIX + key: to_numpy(factors[key]) for key in mine}
        source = Source("", "the LoRA in the state dict", config, tensors)
        done = convert_adapter(source, to, known_model(base), foreign=LiveTransformers(base))
        made |= {key.removeprefix(PREFIX): to_torch(t) for key, t in done.tensors.items()}
    return made


def _configs(
    mapping: LiveMapping, part: Part, factors: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Configs under which PEFT would have factors, and which: those of modules, and those of stacked parameters."""
    ranks = {
        key.removesuffix(".lora_A.weight"): int(tensor.shape[0])
        for key, tensor in factors.items()
        if key.endswith(".lora_A.weight")
    }
    packed = [module for module in ranks if _stacks(mapping, part, _outside(module))]
    modules = {module: rank for module, rank in ranks.items() if module not in packed}
    if modules:
        config = {"target_modules": sorted(modules)}
        yield _with_ranks(config, modules), _keys_of(modules, factors)
    around: dict[str, int] = {}
    for module in packed:
        around[_outside(module)] = around.get(_outside(module), 0) + 1
    of_parameters: dict[str, int] = {}
    for module, times in around.items():
        stacks = _stacks(mapping, part, module)
        targets = _targets(stacks, module, times, factors)
        for depth, name in enumerate(reversed(targets)):
            packed_rank = ranks.get(module + ".base_layer" * depth, 0)
            of_parameters[name] = packed_rank // stacks[name][0]
    if packed:
        config = {"target_modules": [], "target_parameters": list(of_parameters)}
        yield _with_ranks(config, of_parameters), _keys_of(packed, factors)


def _with_ranks(config: dict[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """A config with a scale of 1 for everything."""
    most = max(ranks.values(), default=1)
    other = {name: rank for name, rank in ranks.items() if rank != most}
    patterns = {"rank_pattern": other, "alpha_pattern": other}
    return {"peft_type": "LORA", "r": most, "lora_alpha": most, **patterns, **config}


def _targets(
    stacks: Mapping[str, tuple[int, ...]], module: str, times: int, factors: Mapping[str, Any]
) -> list[str]:
    """Which stacked parameters of a module have factors: all of them, or those that the factors' sizes fit."""
    if times == len(stacks):
        return list(stacks)
    sizes = {
        (factors[f"{m}.lora_A.weight"].shape[1], factors[f"{m}.lora_B.weight"].shape[0])
        for m in (module, f"{module}.base_layer")
        if f"{m}.lora_A.weight" in factors and f"{m}.lora_B.weight" in factors
    }
    return [n for n, (_, a, b) in stacks.items() if (a, b) in sizes or (b, a) in sizes]


def _with_one_a(mapping: LiveMapping, part: Part, factors: Mapping[str, Any]) -> dict[str, Any]:
    """Factors of stacks with one A where both projections had the same one, and the model's layers are made for one.

    So they are after the way back: A (experts x 2 rank, in) has equal halves, those of B (out, 2 rank x experts)
    have other rows.
    """
    from regraft.bridges.torch_tensors import state_of

    made = dict(factors)
    there = state_of(mapping.live.root)
    for key, a in factors.items():
        module = key.removesuffix(".lora_A.weight")
        stacks = _stacks(mapping, part, _outside(module)) if module != key else {}
        if not stacks:
            continue
        shapes = {tuple(t.shape) for name, t in there.items() if f"{module}.lora_A." in name}
        if not shapes or tuple(a.shape) in shapes:
            continue
        experts = next(iter(stacks.values()))[0]
        b = factors[f"{module}.lora_B.weight"]
        rank = a.shape[0] // experts
        one, two = (
            a.reshape(experts, rank, -1)[:, : rank // 2],
            a.reshape(experts, rank, -1)[:, rank // 2 :],
        )
        first, second = (
            b.reshape(-1, rank, experts)[:, : rank // 2],
            b.reshape(-1, rank, experts)[:, rank // 2 :],
        )
        if rank % 2 or not one.equal(two) or bool(((first != 0) & (second != 0)).any()):
            continue
        made[key] = one.reshape(-1, a.shape[1])
        made[f"{module}.lora_B.weight"] = (first + second).reshape(b.shape[0], -1)
    return made


def _keys_of(modules: Iterable[str], factors: Mapping[str, Any]) -> list[str]:
    names = [f"{module}.lora_{letter}.weight" for module in modules for letter in "AB"]
    return [name for name in names if name in factors]
