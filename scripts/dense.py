"""What an adapter of a Mixtral adds to its base, in float64, by numpy and the names alone: an oracle for ``fuzz.py``.

Nothing here uses regraft's rules, plans or readers of configs. It knows Mixtral's names in both layouts, and how PEFT
resolves ranks, scales and stacked factors (its ``get_pattern_key`` and ``ParamWrapper.get_delta_weight``), so a
converter that is wrong in any of these is noticed even where the way back is wrong in the same way.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regraft.storage.safetensors import open_tensors

PREFIX = "base_model.model."
STACKED = ("gate_up_proj", "down_proj")
"""The parameters of ``mlp.experts``, in the order in which the module has them and PEFT wraps them."""
EXPERT = {"w1": "gate", "w3": "up", "w2": "down"}
SMALLEST = float(np.finfo(np.float64).tiny)

Config = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """What one part of the model gets: ``added`` to it, or in its place; ``size`` bounds each entry's rounding."""

    added: np.ndarray
    size: np.ndarray


def blocks(folder: Path) -> dict[str, Block]:
    """Every block by its name in the new layout, the experts' each by itself: ``...experts.3.gate``.

    The same for both layouts of one adapter. Raises AssertionError where PEFT would leave a tensor unread.
    """
    config: Config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = dict(open_tensors(folder / "adapter_model.safetensors").items())
    found: dict[str, Block] = {}
    with np.errstate(all="ignore"):
        for key in tensors:
            name = key.removeprefix(PREFIX)
            if name.endswith(".lora_A.weight"):
                b = tensors[key.replace(".lora_A.", ".lora_B.")]
                found |= low_rank(name.removesuffix(".lora_A.weight"), tensors[key], b, config)
            elif name.endswith(".lora_embedding_A"):
                a, b = tensors[key].T, tensors[key[:-1] + "B"].T
                path = name.removesuffix(".lora_embedding_A")
                found[path] = product(scale(config, path, a.shape[1]), a, b)
            elif name.endswith(".lora_B.bias"):
                path = name.removesuffix(".lora_B.bias")
                rank = tensors[key.removesuffix("bias") + "weight"].shape[1]
                found[renamed(path) + " bias"] = whole(tensors[key] * scale(config, path, rank))
            elif not name.endswith((".lora_B.weight", ".lora_embedding_B")):
                found |= saved(name, tensors[key])
    return found


def low_rank(path: str, a: np.ndarray, b: np.ndarray, config: Config) -> dict[str, Block]:
    """The blocks of one pair of factors: of a module, of a parameter, or of a parameter of all experts.

    ``a`` is (rank, in) and ``b`` (out, rank); of E stacked experts they are (E rank, in) and (out, rank E), where
    experts are the outer axis of ``a``'s rows and the inner one of ``b``'s columns.
    """
    nested = path.count(".base_layer")
    path = path.replace(".base_layer", "")
    if not path.endswith(".mlp.experts"):
        aimed = f"{path}.weight" if is_parameter(config, f"{path}.weight") else path
        assert aimed != path or is_targeted(config, path), f"{path} is no target, and is not loaded"
        return {renamed(path): product(scale(config, aimed, a.shape[0]), b, a)}
    held = [name for name in STACKED if is_parameter(config, f"{path}.{name}")]
    aimed = f"{path}.{held[len(held) - 1 - nested]}"
    rank = pick(config, "rank_pattern", aimed, config["r"])
    experts, rest = divmod(a.shape[0], rank)
    assert rest == 0, f"{aimed}: {a.shape[0]} rows are no experts of rank {rank}"
    a = a.reshape(experts, rank, -1)
    b = b.reshape(len(b), rank, experts)
    factor = scale(config, aimed, rank)
    found = {}
    for number in range(experts):
        part = product(factor, b[:, :, number], a[number])
        found |= cut(f"{path}.{number}", aimed.endswith("gate_up_proj"), part)
    return found


