"""What the tensors of one module add to its base weight, by the formulas of the tools that trained them.

The certificate and nothing else reads files by these: how the converter reads scales, multiplies factors and follows
a layout has no part in them. Every formula is in the shape that the base weight is stored in, with the kernel of a
convolution as dims of its own.

Sources: lycoris-lora 4.1.3 (``lycoris/functional``, and the forward of ``lycoris/modules``), PEFT 0.21.2
(``tuners/lora/dora.py``, ``utils/other.py:get_pattern_key``), diffusers 0.42.1 (``loaders/lora_base.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any

import numpy as np

from regraft.adapters.families.base import Wide
from regraft.adapters.form import Array
from regraft.dialects.image.header import READ, USUAL
from regraft.storage.expressions import expression
from regraft.storage.json_files import told_in_json

Tensors = Mapping[str, Array]
"""A module's tensors by role (`regraft.dialects.image.leaves`)."""

Weight = Callable[[], Wide]
"""Gives the base weight as it is stored."""

_LINEAR = {"down", "up"}


def scale_of(t: Tensors, said: tuple[float | None, bool]) -> float:
    """What multiplies a module's product.

    ``said`` is alpha where only the header has it, and whether that is divided by the root of the rank.

    >>> scale_of({"down": np.zeros((4, 2)), "alpha": np.float32(2)}, (None, False))
    0.5
    """
    rank = _rank(t)
    own = t.get("alpha")
    alpha, root = said if own is None else (float(np.asarray(own).reshape(-1)[0]), False)
    if alpha is None or not rank:
        return 1.0
    return alpha / (sqrt(rank) if root else rank)


def _rank(t: Tensors) -> int:
    if "down" in t:
        return int(t["down"].shape[0])
    if "hada_w1_b" in t:
        return int(t["hada_w1_b"].shape[0])
    for role in ("lokr_w2_b", "lokr_w1_b"):
        if role in t:
            return int(t[role].shape[0])
    return int(_glora(t)[1].shape[0]) if "a1" in t else 0


def said_alpha(
    metadata: Mapping[str, str], component: str, module: str, spellings: set[str], *, keyed: bool
) -> tuple[float | None, bool]:
    """The alpha of a LoRA without a key of its own, as the header says it, and whether it is an rsLoRA's.

    ``component`` is diffusers' name of the model's part, ``keyed`` whether any module of the file has a key.
    """
    text = metadata.get("lora_adapter_metadata")
    if text is not None:
        told = told_in_json(text)
        settings: dict[str, Any] = told if isinstance(told, dict) else {}
        name = f"{component}.alpha_pattern"
        for pattern, alpha in (settings.get(name) or {}).items():
            if expression(rf"(.*\.)?({pattern})$", "alpha_pattern").match(module):
                return float(alpha), bool(settings.get(f"{component}.use_rslora"))
        if not any(f"{component}.{name}" in settings for name in READ):
            return None, False
        usual = settings.get(f"{component}.lora_alpha", USUAL["lora_alpha"])
        return float(usual), bool(settings.get(f"{component}.use_rslora"))
    name = "ss_network_alpha" if spellings == {"lora_down"} else "alpha"
    try:
        plain = not keyed and spellings <= {"lora_down", "lora_A"} and name in metadata
        return (float(metadata[name]) if plain else None), False
    except ValueError:
        return None, False


def multiplies(t: Tensors) -> bool:
    """Whether what a module adds depends on the base weight."""
    return bool({"a1", "oft_blocks", "oft_R", "ia3", "magnitude", "dora_scale"} & set(t))


def bias_of(t: Tensors, scale: float) -> Wide | None:
    """What a module adds to its bias."""
    if "diff_b" in t:
        return t["diff_b"].astype(np.float64).reshape(-1)
    return t["up_bias"].astype(np.float64).reshape(-1) * scale if "up_bias" in t else None


