"""The fields of ``config.json`` that a layout renames.

Source: what transformers 4.57.6 and 5.23.0 write for the same models. Version 5 reads the fields
of version 4 as well; version 4 knows nothing of ``rope_parameters`` and would take its defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regraft.rules.releases import layout_of

V4, V5 = layout_of("transformers", "4"), layout_of("transformers", "5")
"""The layouts of the releases that these facts are of."""

_RENAMED = {
    "qwen3_moe": (("num_experts", "num_local_experts"),),
    "qwen3_vl_moe_text": (("num_experts", "num_local_experts"),),
}
"""For a model type, the names of a field in version 4 and in version 5."""

_MODEL_TYPES = {"Glm4vMoe_text": "glm4v_moe_text"}
_LAYER_TYPES = {"mamba": "linear_attention", "attention": "full_attention"}
_MAMBA_TYPES = frozenset({"granitemoehybrid"})
_UNCHANGED = frozenset({"attn_config", "ffn_config"})
"""Parts of DBRX's config that keep their fields."""
_PARTIAL = "partial_rotary_factor"
_DETR = frozenset({"detr", "conditional_detr", "deformable_detr", "table-transformer"})
"""Version 4 writes ``dilation: null`` for these where the backbone is transformers' own; version 5 takes a bool."""


def convert_config(config: Mapping[str, Any], to: str) -> tuple[dict[str, Any], list[str]]:
    """A config in the fields of a layout, and what was changed, in words.

    >>> convert_config({"model_type": "mixtral", "rope_theta": 1e6}, "transformers-v5")[0]
    {'model_type': 'mixtral', 'rope_parameters': {'rope_type': 'default', 'rope_theta': 1000000.0}}
    """
    changes: list[str] = []
    result = _convert(config, to, "", changes)
    if to == V4:
        _agree_on_ties(result, changes)
    elif to == V5 and str(config.get("transformers_version")).startswith("4."):
        _tell_ties(result, changes)
    return result, changes


def _tell_ties(config: dict[str, Any], changes: list[str]) -> None:
    """Version 4 goes by the text model's field; where the whole model's says otherwise, version 5 would go by that."""
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    if isinstance(inner, bool) and config.get("tie_word_embeddings", inner) != inner:
        config["tie_word_embeddings"] = inner
        changes.append(f"tie_word_embeddings is now {inner}, as that of the text model")


def _agree_on_ties(config: dict[str, Any], changes: list[str]) -> None:
    """Version 5 goes by the whole model's field and writes another value inside; version 4 goes by the inner."""
    text, tied = config.get("text_config"), config.get("tie_word_embeddings")
    if (
        isinstance(text, dict)
        and isinstance(tied, bool)
        and text.get("tie_word_embeddings", tied) != tied
    ):
        config["text_config"] = {**text, "tie_word_embeddings": tied}
        changes.append(f"text_config.tie_word_embeddings is now {tied}, as that of the whole model")


def _convert(config: Mapping[str, Any], to: str, path: str, changes: list[str]) -> dict[str, Any]:
    result = {
        name: _convert(value, to, f"{path}{name}.", changes)
        if isinstance(value, Mapping) and "model_type" in value and name not in _UNCHANGED
        else value
        for name, value in config.items()
    }
    if to not in (V4, V5):
        return result
    for old, new in _RENAMED.get(str(config.get("model_type")), ()):
        was, becomes = (old, new) if to == V5 else (new, old)
        if was in result and becomes not in result:
            result = {becomes if name == was else name: v for name, v in result.items()}
            changes.append(f"{path}{was} is now {becomes}")
    if config.get("model_type") in _MAMBA_TYPES and isinstance(config.get("layer_types"), list):
        table = _LAYER_TYPES if to == V5 else {v: k for k, v in _LAYER_TYPES.items()}
        kinds = [table.get(k, k) if isinstance(k, str) else k for k in config["layer_types"]]
        if kinds != config["layer_types"]:
            result["layer_types"] = kinds
            changes.append(f"{path}layer_types has the names of {to}")
    if to == V5 and config.get("model_type") in _DETR and config.get("dilation", 0) is None:
        result["dilation"] = False
        changes.append(f"{path}dilation is now false instead of null")
    if to == V5 and config.get("model_type") in _MODEL_TYPES:
        result["model_type"] = _MODEL_TYPES[config["model_type"]]
        changes.append(f"{path}model_type is now {result['model_type']}")
    return _join_rope(result, path, changes) if to == V5 else _split_rope(result, path, changes)


def _join_rope(config: dict[str, Any], path: str, changes: list[str]) -> dict[str, Any]:
    if "rope_parameters" in config or not isinstance(config.get("rope_theta"), (int, float)):
        return config
    scaling = config.get("rope_scaling")
    if scaling is not None and not isinstance(scaling, Mapping):
        return config
    rope = dict(scaling or {})
    rope.setdefault("rope_type", rope.pop("type", None) or "default")
    rope["rope_theta"] = config["rope_theta"]
    if isinstance(config.get(_PARTIAL), (int, float)):
        rope[_PARTIAL] = config[_PARTIAL]
    gone = ("rope_scaling", _PARTIAL) if _PARTIAL in rope else ("rope_scaling",)
    result: dict[str, Any] = {}
    for name, value in config.items():
        if name == "rope_theta":
            result["rope_parameters"] = rope
        elif name not in gone:
            result[name] = value
    changes.append(f"{path}rope_theta and rope_scaling are now rope_parameters")
    return result


def _split_rope(config: dict[str, Any], path: str, changes: list[str]) -> dict[str, Any]:
    rope = config.get("rope_parameters")
    if (
        not isinstance(rope, Mapping)
        or "rope_theta" not in rope
        or rope.get("rope_type") == "axial"
    ):
        return config
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", _PARTIAL)}
    if scaling.get("rope_type", "default") == "default" and len(scaling) <= 1:
        scaling = {}
    result: dict[str, Any] = {}
    for name, value in config.items():
        if name != "rope_parameters":
            result[name] = value
            continue
        result["rope_theta"] = rope["rope_theta"]
        if scaling:
            result["rope_scaling"] = scaling
        if _PARTIAL in rope:
            result[_PARTIAL] = rope[_PARTIAL]
    changes.append(f"{path}rope_parameters are now rope_theta and rope_scaling")
    return result
