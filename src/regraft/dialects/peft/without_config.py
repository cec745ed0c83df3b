"""LoRA factors with no config beside them, as in a model's state dict: the configs under which PEFT would have them.

A state dict has no scales; what multiplies the factors is the model's before and after, so each module counts with a
scale of 1. Names are below PEFT's prefix, such as ``layers.0.q_proj.lora_A.weight``; tensors have torch's methods.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Stacks = Callable[[str], Mapping[str, tuple[int, ...]]]
"""The stacked parameters (experts, and two more dims) of a module, in the order in which PEFT wraps them."""

_A, _B = ".lora_A.weight", ".lora_B.weight"
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<letter>[AB])\.(?:(?P<name>.+)\.)?weight")


def split_factor(key: str) -> tuple[str, str, str] | None:
    """The module of a factor's key, the end that a file has it under, and the adapter's name (empty without one).

    >>> split_factor("layers.0.q_proj.lora_A.default.weight")
    ('layers.0.q_proj', '.lora_A.weight', 'default')
    """
    match = _FACTOR.fullmatch(key)
    if match is None:
        return None
    return match["module"], _A if match["letter"] == "A" else _B, match["name"] or ""


def outside(module: str) -> str:
    """A module without PEFT's nesting.

    >>> outside("layers.0.experts.base_layer")
    'layers.0.experts'
    """
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return module


def configs_of(
    factors: Mapping[str, Any], stacks: Stacks
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Configs under which PEFT would have factors, and which: those of modules, and those of stacked parameters."""
    ranks = {
        key.removesuffix(_A): int(tensor.shape[0])
        for key, tensor in factors.items()
        if key.endswith(_A)
    }
    packed = [module for module in ranks if stacks(outside(module))]
    modules = {module: rank for module, rank in ranks.items() if module not in packed}
    if modules:
        config = {"target_modules": sorted(modules)}
        yield _with_ranks(config, modules), _keys_of(modules, factors)
    around: dict[str, int] = {}
    for module in packed:
        around[outside(module)] = around.get(outside(module), 0) + 1
    of_parameters: dict[str, int] = {}
    for module, times in around.items():
        shapes = stacks(module)
        for depth, name in enumerate(reversed(_targets(shapes, module, times, factors))):
            packed_rank = ranks.get(module + ".base_layer" * depth, 0)
            of_parameters[name] = packed_rank // shapes[name][0]
    if packed:
        config = {"target_modules": [], "target_parameters": list(of_parameters)}
        yield _with_ranks(config, of_parameters), _keys_of(packed, factors)


def with_one_a(
    factors: Mapping[str, Any], stacks: Stacks, live: Mapping[str, Any]
) -> dict[str, Any]:
    """Factors of stacks with one A where both projections had the same one, and the model's layers are made for one.

    So they are after the way back: A (experts x 2 rank, in) has equal halves, those of B (out, 2 rank x experts)
    have other rows. ``live`` is the state of the model.
    """
    made = dict(factors)
    for key, a in factors.items():
        module = key.removesuffix(_A)
        shapes = stacks(outside(module)) if module != key else {}
        if not shapes:
            continue
        wanted = {tuple(t.shape) for name, t in live.items() if f"{module}.lora_A." in name}
        if not wanted or tuple(a.shape) in wanted:
            continue
        experts = next(iter(shapes.values()))[0]
        b = factors[module + _B]
        rank = a.shape[0] // experts
        by_expert, columns = a.reshape(experts, rank, -1), b.reshape(-1, rank, experts)
        one, two = by_expert[:, : rank // 2], by_expert[:, rank // 2 :]
        first, second = columns[:, : rank // 2], columns[:, rank // 2 :]
        if rank % 2 or not one.equal(two) or bool(((first != 0) & (second != 0)).any()):
            continue
        made[key] = one.reshape(-1, a.shape[1])
        made[module + _B] = (first + second).reshape(b.shape[0], -1)
    return made


def _keys_of(modules: Iterable[str], factors: Mapping[str, Any]) -> list[str]:
    return [module + end for module in modules for end in (_A, _B) if module + end in factors]


def _with_ranks(config: dict[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """A config with a scale of 1 for everything."""
    most = max(ranks.values(), default=1)
    other = {name: rank for name, rank in ranks.items() if rank != most}
    patterns = {"rank_pattern": other, "alpha_pattern": other}
    return {"peft_type": "LORA", "r": most, "lora_alpha": most, **patterns, **config}


def _targets(
    shapes: Mapping[str, tuple[int, ...]], module: str, times: int, factors: Mapping[str, Any]
) -> list[str]:
    """Which stacked parameters of a module have factors: all of them, or those that the factors' sizes fit."""
    if times == len(shapes):
        return list(shapes)
    sizes = {
        (factors[m + _A].shape[1], factors[m + _B].shape[0])
        for m in (module, f"{module}.base_layer")
        if m + _A in factors and m + _B in factors
    }
    return [n for n, (_, a, b) in shapes.items() if (a, b) in sizes or (b, a) in sizes]
