"""Tiny models of any class of the installed transformers, on the CPU, with random weights.

A config is made small by what its fields are called, then by facts about families whose sizes depend on each other.
"""

import re

import transformers

SIZE, INNER, HEADS, LAYERS, WORDS, EXPERTS = 32, 40, 4, 2, 99, 4
MOST = 30_000_000
"""Parameters of a model that still counts as tiny."""

_NAMES = (
    (
        r"(num_|n_)?(hidden_layers|layers?|blocks|decoder_layers|encoder_layers)$|n_layer$|depth$|"
        r"(\w+_)?(num_hidden_layers|num_layers|n_layers|encoder_layers|decoder_layers|num_blocks|attention_layers)$",
        LAYERS,
    ),
    (r"(\w+_)?(num_key_value_heads|n_head_kv|num_kv_heads|n_kv_heads|kv_heads)$", 2),
    (
        r"(\w+_)?(num_attention_heads|n_heads?|num_heads|attention_heads|n_head|num_self_attention_heads|"
        r"num_cross_attention_heads|encoder_attention_heads|decoder_attention_heads)$",
        HEADS,
    ),
    (
        r"(\w+_)?(intermediate_size|ffn_dim|n_inner|d_ff|ffn_hidden_size|dim_feedforward|feedforward_size|"
        r"mlp_dim|ffn_dim|d_inner|feed_forward_size|intermediate_dim|encoder_ffn_dim|decoder_ffn_dim)$",
        INNER,
    ),
    (r"(\w+_)?(head_dim|attention_head_size|kv_channels|d_kv|qk_nope_head_dim|v_head_dim)$", 8),
    (r"qk_rope_head_dim$", 8),
    (r"(\w+_)?(vocab_size|n_positions|codebook_size|vocab_size_per_layer_input)$", WORDS),
    (r"(q_lora_rank|kv_lora_rank|\w*lora_rank|\w*lora_dim)$", 16),
    (
        r"(\w+_)?(num_experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts)$",
        EXPERTS,
    ),
    (
        r"(\w+_)?(num_experts_per_tok|moe_topk|top_k_experts|moe_k|moe_top_k|num_experts_per_token)$",
        2,
    ),
    (r"(n_group|topk_group|num_expert_group)$", 1),
    (r"(\w+_)?(image_size|img_size)$", 32),
    (
        r"(\w+_)?(max_position_embeddings|max_source_positions|max_target_positions|n_ctx|max_seq_len|"
        r"num_queries|num_query_tokens|max_text_len|num_latents)$",
        64,
    ),
    (
        r"(\w+_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|dim|dim_model|embedding_size|width|"
        r"projection_dim|out_hidden_size|output_dim|decoder_hidden_size|encoder_hidden_dim|cross_attention_dim|"
        r"mask_feature_size|feature_size|fpn_feature_size|fpn_hidden_size|conv_dim|d_embed)$",
        SIZE,
    ),
)
_NAMES = tuple((re.compile(pattern), value) for pattern, value in _NAMES)
_TOKEN = re.compile(r"\w*(token|_)(id|index|ids)$")


_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_FACTS = {
    "beit": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "attn_resolutions": [4]},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 5, "<image>": 6, "<|visual token 000000|>": 7}},
    "ernie4_5_vl_moe_text": {"rope_parameters": _ROPE},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gradium_phonon_tts": {"num_key_value_heads": HEADS},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mimi": {"codebook_size": 64, "upsample_groups": 32},
    "mimi_decoder": {"codebook_size": 64, "upsample_groups": 32},
    "nemo_speechlm": {"num_key_value_heads": HEADS},
    "nemotron3_5_transcribe_asr_audio": {"num_key_value_heads": HEADS},
    "nemotron3_5_transcribe_word_timestamp": {"num_key_value_heads": HEADS},
    "nemotron3_diarization_audio": {"num_key_value_heads": HEADS},
    "parakeet_encoder": {"num_key_value_heads": HEADS},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 16},
    "qwen3_omni_moe_talker": {"spatial_merge_size": 2},
    "maskformer-swin": {"embed_dim": 24},
    "swin": {"embed_dim": 24},
    "sapiens2_head": {
        "upsample_out_channels": [16, 16],
        "upsample_kernel_sizes": [4, 4],
        "conv_out_channels": [16],
        "conv_kernel_sizes": [1],
        "scale_conv_out_channels": [16],
        "scale_conv_kernel_sizes": [1],
        "scale_final_input_size": 16,
        "scale_final_hidden_sizes": [16, 16],
    },
}
_RESNETS = ("conditional_detr", "deformable_detr", "detr")
"""Fields that a tiny model needs, by model type."""


def shrink(config, seen=None):
    """Make a config small in place, with all configs in it."""
    seen = set() if seen is None else seen
    if id(config) in seen:
        return config
    seen.add(id(config))
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            shrink(value, seen)
        elif isinstance(value, bool) or name.startswith("_"):
            continue
        elif isinstance(value, int):
            small = _small(name, value)
            if small is not None:
                _set(config, name, small)
    if config.model_type in _RESNETS:
        small = {
            "embedding_size": 8,
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1] * 4,
            "layer_type": "basic",
        }
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            _set(config, name, 8)
        _set(config, "use_timm_backbone", False)
        _set(config, "backbone", None)
        _set(config, "backbone_config", transformers.ResNetConfig(**small, out_features=["stage4"]))
    for name, value in _FACTS.get(config.model_type, {}).items():
        _set(config, name, value)
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