def cut(path: str, is_pair: bool, part: Block) -> dict[str, Block]:
    """One expert's part of a stacked parameter by the old names' meaning: gate above up, or down."""
    if not is_pair:
        return {f"{path}.down": part}
    half = len(part.added) // 2
    return {
        f"{path}.gate": Block(part.added[:half], part.size[:half]),
        f"{path}.up": Block(part.added[half:], part.size[half:]),
    }


def saved(name: str, tensor: np.ndarray) -> dict[str, Block]:
    """A tensor that stands for itself: a saved weight, a vector, a bias, a token's row."""
    stacked = re.fullmatch(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)", name)
    if stacked is None:
        return {renamed(name): whole(tensor)}
    found = {}
    for number, part in enumerate(tensor):
        found |= cut(f"{stacked[1]}.{number}", stacked[2] == "gate_up_proj", whole(part))
    return found


def renamed(path: str) -> str:
    """A module's path or a tensor's name, in the new layout."""
    expert = re.fullmatch(r"(.*)\.block_sparse_moe\.experts\.(\d+)\.(w[123])(\.weight)?", path)
    if expert is not None:
        return f"{expert[1]}.mlp.experts.{int(expert[2])}.{EXPERT[expert[3]]}"
    return path.replace(".block_sparse_moe.", ".mlp.")


def pick(config: Config, field: str, path: str, default: Any) -> Any:
    """The value of a pattern as PEFT picks it: the first that fits the end of the path."""
    for pattern, value in (config.get(field) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def scale(config: Config, path: str, rank: int) -> float:
    """What ``B @ A`` is multiplied by; the factors must have the rank that the config gives them."""
    given = pick(config, "rank_pattern", path, config["r"])
    assert given == rank, f"{path}: the config gives rank {given}, the file {rank}"
    alpha = float(pick(config, "alpha_pattern", path, config["lora_alpha"]))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def is_parameter(config: Config, name: str) -> bool:
    """Whether ``target_parameters`` names it."""
    aimed = config.get("target_parameters") or []
    return any(name == one or name.endswith(f".{one}") for one in aimed)


def is_targeted(config: Config, path: str) -> bool:
    """Whether PEFT gives this module a LoRA, as far as lists and expressions say."""
    return not fits(config.get("exclude_modules"), path) and (
        config.get("target_modules") == "all-linear" or fits(config.get("target_modules"), path)
    )


def fits(wanted: str | list[str] | None, path: str) -> bool:
    """Whether a list of names, or one expression, fits a module's path."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(path == one or path.endswith(f".{one}") for one in wanted or [])


def product(factor: float, left: np.ndarray, right: np.ndarray) -> Block:
    """``factor * left @ right`` and the sum of its terms' sizes."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    return Block(factor * (left @ right), abs(factor) * (abs(left) @ abs(right)))


def whole(tensor: np.ndarray) -> Block:
    """A tensor that is kept as it is, bit for bit."""
    return Block(tensor.astype(np.float64), np.zeros(tensor.shape))


def _unmoved(found: dict[str, Block]) -> dict[str, Block]:
    """Under a language model's own names: an adapter may have moved out of the model that has it inside, or into it."""
    return {
        name.replace("model.language_model.", "model.", 1): part for name, part in found.items()
    }


def assert_same(before: Path, after: Path, tolerance: float = 1e-6) -> None:
    """Raise AssertionError where two adapters do not add the same to some block, naming it.

    Entries may differ by ``tolerance`` times the sum of the sizes of their terms: where experts share one scale,
    some factor was rounded once. They may also differ by less than float64's smallest number of full precision, below
    which no product is exact. Experts that only one side has must get zeros.
    """
    old, new = _unmoved(blocks(before)), _unmoved(blocks(after))
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            alone = (old if name in old else new)[name]
            assert ".experts." in name and not alone.added.any(), f"only one side has {name}"
            continue
        was, now = old[name], new[name]
        assert was.added.shape == now.added.shape, f"{name}: {was.added.shape}, {now.added.shape}"
        with np.errstate(all="ignore"):
            near = abs(now.added - was.added) <= tolerance * was.size + SMALLEST
        same = near | (now.added == was.added) | (np.isnan(now.added) & np.isnan(was.added))
        assert same.all(), f"{name} differs by {abs(now.added - was.added)[~same].max()}"
