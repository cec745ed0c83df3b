"""The proof: deltas from both files, computed with numpy alone and nothing of regraft's.

What a LoRA adds to a weight, its delta, is what counts: two adapters are the same if every delta
is. Here the deltas are computed expert by expert, as PEFT computes them from each file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Deltas = dict[str, Array]
"""By a name for the weight: (out, in) in float64."""

_PREFIX = "base_model.model."


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """The config and the tensors (float32 only) of an adapter."""
    raw = (folder / "adapter_model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        assert info["dtype"] == "F32"
        flat = np.frombuffer(raw[start + begin : start + end], "<f4")
        tensors[name] = flat.reshape(info["shape"])
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")), tensors


def deltas_v4(config: Mapping[str, Any], tensors: Mapping[str, Array]) -> Deltas:
    """Every expert is a module of its own; w1 is the gate, w3 is up, w2 is down."""
    result: Deltas = {}
    gates: Deltas = {}
    ups: Deltas = {}
    for name, a in tensors.items():
        found = re.fullmatch(r"(.+)\.lora_A\.weight", name)
        if found is None:
            continue
        b = tensors[f"{found[1]}.lora_B.weight"]
        path = found[1].removeprefix(_PREFIX)
        delta = _scale(config, path) * (b.astype(np.float64) @ a.astype(np.float64))
        expert = re.fullmatch(r"(.+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])", path)
        if expert is None:
            result[path] = delta
        elif expert[3] == "w2":
            result[f"{expert[1]}.expert {expert[2]}, down"] = delta
        else:
            half = gates if expert[3] == "w1" else ups
            half[f"{expert[1]}.expert {expert[2]}, gate and up"] = delta
    for weight, gate in gates.items():
        result[weight] = np.concatenate([gate, ups[weight]])
    return result


def deltas_v5(config: Mapping[str, Any], tensors: Mapping[str, Array], experts: int) -> Deltas:
    """The experts of a layer share two parameters, and each has one packed pair of factors.

    PEFT nests the two: the inner pair, at ``experts.base_layer``, belongs to ``gate_up_proj``, the
    outer one to ``down_proj``. In A, (experts * rank, in), an expert's rows stand together; in B,
    (out, rank * experts), the experts take turns.
    """
    result: Deltas = {}
    for name, a in tensors.items():
        found = re.fullmatch(r"(.+)\.lora_A\.weight", name)
        if found is None:
            continue
        b = tensors[f"{found[1]}.lora_B.weight"].astype(np.float64)
        a = a.astype(np.float64)
        path = found[1].removeprefix(_PREFIX)
        packed = re.fullmatch(r"(.+)\.mlp\.experts(\.base_layer)?", path)
        if packed is None:
            result[path] = _scale(config, path) * (b @ a)
            continue
        parameter, part = ("gate_up_proj", "gate and up") if packed[2] else ("down_proj", "down")
        scale = _scale(config, f"{packed[1]}.mlp.experts.{parameter}")
        rank = len(a) // experts
        for e in range(experts):
            rows = a[e * rank : (e + 1) * rank]
            result[f"{packed[1]}.expert {e}, {part}"] = scale * (b[:, e::experts] @ rows)
    return result


def _scale(config: Mapping[str, Any], path: str) -> float:
    def find(patterns: Mapping[str, Any], default: Any) -> Any:
        fitting = (
            value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)
        )
        return next(fitting, default)

    alpha = find(config.get("alpha_pattern") or {}, config["lora_alpha"])
    return float(alpha / find(config.get("rank_pattern") or {}, config["r"]))


def largest_difference(one: Deltas, other: Deltas) -> float:
    """The largest difference of any two elements; infinite where the weights are not the same."""
    if one.keys() != other.keys() or any(one[k].shape != other[k].shape for k in one):
        return math.inf
    return max(float(np.abs(one[k] - other[k]).max()) for k in one)


def norm(deltas: Deltas) -> float:
    """The norm of all deltas together."""
    return math.sqrt(math.fsum(float(x) for d in deltas.values() for x in np.square(d).flat))


def swap_experts(tensors: Mapping[str, Array], experts: int) -> dict[str, Array]:
    """The packed factors with experts 0 and 1 exchanged, as a faulty converter might do it."""
    order = [1, 0, *range(2, experts)]
    result = dict(tensors)
    for name, tensor in tensors.items():
        if ".mlp.experts." in name:
            is_a = ".lora_A." in name
            split = (experts, -1, tensor.shape[1]) if is_a else (len(tensor), -1, experts)
            blocks = tensor.reshape(split)
            result[name] = (blocks[order] if is_a else blocks[..., order]).reshape(tensor.shape)
    return result
