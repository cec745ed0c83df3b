"""Compare what diffusers loads of LoRAs for families without a rule book with what they add.

    python scripts/consumers/diffusers_families.py

The modules of such a family are those of diffusers' class, which the base's folder names. A LoRA in kohya's names on
all linears and convolutions (but those of groups, which PEFT refuses) goes to diffusers' form and back, bit for bit;
diffusers loads it, and the merged weights minus the base must be its deltas.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers_loras import loaded_deltas

import regraft
from regraft.storage.safetensors import open_tensors, write_tensors

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
CROSS = {"cross_attention_dim": 16, "caption_channels": 12}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SanaTransformer2DModel": (
        diffusers.loaders.lora_pipeline.SanaLoraLoaderMixin,
        {
            **HEADS,
            **CROSS,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "sample_size": 8,
        },
    ),
    "AuraFlowTransformer2DModel": (
        diffusers.loaders.lora_pipeline.AuraFlowLoraLoaderMixin,
        {
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "caption_projection_dim": 16,
            "joint_attention_dim": 12,
            "sample_size": 8,
            "pos_embed_max_size": 16,
        },
    ),
    "CogVideoXTransformer3DModel": (
        diffusers.loaders.lora_pipeline.CogVideoXLoraLoaderMixin,
        {**HEADS, "in_channels": 4, "out_channels": 4, "text_embed_dim": 12, "time_embed_dim": 6},
    ),
    "MochiTransformer3DModel": (
        diffusers.loaders.lora_pipeline.Mochi1LoraLoaderMixin,
        {**HEADS, "pooled_projection_dim": 8, "in_channels": 4, "text_embed_dim": 12},
    ),
}


def kohya(model: torch.nn.Module) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A LoRA in kohya's names, with ranks and alphas that differ, and its deltas by module."""
    random = np.random.default_rng(0)
    tensors, deltas = {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            continue
        if getattr(module, "groups", 1) > 1:
            continue
        rank, alpha = 2 + len(deltas) % 2, 1 + len(deltas) % 3
        out, into, *kernel = module.weight.shape
        down = random.normal(size=(rank, into, *kernel)).astype(np.float32)
        up = random.normal(size=(out, rank, *(1 for _ in kernel))).astype(np.float32)
        stem = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"{stem}.alpha"] = np.float32(alpha)
        flat = up.reshape(out, rank) @ down.reshape(rank, -1)
        deltas[name] = (alpha / rank * flat).reshape(module.weight.shape)
    return tensors, deltas


def check(name: str, folder: Path) -> list[str]:
    """What is wrong in a family."""
    mixin, config = MODELS[name]
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**config).double()
    base = folder / name / "transformer"
    model.save_pretrained(base)
    tensors, want = kohya(model)
    files = [folder / f"{name}-{x}.safetensors" for x in ("kohya", "diffusers", "back")]
    write_tensors(files[0], tensors, {})
    regraft.convert(files[0], files[1], to="diffusers", model=base.parent, verify=True)
    regraft.convert(files[1], files[2], to="kohya", model=base.parent, verify=True)
    back = open_tensors(files[2])
    wrong = [
        f"{name}: {key}, back" for key, x in tensors.items() if not np.array_equal(back[key], x)
    ]
    got = loaded_deltas(mixin, "transformer", model, files[1])
    off = [
        module
        for module, delta in want.items()
        if module not in got or np.abs(got[module] - delta).max() > 1e-4 * np.abs(delta).max()
    ]
    print(f"{name:28} {len(want) - len(off)} of {len(want)} modules right, {len(wrong)} not back")
    return wrong + [f"{name}: {module}" for module in off + sorted(set(got) - set(want))]


def main() -> int:
    """Check all of them."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            wrong += check(name, Path(folder))
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
