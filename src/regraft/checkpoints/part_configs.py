"""Configs of diffusers' models from the shapes of their tensors.

What shapes tell is one thing (`seen_config`); heads, activations and scales are another. They are known of published
models, which are recognised by their widths (`known_config`).

Sources: the classes of diffusers 0.42.1 and transformers 5.23.0, whose arguments these are; their configs on the hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from regraft.checkpoints.pipelines import Part

Shapes = Mapping[str, tuple[int, ...]]
"""The tensors of one part in diffusers' layout."""


def seen_config(cls: str, shapes: Shapes) -> dict[str, Any]:
    """The fields of a class's config that shapes tell; nothing for a class that is not known.

    Raises nothing: a field that cannot be read is left out.
    """
    look = _LOOKS.get(cls)
    try:
        return look(shapes) if look is not None else {}
    except (KeyError, IndexError):
        return {}


def known_config(family: str, part: Part, shapes: Shapes) -> dict[str, Any] | None:
    """The whole config of a part whose shapes are those of a published model; ``None`` for any other."""
    seen = seen_config(part.cls, shapes)
    if not seen:
        return None
    for cls, families, widths, facts in _PUBLISHED:
        if cls != part.cls or (families and family not in families):
            continue
        if all(seen.get(name) == value for name, value in widths.items()):
            named = (
                {"_class_name": cls} if part.library == "diffusers" else {"architectures": [cls]}
            )
            return {**named, **seen, **facts}
    return None


def _count(shapes: Shapes, before: str) -> int:
    """How many numbers stand after a beginning of names: ``blocks.``: 0 to n - 1."""
    numbers = {name[len(before) :].partition(".")[0] for name in shapes if name.startswith(before)}
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


def _unet(shapes: Shapes) -> dict[str, Any]:
    levels = _count(shapes, "down_blocks.")
    down = [_count(shapes, f"down_blocks.{b}.attentions.") for b in range(levels)]
    up = [_count(shapes, f"up_blocks.{b}.attentions.") for b in range(levels)]
    middle = _count(shapes, "mid_block.attentions.0.transformer_blocks.")
    depth = [
        _count(shapes, f"down_blocks.{b}.attentions.0.transformer_blocks.") for b in range(levels)
    ]
    each = [n or 1 for n in depth[:-1]] + [depth[-1] or middle]
    # One number is meant for all levels, those without attention among them.
    depth = [middle] if {*depth, middle} - {0} == {middle} else each
    crossing = next(n for n in shapes if n.endswith("attn2.to_k.weight"))
    config: dict[str, Any] = {
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": [
            shapes[f"down_blocks.{b}.resnets.0.conv1.weight"][0] for b in range(levels)
        ],
        "layers_per_block": _count(shapes, "down_blocks.0.resnets."),
        "down_block_types": ["CrossAttnDownBlock2D" if n else "DownBlock2D" for n in down],
        "up_block_types": ["CrossAttnUpBlock2D" if n else "UpBlock2D" for n in up],
        "transformer_layers_per_block": depth if len(depth) > 1 else depth[0],
        "cross_attention_dim": shapes[crossing][1],
        "use_linear_projection": any(
            n.endswith("proj_in.weight") and len(s) == 2 for n, s in shapes.items()
        ),
    }
    if "add_embedding.linear_1.weight" in shapes:
        config["addition_embed_type"] = "text_time"
        config["projection_class_embeddings_input_dim"] = shapes["add_embedding.linear_1.weight"][1]
    if "class_embedding.weight" in shapes:
        config["num_class_embeds"] = shapes["class_embedding.weight"][0]
    return config


def _vae(shapes: Shapes) -> dict[str, Any]:
    levels = _count(shapes, "encoder.down_blocks.")
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": [
            shapes[f"encoder.down_blocks.{b}.resnets.0.conv1.weight"][0] for b in range(levels)
        ],
        "layers_per_block": _count(shapes, "encoder.down_blocks.0.resnets."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def _clip(shapes: Shapes) -> dict[str, Any]:
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    config: dict[str, Any] = {
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, "text_model.encoder.layers."),
    }
    if "text_projection.weight" in shapes:
        config["projection_dim"] = shapes["text_projection.weight"][0]
    return config


