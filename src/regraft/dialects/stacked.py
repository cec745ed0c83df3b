"""Experts with one 3-D tensor per projection, as Tinker and servers have it: ``experts.w1.lora_A.weight`` (E, r, in).

An expert dim of 1 is shared by all experts; a tensor without elements is a projection that does not exist. ``w1`` is
gate, ``w3`` up, ``w2`` down.

Source: tinker-cookbook 0.6.1, ``weights/_adapter.py``; sglang 0.5.23, ``srt/lora/mem_pool.py``; vllm 0.33.0,
``--enable-moe-shared-loras``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from regraft.adapters.form import Array
from regraft.dialects.peft.config import LoraConfig
from regraft.dialects.peft.packing import fast_experts
from regraft.dialects.tool_files import INNER, OUTER, PREFIX, Renamed
from regraft.errors import BadInputError, Finding

STACKED = re.compile(
    r"(?P<module>.+\.experts)\.(?P<leaf>w[123]|gate_proj|up_proj|down_proj)\.lora_(?P<letter>[AB])\.weight"
)
_PLAIN = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_NUMBERED = {plain: name for name, plain in _PLAIN.items()}


def has_stacks(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The name of a 3-D factor of experts, ``None`` where there is none."""
    return next((n for n, s in shapes.items() if len(s) == 3 and STACKED.fullmatch(n)), None)


def expand_stacks(
    tensors: Mapping[str, Array],
    config: Mapping[str, Any],
    *,
    interleaved: bool = False,
    where: str = "",
) -> dict[str, Any]:
    """The fields ``tensors`` and ``config`` of a source with one adapter per expert in place of each stack.

    With ``interleaved`` (gpt_oss, whose experts are one parameter in every layout) they are packed as PEFT does it,
    gate and up in turns.

    Raises ``BadInputError`` where the sizes of a stack contradict each other.
    """
    stacks: dict[str, dict[str, dict[str, Array]]] = defaultdict(lambda: defaultdict(dict))
    rest = Renamed(where)
    for name, tensor in tensors.items():
        hit = STACKED.fullmatch(name) if ".experts." in name and tensor.ndim == 3 else None
        if hit is None:
            rest[name] = tensor
        elif tensor.size:
            stacks[hit["module"]][hit["leaf"]][hit["letter"]] = tensor
    made = dict(config)
    if not stacks:
        return {"tensors": dict(rest), "config": made}
    findings: list[Finding] = []
    parameters: list[str] = []
    leaves: set[str] = set()
    for module, projections in stacks.items():
        whole = {}
        for leaf, pair in projections.items():
            shape = _count(pair)
            if shape is None:
                findings.append(
                    Finding(
                        "half" if len(pair) < 2 else "shape",
                        "it has no other half beside it"
                        if len(pair) < 2
                        else f"lora_A {list(pair['A'].shape)} and lora_B {list(pair['B'].shape)} do not fit together",
                        where=where or None,
                        key=f"{module}.{leaf}",
                        fix="save the adapter again",
                    )
                )
                continue
            whole[leaf] = tuple(np.broadcast_to(pair[x], (shape, *pair[x].shape[1:])) for x in "AB")
        experts = {len(a) for a, _ in whole.values()}
        most = max(experts, default=0)
        if len(experts - {1}) > 1:
            findings.append(
                Finding(
                    "shape",
                    f"its projections have {sorted(experts)} experts",
                    where=where or None,
                    key=module,
                )
            )
            continue
        whole = {
            leaf: tuple(np.broadcast_to(x, (most, *x.shape[1:])) for x in pair)
            for leaf, pair in whole.items()
        }
        plain = [_PLAIN.get(leaf, leaf) for leaf in whole]
        for leaf in {leaf for leaf in plain if plain.count(leaf) > 1}:
            rest.doubled[f"{module}.{leaf}"] = None
        if interleaved:
            parameters += _pack(rest, module, whole)
            continue
        numbered = module.split(".")[-2] == "block_sparse_moe"
        for leaf, (a, b) in whole.items():
            name = _NUMBERED.get(leaf, leaf) if numbered else _PLAIN.get(leaf, leaf)
            leaves.add(name)
            for expert in range(most):
                rest[f"{module}.{expert}.{name}.lora_A.weight"] = a[expert]
                rest[f"{module}.{expert}.{name}.lora_B.weight"] = b[expert]
    if findings:
        raise BadInputError(findings)
    entries = made.get("target_modules")
    if isinstance(entries, list):
        made["target_modules"] = [*entries, *sorted(leaves - set(entries))]
    if parameters:
        made["target_parameters"] = parameters
    return {"tensors": rest.checked(), "config": made}


_ONE = re.compile(
    r"(?P<module>.+\.experts)\.(?P<expert>\d+)\.(?P<leaf>gate_proj|up_proj|down_proj)\.lora_(?P<letter>[AB])\.weight"
)


