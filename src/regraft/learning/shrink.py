"""Making a model's config small: sizes that tell axes apart, by what fields are called.

No two sizes of a probe are alike where the model does not ask for it, and at another size all are others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import lcm
from typing import Any, TypeGuard

SIZES = 3
"""How many different sizes there are."""

_HEADS = (6, 10, 12)
_TABLE: tuple[tuple[str, tuple[int, ...]], ...] = (
    (r"\w*per_tok\w*|\w*top_?k\w*|moe_k", (2, 2, 2)),
    (r"n_group|topk_group|num_expert_group", (1, 1, 1)),
    (r"num_conv_pos_embeddings", (16, 26, 20)),
    (r"\w*(num_key_value_heads|n_head_kv|num_kv_heads|n_kv_heads|kv_heads)", (3, 2, 4)),
    (r"\w*(attention_heads|num_heads|n_heads?|n_head)", _HEADS),
    (r"\w*(qk_nope_head_dim)", (12, 20, 14)),
    (r"\w*(qk_rope_head_dim)", (6, 10, 4)),
    (r"\w*(v_head_dim)", (11, 13, 17)),
    (r"\w*(head_dim|head_size|kv_channels|d_kv)", (14, 22, 18)),
    (r"\w*(moe|expert|shared)\w*intermediate_size", (26, 34, 38)),
    (
        r"\w*(intermediate_size|ffn_dim|n_inner|d_ff|ffn_hidden_size|feedforward|mlp_dim|d_inner)\w*",
        (58, 74, 82),
    ),
    (r"\w*vocab_size\w*", (101, 131, 113)),
    (r"\w*lora_rank\w*", (19, 23, 29)),
    (r"\w*(num_experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts)", (5, 7, 9)),
    (
        r"\w*(num_hidden_layers|num_layers|n_layers?|n_layer|depth|num_blocks|encoder_layers|decoder_layers)",
        (2, 3, 4),
    ),
    (r"\w*(image_size|img_size)", (32, 64, 96)),
    (
        r"\w*(max_position_embeddings|max_source_positions|n_positions|n_ctx|max_seq_len)",
        (61, 67, 71),
    ),
    (r"\w*(hidden_size|d_model|n_embd|embed_dim|hidden_dim|projection_dim)", (48, 120, 72)),
)
_RULES = tuple((re.compile(pattern), sizes) for pattern, sizes in _TABLE)
_EXPERTS, _MOST_EXPERTS = next(
    (re.compile(pattern), max(sizes)) for pattern, sizes in _TABLE if "num_experts" in pattern
)
_OWN = tuple(
    (re.compile(pattern), sizes)
    for pattern, sizes in (
        (r"(d|dim)_?head|head_?width", (14, 22, 18)),
        (r"(n|num)?_?(kv|kv_?heads?|query_groups|num_query_groups)", (3, 2, 4)),
        (r"\w*n?_?heads?", _HEADS),
        (r"dim|width|(model|emb|embedding)_(dim|size|width)|n_embed|n_model|embd?", (48, 120, 72)),
        (
            r"(n_)?(ffn?|mlp|feed_?forward|hidden|inner)(_(hidden|inner|size|dim|width))?",
            (58, 74, 82),
        ),
        (r"(n_)?vocab\w*|n_tokens", (101, 131, 113)),
        (r"\w*experts", (5, 7, 9)),
        (r"\w*(layers|blocks|depth)", (2, 3, 4)),
        (r"(context|seq|sequence|max)_?(len|length|seq)\w*|block_size", (61, 67, 71)),
    )
)
"""What fields are called in configs of somebody's own, where the table has no such name."""
_OWN_HEADS = ("num_heads", "n_heads", "heads", "nhead")
_KEPT = re.compile(r"\w*(token|_)(id|index|ids)|vocab_size_per_layer_input")


def shrink(
    config: Mapping[str, Any],
    size: int,
    fixed: Mapping[str, Any] | None = None,
    *,
    own: bool = False,
) -> dict[str, Any]:
    """The config of a small model; ``size`` counts from 0, ``fixed`` fields stay what they are told to be.

    With ``own`` it is of a model type of somebody's own: more names of fields are read, and what is smaller than the
    small sizes grows, so that every size is another one.

    >>> shrink({"hidden_size": 4096, "num_attention_heads": 32, "rms_norm_eps": 1e-6}, 0)
    {'hidden_size': 48, 'num_attention_heads': 6, 'rms_norm_eps': 1e-06}
    """
    small: dict[str, Any] = {}
    others = _others(config)
    grouped = _grouped(config, size)
    layers = _layers(config, size)
    for name, value in config.items():
        if _is_config(value):
            small[name] = shrink(value, size, own=own)
        elif isinstance(value, list) and name.endswith("layer_types") and layers is not None:
            small[name] = _some(value, layers)
        elif isinstance(value, int) and not isinstance(value, bool):
            small[name] = (
                _size(name, value, size, config, own=own)
                * others.get(name, 1)
                * grouped.get(name, 1)
            )
        elif _CHANNELS.fullmatch(name) and _is_sizes(value):
            small[name] = _channels(value, size)
        else:
            small[name] = value
    small.update(fixed or {})
    return small


