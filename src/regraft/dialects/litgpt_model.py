"""LitGPT's ``model_config.yaml`` for a base, from transformers' ``config.json``.

``litgpt merge_lora`` wants the file beside the adapter. It is written for the families whose every field is known here;
for others it is the one of LitGPT's own checkpoint.

Source: litgpt 0.5.13, ``config.py``, and the entries of these families there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "mixtral": {"mlp_class_name": "LLaMAMoE"},
    "qwen2": {"attn_bias": True},
    "qwen3": {"norm_qk": True},
    "qwen3_moe": {"norm_qk": True, "mlp_class_name": "LLaMAMoE"},
}
_SAME = {
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "padded_vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
_SCALED = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}


def model_config(model_type: str | None, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of the file; ``None`` where the base's config does not say them all.

    >>> model_config("phi", {}) is None
    True
    """
    family = _FAMILIES.get(model_type or "")
    if family is None or any(config.get(name) is None for name in _SAME.values()):
        return None
    positions = _positions(config)
    if positions is None or config.get("attention_bias") or config.get("mlp_bias"):
        return None
    heads = config["num_attention_heads"]
    made = {name: config[theirs] for name, theirs in _SAME.items()}
    made |= {
        "name": str(model_type),
        "hf_config": {},
        "vocab_size": config["vocab_size"],
        "n_query_groups": config.get("num_key_value_heads") or heads,
        "head_size": config.get("head_dim") or config["hidden_size"] // heads,
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "mlp_class_name": "LLaMAMLP",
        **family,
        **positions,
    }
    if made["mlp_class_name"] == "LLaMAMoE":
        experts = config.get("num_local_experts") or config.get("num_experts")
        each = config.get("num_experts_per_tok")
        if experts is None or each is None:
            return None
        made |= {"n_expert": experts, "n_expert_per_token": each}
        if config.get("moe_intermediate_size"):
            made["moe_intermediate_size"] = config["moe_intermediate_size"]
            made["norm_topk_prob"] = bool(config.get("norm_topk_prob"))
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        made["sliding_window_size"] = config["sliding_window"]
    return made


def _positions(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What it says of rotary positions; ``None`` for ways to scale them that LitGPT has under no field."""
    fields = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(fields, Mapping):
        return None
    base = fields.get("rope_theta") or config.get("rope_theta") or 10000
    made: dict[str, Any] = {"rope_base": int(base)}
    way = fields.get("rope_type") or fields.get("type") or "default"
    if way == "linear":
        made["rope_condense_ratio"] = fields.get("factor")
    elif way == "llama3":
        made["rope_adjustments"] = {
            name: fields.get(theirs) or config.get(theirs) for name, theirs in _SCALED.items()
        }
    elif way != "default":
        return None
    return made
