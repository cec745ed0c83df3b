"""What an adapter has become in a model: read from PEFT's layers, and compared with what it should be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from regraft.bridges.peft.trial import Landing

ADAPTER = "default"
_TOLERANCE = 1e-4
"""Closer than this, relative to its size, two deltas are the same: factors may be fused in another order."""


@dataclass(frozen=True, slots=True)
class Low:
    """A LoRA on one weight: ``scale * b @ a`` for each of its matrices."""

    a: torch.Tensor
    """(matrices, rank, in)"""
    b: torch.Tensor
    """(matrices, out, rank)"""
    scale: float
    rest: dict[str, torch.Tensor]
    """Other tensors of it: DoRA's magnitudes, a bias."""
    kind: str
    """What PEFT computes with them."""
    broken: str = ""
    """Why it cannot be called in this place."""

    @property
    def rank(self) -> int:
        """Its rank."""
        return int(self.a.shape[1])


@dataclass(slots=True)
class State:
    """All that an adapter has become in a model."""

    lows: dict[str, Low] = field(default_factory=dict)
    """LoRAs by the base tensor that they adapt."""
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Every other tensor that is not the base's own, untouched one."""
    settings: dict[str, str] = field(default_factory=dict)
    """Numbers that other families compute with, by layer."""


def marks_of(model: nn.Module) -> dict[int, int]:
    """The base's tensors before a load: where each lies, and how often it was written to."""
    return {x.data_ptr(): x._version for x in _tensors(model)}


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def read_state(model: nn.Module, marks: dict[int, int]) -> State:
    """The state of a model that an adapter was loaded into; ``marks`` are those of the base before."""
    state = State()
    own: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and type(module).__name__ != "MultiheadAttention":
            path, low, mine = _low_of(name, module)
            if low is not None:
                state.lows[path] = low
                own |= mine
                continue
        if isinstance(module, BaseTunerLayer):
            state.settings[_plain(name)] = _settings(module)
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in named:
        if id(tensor) in own or marks.get(tensor.data_ptr()) == tensor._version:
            continue
        state.tensors[_plain(name)] = tensor.detach()
    return state


def _plain(name: str) -> str:
    return (
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(f".{ADAPTER}", "")
    )


def _low_of(name: str, layer: Any) -> tuple[str, Low | None, set[int]]:
    path = _plain(name)
    tables = [getattr(layer, n) for n in layer.adapter_layer_names if hasattr(layer, n)]
    parts: dict[str, torch.Tensor] = {}
    for label, table in zip(
        (n for n in layer.adapter_layer_names if hasattr(layer, n)), tables, strict=True
    ):
        if ADAPTER not in table:
            continue
        entry = table[ADAPTER]
        if isinstance(entry, nn.Module):
            parts |= {f"{label}.{n}": p for n, p in entry.named_parameters()}
        else:
            parts[label] = entry
    a = parts.pop("lora_A.weight", parts.pop("lora_embedding_A", None))
    b = parts.pop("lora_B.weight", parts.pop("lora_embedding_B", None))
    if a is None or b is None:
        return path, None, set()
    own = {id(x) for x in (a, b, *parts.values())}
    a, b = a.detach().double(), b.detach().double()
    if isinstance(layer, ParamWrapper):
        path = f"{path}.{layer.parameter_name}"
        count = int(layer.num_experts)
        a = a.reshape(count, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)
        variant, broken = "LoRA", ""
    else:
        path = f"{path}.weight"
        a, b = a.flatten(1).unsqueeze(0), b.flatten(1).unsqueeze(0)
        chosen = layer.lora_variant.get(ADAPTER)
        variant = type(chosen).__name__ if chosen is not None else "LoRA"
        broken = _why_broken(layer)
    rest = {n: x.detach() for n, x in parts.items()}
    return path, Low(a, b, float(layer.scaling[ADAPTER]), rest, variant, broken), own


def _why_broken(layer: Any) -> str:
    """Why PEFT's layer cannot be called: it takes its base layer for one that returns a tensor."""
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear) or type(base).forward is nn.Linear.forward:
        return ""
    given = torch.zeros(1, base.in_features)
    try:
        with torch.no_grad():
            returned = base(given)
    except Exception as error:
        return f"{type(base).__name__} cannot be called like a Linear: {error}"
    if isinstance(returned, torch.Tensor):
        return ""
    return f"{type(base).__name__} returns a {type(returned).__name__}, and PEFT's layer expects a tensor"


def _settings(layer: Any) -> str:
    found = {}
    for name in layer.other_param_names:
        table = getattr(layer, name, None)
        value = table.get(ADAPTER) if isinstance(table, dict) else None
        if isinstance(value, int | float | str | bool):
            found[name] = value
    return f"{type(layer).__name__} {sorted(found.items())}"