def stack_split(tensors: Mapping[str, Array], config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields ``tensors`` and ``config`` of a source whose experts were split for a server, stacked again.

    The base has them stacked in every layout, gate before up; they come back packed as PEFT packs them since 0.19.
    """
    found: dict[str, dict[str, dict[str, dict[int, Array]]]] = {}
    rest: dict[str, Array] = {}
    for name, tensor in tensors.items():
        hit = _ONE.fullmatch(name)
        if hit is None:
            rest[name] = tensor
            continue
        pair = found.setdefault(hit["module"], {}).setdefault(hit["leaf"], {})
        pair.setdefault(hit["letter"], {})[int(hit["expert"])] = tensor
    parameters: list[str] = []
    made = dict(config)
    ranks: dict[str, Any] = {}
    for module, leaves in found.items():
        whole: dict[str, tuple[Array, ...]] = {
            leaf: tuple(np.stack([x for _, x in sorted(each[letter].items())]) for letter in "AB")
            for leaf, each in leaves.items()
        }
        halves = [whole[leaf] for leaf in ("gate_proj", "up_proj") if leaf in whole]
        alike = len(halves) == 2 and np.array_equal(halves[0][0], halves[1][0])
        if alike:
            joined = halves[0][0], np.concatenate([half[1] for half in halves], axis=1)
            whole = {"gate_up_proj": joined, "down_proj": whole["down_proj"]}
        else:
            a, b = np.concatenate([half[0] for half in halves], axis=1), _diagonal(halves)
            whole = {"gate_up_proj": (a, b), "down_proj": whole["down_proj"]}
        for leaf, depth in ((INNER, 1), (OUTER, 0)):
            a, b = whole[leaf]
            place = module + ".base_layer" * depth
            rest[f"{place}.lora_A.weight"] = a.reshape(-1, a.shape[-1])
            rest[f"{place}.lora_B.weight"] = fast_experts(b)
            path = f"{module.removeprefix(PREFIX)}.{leaf}"
            parameters.append(path)
            ranks[path] = a.shape[1]
    _rank_parameters(made, ranks)
    made["target_parameters"] = parameters
    made["peft_version"] = "0.19.0"
    return {"tensors": rest, "config": made}


def _diagonal(halves: list[tuple[Array, ...]]) -> Array:
    """The B of gate and up one after the other, each with its own components."""
    ranks = [half[0].shape[1] for half in halves]
    rows = [half[1].shape[1] for half in halves]
    b = np.zeros((len(halves[0][1]), sum(rows), sum(ranks)), halves[0][1].dtype)
    row = column = 0
    for half, size, rank in zip(halves, rows, ranks, strict=True):
        b[:, row : row + size, column : column + rank] = half[1]
        row, column = row + size, column + rank
    return b


def _rank_parameters(config: dict[str, Any], ranks: Mapping[str, int]) -> None:
    """Give stacked parameters their ranks, at the scale that their experts had."""
    lora = LoraConfig(config)
    rank_pattern = {
        f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != config["r"]
    }
    alpha_pattern = {}
    for path, rank in ranks.items():
        module, _, leaf = path.rpartition(".")
        was = lora.scale(f"{module}.0.{'down_proj' if leaf == OUTER else 'gate_proj'}")
        alpha = was.at_rank(rank).alpha
        if alpha != config["lora_alpha"]:
            alpha_pattern[f"^{re.escape(path)}"] = alpha
    for name, more in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        if more or config.get(name):
            config[name] = {**more, **(config.get(name) or {})}


def _count(pair: Mapping[str, Array]) -> int | None:
    """The number of experts of a pair; ``None`` where its halves do not fit."""
    if len(pair) < 2 or pair["A"].shape[1] != pair["B"].shape[2]:
        return None
    counts = {len(pair["A"]), len(pair["B"])}
    return max(counts) if len(counts - {1}) <= 1 else None


def _pack(rest: dict[str, Array], module: str, whole: Mapping[str, tuple[Array, ...]]) -> list[str]:
    """Pack one module's experts as PEFT does, gate and up in turns; the parameters' names."""
    found = {_PLAIN.get(leaf, leaf): pair for leaf, pair in whole.items()}
    names = []
    halves = [found.get("gate_proj"), found.get("up_proj")]
    inner = None
    if any(half is not None for half in halves):
        inner = _interleave(halves)
        names.append(INNER)
    outer = found.get("down_proj")
    if outer is not None:
        names.append(OUTER)
    for pair, depth in ((inner, outer is not None), (outer, False)):
        if pair is not None:
            a, b = pair[0], pair[1]
            place = module + ".base_layer" * depth
            rest[f"{place}.lora_A.weight"] = np.ascontiguousarray(a).reshape(-1, a.shape[-1])
            rest[f"{place}.lora_B.weight"] = fast_experts(b)
    return [f"{module.removeprefix(PREFIX)}.{name}" for name in names]


def _interleave(halves: list[tuple[Array, ...] | None]) -> tuple[Array, Array]:
    """Gate and up as one: ranks stacked, rows in turns."""
    have = [half for half in halves if half is not None]
    ranks = [half[0].shape[1] if half is not None else 0 for half in halves]
    experts, rows = len(have[0][1]), have[0][1].shape[1]
    a = np.concatenate([half[0] for half in have], axis=1)
    b = np.zeros((experts, 2 * rows, sum(ranks)), have[0][1].dtype)
    start = 0
    for turn, half in enumerate(halves):
        if half is not None:
            b[:, turn::2, start : start + ranks[turn]] = half[1]
            start += ranks[turn]
    return a, b