def _t5(shapes: Shapes) -> dict[str, Any]:
    attention = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = shapes[attention + "relative_attention_bias.weight"]
    vocabulary, width = shapes["shared.weight"]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes[attention + "q.weight"][0] // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wo.weight"][1],
        "num_layers": _count(shapes, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def _flux(shapes: Shapes) -> dict[str, Any]:
    width, channels = shapes["x_embedder.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    config = {
        "in_channels": channels,
        "num_layers": _count(shapes, "transformer_blocks."),
        "num_single_layers": _count(shapes, "single_transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
    }
    made = shapes["proj_out.weight"][0]
    return config if made == channels else {**config, "out_channels": made}


def _sd3(shapes: Shapes) -> dict[str, Any]:
    width, channels, patch, _ = shapes["pos_embed.proj.weight"]
    layers = _count(shapes, "transformer_blocks.")
    dual = [b for b in range(layers) if f"transformer_blocks.{b}.attn2.to_q.weight" in shapes]
    config: dict[str, Any] = {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "num_layers": layers,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": width,
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "pos_embed_max_size": isqrt(shapes["pos_embed.pos_embed"][1]),
        "dual_attention_layers": dual,
    }
    norm = shapes.get("transformer_blocks.0.attn.norm_q.weight")
    return config if norm is None else {**config, "qk_norm": "rms_norm"}


_LOOKS = {
    "UNet2DConditionModel": _unet,
    "AutoencoderKL": _vae,
    "CLIPTextModel": _clip,
    "CLIPTextModelWithProjection": _clip,
    "T5EncoderModel": _t5,
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
}

_VAE_WIDTHS = [128, 256, 512, 512]
_TOKENS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
_CLIP_L = {**_TOKENS, "hidden_act": "quick_gelu", "num_attention_heads": 12, "projection_dim": 768}
_CLIP_NAMES = ("CLIPTextModel", "CLIPTextModelWithProjection")

_PUBLISHED: tuple[tuple[str, tuple[str, ...], dict[str, Any], dict[str, Any]], ...] = (
    (
        "UNet2DConditionModel",
        ("sd15",),
        {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768},
        {"attention_head_dim": 8, "sample_size": 64, "norm_num_groups": 32},
    ),
    (
        "UNet2DConditionModel",
        ("sdxl",),
        {
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "projection_class_embeddings_input_dim": 2816,
        },
        {
            "attention_head_dim": [5, 10, 20],
            "addition_time_embed_dim": 256,
            "sample_size": 128,
            "norm_num_groups": 32,
        },
    ),
    (
        "UNet2DConditionModel",
        ("sdxl_refiner",),
        {
            "block_out_channels": [384, 768, 1536, 1536],
            "cross_attention_dim": 1280,
            "projection_class_embeddings_input_dim": 2560,
        },
        {
            "attention_head_dim": [6, 12, 24, 24],
            "addition_time_embed_dim": 256,
            "sample_size": 128,
            "norm_num_groups": 32,
        },
    ),
    (
        "AutoencoderKL",
        ("sd15", "sd2"),
        {"block_out_channels": _VAE_WIDTHS, "latent_channels": 4},
        {"scaling_factor": 0.18215, "sample_size": 512, "norm_num_groups": 32},
    ),
    (
        "AutoencoderKL",
        ("sdxl", "sdxl_refiner"),
        {"block_out_channels": _VAE_WIDTHS, "latent_channels": 4},
        {
            "scaling_factor": 0.13025,
            "sample_size": 1024,
            "norm_num_groups": 32,
            "force_upcast": True,
        },
    ),
    (
        "AutoencoderKL",
        ("sd3",),
        {"block_out_channels": _VAE_WIDTHS, "latent_channels": 16},
        {
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "sample_size": 1024,
            "norm_num_groups": 32,
        },
    ),
    (
        "AutoencoderKL",
        ("flux", "chroma", "z-image", "lumina2"),
        {"block_out_channels": _VAE_WIDTHS, "latent_channels": 16},
        {
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "sample_size": 1024,
            "norm_num_groups": 32,
        },
    ),
    *(
        (cls, (), {"hidden_size": 768, "num_hidden_layers": 12, "vocab_size": 49408}, _CLIP_L)
        for cls in _CLIP_NAMES
    ),
    (
        "CLIPTextModelWithProjection",
        (),
        {"hidden_size": 1280, "num_hidden_layers": 32, "vocab_size": 49408},
        {**_TOKENS, "hidden_act": "gelu", "num_attention_heads": 20},
    ),
    (
        "CLIPTextModel",
        ("sd2",),
        {"hidden_size": 1024, "num_hidden_layers": 23, "vocab_size": 49408},
        {**_TOKENS, "hidden_act": "gelu", "num_attention_heads": 16, "projection_dim": 512},
    ),
    (
        "T5EncoderModel",
        (),
        {"d_model": 4096, "num_layers": 24, "d_ff": 10240, "vocab_size": 32128},
        {
            "model_type": "t5",
            "feed_forward_proj": "gated-gelu",
            "relative_attention_max_distance": 128,
            "tie_word_embeddings": False,
            "is_encoder_decoder": True,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
        },
    ),
    (
        "FluxTransformer2DModel",
        ("flux",),
        {"attention_head_dim": 128, "num_attention_heads": 24},
        {"axes_dims_rope": [16, 56, 56], "patch_size": 1},
    ),
    *(
        (
            "SD3Transformer2DModel",
            ("sd3",),
            {"caption_projection_dim": width, "num_layers": layers},
            {
                "attention_head_dim": 64,
                "num_attention_heads": width // 64,
                "sample_size": 128,
            },
        )
        for width, layers in ((1536, 24), (2432, 38))
    ),
)
"""Class, families, what tells the model, and what shapes do not tell of it."""
