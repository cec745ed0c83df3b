"""Tiny models of any class of the installed transformers, on the CPU, with random weights.

A config is made small by what its fields are called, then by a few facts about families whose sizes depend on each other.
"""

import copy
import re
import warnings

import torch
import transformers

SIZE, INNER, HEADS, LAYERS, WORDS, EXPERTS = 32, 40, 4, 2, 99, 4
MOST = 4_000_000
"""Parameters of a model that still counts as tiny."""

_NAMES = (
    (r"(num_|n_)?(hidden_layers|layers?|blocks|decoder_layers|encoder_layers)$|n_layer$|depth$|"
     r"(\w+_)?(num_hidden_layers|num_layers|n_layers|encoder_layers|decoder_layers|num_blocks|attention_layers)$", LAYERS),
    (r"(\w+_)?(num_key_value_heads|n_head_kv|num_kv_heads|n_kv_heads|kv_heads)$", 2),
    (r"(\w+_)?(num_attention_heads|n_heads?|num_heads|attention_heads|n_head|num_self_attention_heads|"
     r"num_cross_attention_heads|encoder_attention_heads|decoder_attention_heads)$", HEADS),
    (r"(\w+_)?(intermediate_size|ffn_dim|n_inner|d_ff|ffn_hidden_size|dim_feedforward|feedforward_size|"
     r"mlp_dim|ffn_dim|d_inner|feed_forward_size|intermediate_dim|encoder_ffn_dim|decoder_ffn_dim)$", INNER),
    (r"(\w+_)?(head_dim|attention_head_size|kv_channels|d_kv|qk_nope_head_dim|v_head_dim)$", 8),
    (r"qk_rope_head_dim$", 8),
    (r"(\w+_)?(vocab_size|n_positions|codebook_size|vocab_size_per_layer_input)$", WORDS),
    (r"(q_lora_rank|kv_lora_rank|\w*lora_rank|\w*lora_dim)$", 16),
    (r"(\w+_)?(num_experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts)$", EXPERTS),
    (r"(\w+_)?(num_experts_per_tok|moe_topk|top_k_experts|moe_k|moe_top_k|num_experts_per_token)$", 2),
    (r"(n_group|topk_group|num_expert_group)$", 1),
    (r"(\w+_)?(image_size|img_size)$", 32),
    (r"(\w+_)?(max_position_embeddings|max_source_positions|max_target_positions|n_ctx|max_seq_len|"
     r"num_queries|num_query_tokens|max_text_len|num_latents)$", 64),
    (r"(\w+_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|dim|dim_model|embedding_size|width|"
     r"projection_dim|out_hidden_size|output_dim|decoder_hidden_size|encoder_hidden_dim|cross_attention_dim|"
     r"mask_feature_size|feature_size|fpn_feature_size|fpn_hidden_size|conv_dim|d_embed)$", SIZE),
)
_NAMES = tuple((re.compile(pattern), value) for pattern, value in _NAMES)
_TOKEN = re.compile(r"\w*(token|_)(id|index|ids)$")


def shrink(config, seen=None):
    """Make a config small in place, with all configs in it."""
    seen = set() if seen is None else seen
    if id(config) in seen:
        return config
    seen.add(id(config))
    layers = None
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            shrink(value, seen)
        elif isinstance(value, bool) or name.startswith("_"):
            continue
        elif isinstance(value, int):
            small = _small(name, value)
            if small is not None:
                _set(config, name, small)
                layers = small if small == LAYERS and "layer" in name else layers
    return config


def _small(name, value):
    if _TOKEN.fullmatch(name):
        return value if value < WORDS else (value % 50) + 40
    for pattern, small in _NAMES:
        if pattern.fullmatch(name):
            return min(value, small) if value > 0 else value
    return None


def _set(config, name, value):
    try:
        setattr(config, name, value)
    except Exception:
        config.__dict__[name] = value
