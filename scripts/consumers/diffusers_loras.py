"""Compare what diffusers loads of the LoRAs that regraft writes for it with what they add.

    python scripts/consumers/diffusers_loras.py [FAMILY ...]

For every family: a LoRA on all linears and convolutions of a tiny model, with ranks and alphas that differ, goes to
kohya's format and to ComfyUI's and from there to diffusers'; diffusers loads that file into the model, and the merged
weights minus the base must be the LoRA's deltas. So must be what PEFT makes of its folder.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.loaders.lora_pipeline import (
    Flux2LoraLoaderMixin,
    FluxLoraLoaderMixin,
    HunyuanVideoLoraLoaderMixin,
    LTXVideoLoraLoaderMixin,
    Lumina2LoraLoaderMixin,
    QwenImageLoraLoaderMixin,
    SD3LoraLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
    WanLoraLoaderMixin,
    ZImageLoraLoaderMixin,
)
from peft import PeftModel

import regraft
from regraft.dialects.image.families import family_named
from regraft.dialects.image.modules import names_of
from regraft.storage.safetensors import write_tensors

# torchtune needs an older torchao than PEFT accepts, and PEFT looks for one wherever it injects an adapter.
sys.modules["torchao"] = None  # type: ignore[assignment]

UNET: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
}
MODELS: dict[str, tuple[Any, str, type, dict[str, Any]]] = {
    "sd15": (
        StableDiffusionLoraLoaderMixin,
        "unet",
        diffusers.UNet2DConditionModel,
        {**UNET, "block_out_channels": (8, 8, 16, 16), "attention_head_dim": 2},
    ),
    "sdxl": (
        StableDiffusionXLLoraLoaderMixin,
        "unet",
        diffusers.UNet2DConditionModel,
        {
            **UNET,
            "block_out_channels": (8, 16, 32),
            "attention_head_dim": (1, 2, 4),
            "transformer_layers_per_block": (1, 2, 3),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 56,
        },
    ),
    "flux": (
        FluxLoraLoaderMixin,
        "transformer",
        diffusers.FluxTransformer2DModel,
        {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 20,
            "pooled_projection_dim": 12,
            "guidance_embeds": True,
            "axes_dims_rope": (2, 2, 4),
        },
    ),
    "sd3": (
        SD3LoraLoaderMixin,
        "transformer",
        diffusers.SD3Transformer2DModel,
        {
            "sample_size": 8,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 20,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 12,
            "pos_embed_max_size": 8,
        },
    ),
    "qwen-image": (
        QwenImageLoraLoaderMixin,
        "transformer",
        diffusers.QwenImageTransformer2DModel,
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 20,
            "axes_dims_rope": (2, 2, 4),
        },
    ),
    "wan": (
        WanLoraLoaderMixin,
        "transformer",
        diffusers.WanTransformer3DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 20,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 2,
        },
    ),
    "sd2": (
        StableDiffusionLoraLoaderMixin,
        "unet",
        diffusers.UNet2DConditionModel,
        {
            **UNET,
            "block_out_channels": (8, 8, 16, 16),
            "attention_head_dim": (1, 1, 2, 2),
            "use_linear_projection": True,
        },
    ),
    "chroma": (
        FluxLoraLoaderMixin,
        "transformer",
        diffusers.ChromaTransformer2DModel,
        {
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "in_channels": 8,
            "joint_attention_dim": 20,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 12,
            "approximator_layers": 2,
            "axes_dims_rope": (4, 2, 2),
        },
    ),
    "flux2": (
        Flux2LoraLoaderMixin,
        "transformer",
        diffusers.Flux2Transformer2DModel,
        {
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "in_channels": 8,
            "joint_attention_dim": 20,
            "timestep_guidance_channels": 14,
            "axes_dims_rope": (2, 2, 2, 2),
        },
    ),
    "hunyuan-video": (
        HunyuanVideoLoraLoaderMixin,
        "transformer",
        diffusers.HunyuanVideoTransformer3DModel,
        {
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "in_channels": 3,
            "out_channels": 3,
            "text_embed_dim": 10,
            "pooled_projection_dim": 14,
            "guidance_embeds": True,
            "rope_axes_dim": (4, 2, 2),
        },
    ),
    "ltx-video": (
        LTXVideoLoraLoaderMixin,
        "transformer",
        diffusers.LTXVideoTransformer3DModel,
        {
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 16,
            "caption_channels": 10,
        },
    ),
    "z-image": (
        ZImageLoraLoaderMixin,
        "transformer",
        diffusers.ZImageTransformer2DModel,
        {
            "n_layers": 2,
            "dim": 16,
            "n_heads": 2,
            "n_kv_heads": 2,
            "in_channels": 4,
            "cap_feat_dim": 10,
            "axes_dims": [4, 2, 2],
        },
    ),
    "lumina2": (
        Lumina2LoraLoaderMixin,
        "transformer",
        diffusers.Lumina2Transformer2DModel,
        {
            "num_layers": 2,
            "hidden_size": 24,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "in_channels": 4,
            "cap_feat_dim": 10,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
        },
    ),
}


def random_lora(
    model: torch.nn.Module, family: str, prefix: str
) -> tuple[dict[str, np.ndarray], dict[str, str], dict[str, np.ndarray]]:
    """Tensors and header as diffusers saves them, and the deltas by module."""
    random = np.random.default_rng(0)
    found = family_named(family)
    names = names_of(found, "diffusers") if found is not None else None
    tensors, deltas, ranks, alphas = {}, {}, {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            continue
        if names is None or names.find(name, flat=False) is None:
            continue
        rank, alpha = 2 + len(ranks) % 2, 4 + 4 * (len(ranks) % 3 == 0)
        out, into, *kernel = module.weight.shape
        down = random.normal(size=(rank, into, *kernel)).astype(np.float32)
        up = random.normal(size=(out, rank, *(1 for _ in kernel))).astype(np.float32)
        tensors[f"{prefix}.{name}.lora_A.weight"] = down
        tensors[f"{prefix}.{name}.lora_B.weight"] = up
        escaped = "^" + name.replace(".", r"\.")
        ranks[escaped], alphas[escaped] = rank, alpha
        flat = up.reshape(out, rank) @ down.reshape(rank, -1)
        deltas[name] = (alpha / rank * flat).reshape(module.weight.shape)
    said: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": sorted(deltas)}
    said |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    header = {f"{prefix}.{field}": value for field, value in said.items()}
    return tensors, {"lora_adapter_metadata": json.dumps(header)}, deltas


def loaded_deltas(mixin: Any, prefix: str, model: Any, path: Path) -> dict[str, np.ndarray]:
    """What diffusers adds to every weight when it loads a file."""
    state, *alphas, metadata = mixin.lora_state_dict(
        path,
        return_alphas=True,
        return_lora_metadata=True,
        **({"unet_config": model.config} if prefix == "unet" else {}),
    )
    model.load_lora_adapter(
        state, network_alphas=alphas[0] if alphas else None, prefix=prefix, metadata=metadata
    )
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and module.lora_A:
            before = module.get_base_layer().weight.detach().clone()
            module.merge()
            found[name] = (module.get_base_layer().weight.detach() - before).numpy()
    return found


def peft_deltas(model: Any, folder: Path) -> dict[str, np.ndarray]:
    """What PEFT adds to every weight when it loads a folder."""
    before = {name: x.detach().clone() for name, x in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload().state_dict()
    return {
        name.removesuffix(".weight"): (x - before[name]).numpy()
        for name, x in merged.items()
        if not torch.equal(x, before[name])
    }


def check(family: str, folder: Path) -> list[str]:
    """What is wrong in a family."""
    mixin, prefix, kind, config = MODELS[family]
    wrong = []
    for way in ("kohya", "comfyui", "peft"):
        torch.manual_seed(0)
        model = kind(**config).double()
        tensors, header, want = random_lora(model, family, prefix)
        write_tensors(folder / "a.safetensors", tensors, header)
        between = folder / ("b" if way == "peft" else "b.safetensors")
        made = folder / "c.safetensors"
        regraft.convert(
            folder / "a.safetensors", between, to=way, source=family, overwrite=True, verify=True
        )
        if way == "peft":
            got = peft_deltas(model, between)
        else:
            regraft.convert(between, made, to="diffusers", overwrite=True, verify=True)
            got = loaded_deltas(mixin, prefix, model, made)
        off = [
            name
            for name in want
            if name not in got
            or np.abs(got[name] - want[name]).max() > 1e-4 * np.abs(want[name]).max()
        ]
        print(f"{family:12} by way of {way:8} {len(want) - len(off)} of {len(want)} modules right")
        wrong += [
            f"{family} by way of {way}: {name}" for name in off + sorted(set(got) - set(want))
        ]
    return wrong


def main() -> int:
    """Check the families that are named, or all."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for family in [x for x in sys.argv[1:] if x != "--strict"] or MODELS:
            wrong += check(family, Path(folder))
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