def delta_of_tensors(
    t: Tensors, scale: float, shape: tuple[int, ...], weight: Weight | None
) -> Wide:
    """What a module adds to its base weight, in the weight's shape.

    Raises ``ValueError`` where the tensors do not fit together, or not the shape.
    """
    base = weight() if weight is not None and multiplies(t) else None
    if base is not None:
        shape = base.shape
    added = _added(t, scale, shape, base)
    magnitude = t.get("magnitude", t.get("dora_scale"))
    if magnitude is None or "initial_norm" in t:
        return added
    if base is None:
        raise ValueError("the base weight is needed")
    total = base + added
    m = magnitude.astype(np.float64)
    on_in = "magnitude" not in t and m.ndim > 1 and m.shape[0] == 1 and m.size == shape[1]
    kept = 1 if on_in else 0
    others = tuple(dim for dim in range(total.ndim) if dim != kept)
    lengths = np.sqrt((total * total).sum(axis=others, keepdims=True))
    along = [1] * total.ndim
    along[kept] = -1
    return np.asarray(m.reshape(along) / lengths * total - base)


def _added(t: Tensors, scale: float, shape: tuple[int, ...], base: Wide | None) -> Wide:
    """The same without a magnitude."""
    f = {role: tensor.astype(np.float64) for role, tensor in t.items()}
    if "down" in f:
        return _shaped(_lora(f) * scale, shape)
    if "hada_w1_a" in f:
        return _shaped(_hadamard(f, "1") * _hadamard(f, "2") * scale, shape)
    if any(role.startswith("lokr_") for role in f):
        return _shaped(_kronecker(f) * scale, shape)
    if "diff" in f:
        return _shaped(f["diff"], shape)
    if not {"a1", "ia3", "oft_blocks", "oft_R"} & set(f):
        return np.zeros(shape)
    if base is None:
        raise ValueError("the base weight is needed")
    if "a1" in f:
        into_a, a, into_b, b = _glora(f)
        flat = base.reshape(len(base), -1)
        return np.asarray((flat @ into_a @ a + into_b @ b).reshape(base.shape) * scale)
    if "ia3" in f:
        along = [1] * base.ndim
        along[int(bool(f["on_input"].reshape(-1)[0]))] = -1
        return np.asarray(base * f["ia3"].reshape(along))
    if "oft_R" in f:
        return _turned_in(f, base) - base
    turned = _turned(f, base)
    if "rescale" in f:
        turned = turned * f["rescale"].reshape([-1] + [1] * (base.ndim - 1))
    return np.asarray(turned - base)


def _shaped(made: Wide, shape: tuple[int, ...]) -> Wide:
    """In the weight's shape; a file may have fewer rows than the weight, and adds nothing to the rest."""
    rest = shape[1:] or (1,)
    if made.size == int(np.prod(shape)):
        return made.reshape(shape)
    flat = made.reshape(-1, int(np.prod(rest)))
    if len(flat) > shape[0]:
        raise ValueError(f"{made.shape} is no delta of a weight {shape}")
    whole = np.zeros((shape[0], flat.shape[1]))
    whole[: len(flat)] = flat
    return whole.reshape(shape)


def _lora(f: Mapping[str, Wide]) -> Wide:
    up, down = f["up"].reshape(len(f["up"]), -1), f["down"].reshape(len(f["down"]), -1)
    if "mid" in f:
        return np.asarray(np.einsum("ob,bs...,si->oi...", up, f["mid"], down))
    return np.asarray(up @ down)


def _hadamard(f: Mapping[str, Wide], number: str) -> Wide:
    """One of the two products that LoHa multiplies entry by entry."""
    a, b = f[f"hada_w{number}_a"], f[f"hada_w{number}_b"]
    core = f.get(f"hada_t{number}")
    if core is None:
        return np.asarray(a @ b)
    return np.asarray(np.einsum("rs...,ro,si->oi...", core, a, b, optimize=True))