def compare_states(got: State, want: State) -> list[Landing]:
    """What became of all that ``want`` has, and what ``got`` has beyond it."""
    found = []
    for key, wanted in want.lows.items():
        found.append(_compare_low(key, got, wanted))
    for key, low in got.lows.items():
        if key not in want.lows and not _is_idle(low):
            found.append(
                Landing(key, "extra", low.rank, low.scale, detail="the adapter has nothing here")
            )
    for key, tensor in want.tensors.items():
        found.append(_compare_tensor(key, got.tensors.get(key), tensor))
    for key, tensor in got.tensors.items():
        if key not in want.tensors and bool(tensor.ne(0).any()):
            found.append(Landing(key, "extra", detail="the adapter has nothing here"))
    for key, text in want.settings.items():
        if key in got.settings and got.settings[key] != text:
            found.append(Landing(key, "differs", detail=f"{got.settings[key]} instead of {text}"))
    return found


def _compare_low(key: str, got: State, want: Low) -> Landing:
    dead = _is_zero(want)
    facts: dict[str, Any] = {"rank": want.rank, "scale": want.scale, "dead": dead}
    low = got.lows.get(key)
    if not (_finite(want.a) and _finite(want.b)):
        return Landing(key, "differs", **facts, detail="its factors hold NaN or infinite values")
    if low is None:
        return Landing(key, "dropped", **facts, detail="nothing is adapted here")
    if low.broken:
        return Landing(key, "fails", **facts, detail=low.broken)
    if dead and _is_zero(low):
        return Landing(key, "lands", **facts)
    if low.kind != want.kind:
        return Landing(key, "differs", **facts, detail=f"{low.kind} instead of {want.kind}")
    if low.a.shape[0::2] != want.a.shape[0::2] or low.b.shape[:2] != want.b.shape[:2]:
        return Landing(key, "differs", **facts, detail="the shapes are others")
    mine, both, theirs = _inner(low, low), _inner(low, want), _inner(want, want)
    off = (mine - 2 * both + theirs).clamp(min=0).sqrt()
    size = torch.maximum(theirs, theirs.max() * 1e-8).sqrt()
    if bool((off > _TOLERANCE * size).any()):
        if float(mine.max()) == 0:
            return Landing(
                key, "dropped", **facts, detail="PEFT makes a layer, and leaves it empty"
            )
        factor = float(both.sum() / theirs.sum())
        left = (mine - 2 * factor * both + factor**2 * theirs).clamp(min=0).sqrt()
        if bool((left <= _TOLERANCE * size).all()):
            return Landing(key, "scaled", **facts, factor=factor)
        relative = sqrt(float(off.pow(2).sum() / theirs.sum()))
        return Landing(key, "differs", **facts, detail=f"off by {relative:.2g} of its size")
    for name in want.rest.keys() | low.rest.keys():
        problem = _unlike(low.rest.get(name), want.rest.get(name))
        if problem:
            return Landing(key, "differs", **facts, detail=f"{name}: {problem}")
    return Landing(key, "lands", **facts)


def _inner(one: Low, other: Low) -> torch.Tensor:
    """The inner product of two deltas, for each of their matrices."""
    left = one.b.transpose(1, 2) @ other.b
    right = one.a @ other.a.transpose(1, 2)
    return (left * right).sum((1, 2)) * (one.scale * other.scale)


def _is_zero(low: Low) -> bool:
    if not (_finite(low.a) and _finite(low.b)):
        return False
    return low.kind == "LoRA" and not low.rest and float(_inner(low, low).max()) == 0


def _is_idle(low: Low) -> bool:
    """Whether a layer that PEFT made without need is as it was made: B and its bias are zero."""
    return not bool(low.b.ne(0).any()) and not any(
        bool(x.ne(0).any()) for name, x in low.rest.items() if name.endswith(".bias")
    )


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _compare_tensor(key: str, got: torch.Tensor | None, want: torch.Tensor) -> Landing:
    if got is None:
        return Landing(key, "dropped", detail="the model has no such tensor, or keeps its own")
    if not _finite(want):
        return Landing(key, "differs", detail="it holds NaN or infinite values")
    problem = _unlike(got, want)
    return Landing(key, "differs" if problem else "lands", detail=problem)


def _unlike(got: torch.Tensor | None, want: torch.Tensor | None) -> str:
    if got is None or want is None:
        return "only one of them has it"
    if got.shape != want.shape:
        return f"the shape is {tuple(got.shape)} instead of {tuple(want.shape)}"
    x, y = got.double(), want.double()
    off, size = (
        float((x - y).abs().max() if x.numel() else 0),
        float(y.abs().max() if y.numel() else 0),
    )
    return "" if off <= 1e-6 * size else f"off by {off:.2g}"