def _is_config(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether a field holds fields; tables by number, such as ``id2label``, are values."""
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def several_experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with experts where it has one: a stack of one does not tell where an expert's number stands.

    >>> several_experts({"num_experts": 1, "hidden_size": 8})
    {'num_experts': 9, 'hidden_size': 8}
    """
    return {
        name: several_experts(value)
        if _is_config(value)
        else _MOST_EXPERTS
        if value == 1 and not isinstance(value, bool) and _EXPERTS.fullmatch(name)
        else value
        for name, value in config.items()
    }


_FREE = re.compile(
    r"\w*(intermediate_size|ffn_dim|n_inner|d_ff|ffn_hidden_size|feedforward|mlp_dim|lora_rank|vocab_size)\w*"
)
"""Sizes that nothing else has to divide."""


def _others(config: Mapping[str, Any]) -> dict[str, int]:
    """By what the small sizes of fields are multiplied that would be alike although the model's differ."""
    seen: dict[object, list[int]] = {}
    times: dict[str, int] = {}
    for name, value in config.items():
        if not _FREE.fullmatch(name) or not isinstance(value, int) or isinstance(value, bool):
            continue
        rule = next((number for number, (p, _) in enumerate(_RULES) if p.fullmatch(name)), None)
        known = seen.setdefault(rule, [])
        if value > 1 and value not in known:
            known.append(value)
        times[name] = known.index(value) + 1 if value in known else 1
    return times


def _grouped(config: Mapping[str, Any], size: int) -> dict[str, int]:
    """By what small sizes are multiplied that groups divide: those of layers in between, which nothing else divides."""
    counts = [
        (value, _size(name, value, size, config))
        for name, value in config.items()
        if _GROUPS.fullmatch(name) and isinstance(value, int) and value > 1
    ]
    return {
        name: lcm(*(few for many, few in counts if value % many == 0))
        for name, value in config.items()
        if _BETWEEN.fullmatch(name) and isinstance(value, int) and value > 1
    }


_GROUPS = re.compile(r"(?!num_(code|query|key))\w*groups")
"""Fields that say into how many parts channels are divided."""
_PARTS = (6, 5, 4)
"""They divide small hidden sizes, and heads times their size."""
_HIDDEN = re.compile(r"hidden_size|d_model|n_embd")
_BETWEEN = re.compile(r"intermediate_size|ffn_dim|n_inner|d_ff|ffn_hidden_size|mlp_dim")
_CHANNELS = re.compile(r"\w*(conv|tdnn)_dim")
"""Fields that say the channels of convolutions, one after the other, which nothing else has to fit."""
_WIDTHS = (31, 43, 37)
"""Primes, so that no product of other fields is one of them."""


def _is_sizes(value: object) -> TypeGuard[Sequence[int]]:
    """Whether a field is the sizes of several layers; a short list of small numbers is something else."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 1
        and all(isinstance(each, int) and each > max(_WIDTHS) for each in value)
    )


def _channels(values: Sequence[int], size: int) -> list[int]:
    """Small sizes of layers: those that are alike stay alike, and what is larger stays so.

    >>> _channels([512, 512, 1500], 0)
    [31, 31, 62]
    """
    order = sorted(set(values))
    return [_WIDTHS[size] * (order.index(value) + 1) for value in values]


def _layers(config: Mapping[str, Any], size: int) -> int | None:
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        value = config.get(name)
        if isinstance(value, int):
            return _size(name, value, size, config)
    return None


def layer_fields(config: Mapping[str, Any]) -> list[str]:
    """The fields that count layers.

    >>> layer_fields({"num_hidden_layers": 2, "hidden_size": 8})
    ['num_hidden_layers']
    """
    return [
        name
        for name, value in config.items()
        if _LAYERS.fullmatch(name) and isinstance(value, int) and not isinstance(value, bool)
    ]


_LAYERS = re.compile(
    r"num_hidden_layers|num_layers|n_layers?|(n|num)_blocks|depth|(encoder|decoder)_layers"
)


def _some(values: list[Any], count: int) -> list[Any]:
    """The first and, where they differ, the last kinds of layers."""
    kinds = list(dict.fromkeys(map(str, values)))
    firsts = [next(v for v in values if str(v) == kind) for kind in kinds]
    chosen = (firsts + values)[:count] if len(firsts) <= count else values[:count]
    return chosen + [values[-1]] * (count - len(chosen))


def _groups(value: int, size: int, config: Mapping[str, Any]) -> int:
    """Into how many parts the small channels are divided; one each stays one each."""
    for name, hidden in config.items():
        if _HIDDEN.fullmatch(name) and isinstance(hidden, int):
            small = [_size(name, hidden, each, config) for each in range(SIZES)]
            if hidden == value:
                return small[size]
            if any(each % value for each in small):
                return _PARTS[size]
    return value


def _size(name: str, value: int, size: int, config: Mapping[str, Any], *, own: bool = False) -> int:
    if value <= 1 or _KEPT.fullmatch(name):
        return value if not _KEPT.fullmatch(name) or value < 100 else value % 50 + 40
    if _GROUPS.fullmatch(name):
        return _groups(value, size, config)
    for pattern, sizes in (*_RULES, *_OWN) if own else _RULES:
        if pattern.fullmatch(name):
            if "key_value" in name or "kv" in name:
                named = ("num_attention_heads", "n_head", *(_OWN_HEADS if own else ()))
                heads = next((v for k, v in config.items() if k in named), None)
                # As many as there are heads: so it is in the small model.
                if heads == value and (own or name.endswith("heads")):
                    sizes = _HEADS
            return value if value < sizes[0] and not own else sizes[size]
    return value