def _kronecker(f: Mapping[str, Wide]) -> Wide:
    """LoKr: every entry of the first factor times all of the second, whose kernel stays."""
    one = f.get("lokr_w1")
    if one is None:
        one = f["lokr_w1_a"] @ f["lokr_w1_b"]
    two = f.get("lokr_w2")
    if two is None and "lokr_t2" in f:
        two = np.einsum(
            "rs...,ro,si->oi...", f["lokr_t2"], f["lokr_w2_a"], f["lokr_w2_b"], optimize=True
        )
    elif two is None:
        b = f["lokr_w2_b"]
        two = np.tensordot(f["lokr_w2_a"], b, axes=1)
    one = one.reshape(len(one), -1)
    flat = two.reshape(*two.shape[:2], -1)
    made = np.einsum("ab,cdk->acbdk", one, flat)
    out, into = one.shape[0] * two.shape[0], one.shape[1] * two.shape[1]
    return np.asarray(made.reshape(out, into, *two.shape[2:]))


def _glora(t: Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
    """The factors (in, r) and (r, in) of what multiplies the weight, (out, r) and (r, in) of what is added.

    Older files have them the other way round; where both fit, the lower rank is meant.
    """
    a1, a2, b1, b2 = t["a1"], t["a2"], t["b1"], t["b2"]
    newer = a1.shape[1] == a2.shape[0] and b1.shape[1] == b2.shape[0] and len(a1) == b2.shape[1]
    if newer and (a1.shape[1] <= a1.shape[0] or a1.shape[0] != a2.shape[1]):
        return a1, a2, b1, b2
    return a2, a1, b2, b1


def _turned(f: Mapping[str, Wide], base: Wide) -> Wide:
    """diag-OFT and BOFT: the weight's rows, turned by Cayley's rotations of blocks of them."""
    blocks = f["oft_blocks"]
    skew = blocks - blocks.swapaxes(-1, -2)
    limit = float(f["alpha"].reshape(-1)[0]) * len(base) if "alpha" in f else 0.0
    length = float(np.linalg.norm(skew.reshape(-1)))
    if limit > 0 and length > limit:
        skew = skew * (limit / length)
    one = np.eye(skew.shape[-1])
    turns = np.linalg.solve((one - skew).swapaxes(-1, -2), (one + skew).swapaxes(-1, -2))
    turns = turns.swapaxes(-1, -2)
    flat = base.reshape(len(base), -1)
    size = turns.shape[-1]
    if turns.ndim == 3:
        rows = flat.reshape(-1, size, flat.shape[1])
        # LyCORIS contracts the first index of a block with the weight's rows, so each block is transposed.
        return np.concatenate(
            [turn.T @ part for turn, part in zip(turns, rows, strict=True)]
        ).reshape(base.shape)
    for stage, each in enumerate(turns):
        flat = _stage(flat, each, 2**stage * (size // 2))
    return flat.reshape(base.shape)


def _turned_in(f: Mapping[str, Wide], base: Wide) -> Wide:
    """OneTrainer's OFT: I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4 for each block of columns, or one for all of them.

    A convolution's weight is multiplied by it, a linear's by its transpose, for its input is.
    """
    flat = base.reshape(len(base), -1)
    upper = f["oft_R"] / (np.sqrt(f["oft_R"].shape[1]) if "scaled_oft" in f else 1.0)
    size = int(np.sqrt(2 * upper.shape[1])) + 1
    made = np.empty_like(flat)
    for number in range(flat.shape[1] // size):
        q = np.zeros((size, size))
        q[np.triu_indices(size, 1)] = upper[number if len(upper) > 1 else 0]
        q = q - q.T if base.ndim > 2 else q.T - q
        one = np.eye(size)
        columns = slice(number * size, (number + 1) * size)
        made[:, columns] = flat[:, columns] @ (
            one + q @ (2 * one + q @ (2 * one + q @ (2 * one + q)))
        )
    if "initial_norm" in f:
        made *= f["dora_scale"].reshape(-1, 1) / f["initial_norm"].reshape(-1, 1)
    return made.reshape(base.shape)


def _stage(flat: Wide, turns: Wide, step: int) -> Wide:
    """One stage of the butterfly: a block is made of rows ``step`` apart from each other."""
    made = np.empty_like(flat)
    order = np.arange(len(flat)).reshape(-1, 2, step).transpose(0, 2, 1).reshape(len(turns), -1)
    for rows, turn in zip(order, turns, strict=True):
        made[rows] = turn @ flat[rows]
    return made
