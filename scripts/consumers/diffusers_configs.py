"""Compare the configs that are made from shapes with diffusers' and transformers' own classes, at published sizes.

    python scripts/consumers/diffusers_configs.py

A model of each published size is made without memory; the config that its shapes lead to must make the same model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import diffusers
import torch
import transformers

from regraft.checkpoints.part_configs import Shapes, known_config
from regraft.checkpoints.pipelines import PIPELINES, Part

LEVELS = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
ADDED = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}
SDXL = ADDED | {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": LEVELS,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "projection_class_embeddings_input_dim": 2816,
}
REFINER = ADDED | {
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": (*LEVELS, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 4,
    "attention_head_dim": (6, 12, 24, 24),
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
CLIP_L |= {"num_attention_heads": 12, "projection_dim": 768}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
CLIP_G |= {"num_attention_heads": 20, "projection_dim": 1280}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23}
CLIP_H |= {"num_attention_heads": 16, "projection_dim": 512}
T5 = {"vocab_size": 32128, "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
T5 |= {"feed_forward_proj": "gated-gelu"}


def vae(latents: int) -> dict[str, Any]:
    """The VAE of so many channels."""
    return {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": latents,
        "use_quant_conv": latents == 4,
        "use_post_quant_conv": latents == 4,
    }


def sd3(width: int, layers: int, **more: Any) -> dict[str, Any]:
    """A transformer of Stable Diffusion 3."""
    heads = width // 64
    return {
        "num_layers": layers,
        "attention_head_dim": 64,
        "num_attention_heads": heads,
        "caption_projection_dim": width,
        "pos_embed_max_size": 192,
        **more,
    }


def cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Family, part, and what its class is made with."""
    yield "sd15", "unet", {"cross_attention_dim": 768}
    yield "sdxl", "unet", SDXL
    yield "sdxl_refiner", "unet", REFINER
    for family, latents in (("sd15", 4), ("sdxl", 4), ("sd3", 16), ("flux", 16)):
        yield family, "vae", vae(latents)
    for family in ("sd15", "sdxl", "sd3", "flux"):
        yield family, "text_encoder", CLIP_L
    yield "sdxl", "text_encoder_2", CLIP_G
    yield "sd3", "text_encoder_2", CLIP_G
    yield "sd2", "text_encoder", CLIP_H
    yield "flux", "text_encoder_2", T5
    for more in ({"guidance_embeds": True}, {}, {"in_channels": 384, "out_channels": 64}):
        yield "flux", "transformer", more
    yield "sd3", "transformer", sd3(1536, 24)
    yield "sd3", "transformer", sd3(2432, 38, qk_norm="rms_norm")
    dual = tuple(range(13))
    yield "sd3", "transformer", sd3(1536, 24, qk_norm="rms_norm", dual_attention_layers=dual)


def shapes_of(part: Part, config: dict[str, Any]) -> Shapes:
    """The tensors of a part by diffusers' names."""
    if part.library == "diffusers":
        model = getattr(diffusers, part.cls).from_config(config)
    else:
        kind = transformers.T5Config if "T5" in part.cls else transformers.CLIPTextConfig
        fields = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
        model = getattr(transformers, part.cls)(kind(**fields))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if part.root and not any(name.startswith(part.root) for name in shapes):
        return {part.root + name: shape for name, shape in shapes.items()}
    return shapes


def main() -> int:
    """Compare every published size."""
    status = 0
    pipelines = {pipeline.name: pipeline for pipeline in PIPELINES}
    for family, name, config in cases():
        part = next(part for part in pipelines[family].parts if part.name == name)
        with torch.device("meta"):
            there = shapes_of(part, config)
            made = known_config(family, part, there)
            equal = made is not None and shapes_of(part, made) == there
        print(f"{family}, {name}: {len(there)} tensors: {'equal' if equal else 'NOT equal'}")
        status |= not equal
    return status


if __name__ == "__main__":
    sys.exit(main())
