"""Tiny image models with numbers, as one file and as a folder, and LoRAs for them as tools write them."""

import json
import sys
from pathlib import Path

import numpy as np

from regraft.storage.safetensors import open_tensors, write_tensors

sys.path.insert(0, str(Path(__file__).parent.parent / "image"))
from image_models import both
from test_pipelines import CLIP as _CLIP

CLIP = {
    **_CLIP,
    "text_model.encoder.layers.0.self_attn.q_proj.weight": (12, 12),
    "text_model.encoder.layers.0.self_attn.q_proj.bias": (12,),
}


def numbers(state, seed=0, dtype=np.float32):
    """Random numbers in place of labels."""
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(x.shape).astype(dtype) for name, x in state.items()}


def read(path):
    """All tensors of a file, or of a folder by part and name."""
    if path.is_file():
        return {name: tensor.copy() for name, tensor in open_tensors(path).items()}
    files = sorted(path.rglob("*.safetensors"))
    return {f"{f.parent.name}/{n}": x for f in files for n, x in read(f).items()}


def write(path, state, metadata=None):
    """One file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in state.items()}
    write_tensors(path, tensors, metadata or {"format": "pt"})
    return path


def flux_file(path, dtype=np.float32):
    """FLUX.1's transformer and one text encoder as one file."""
    native, _ = both("flux")
    clip = {name: np.zeros(shape) for name, shape in CLIP.items()}
    single = {
        **{"model.diffusion_model." + n: x for n, x in native.items()},
        **{"text_encoders.clip_l.transformer." + n: x for n, x in clip.items()},
    }
    return write(path, numbers(single, dtype=dtype))


def pair(out, into, rank=2, kernel=(), seed=0):
    """A down and an up."""
    random = np.random.default_rng(seed)
    down = random.standard_normal((rank, into, *kernel)).astype(np.float32)
    up = random.standard_normal((out, rank, *(1 for _ in kernel))).astype(np.float32)
    return down, up


FLUX_MODULES = {
    "double_blocks.0.img_attn.qkv": (24, 8),
    "double_blocks.1.txt_mlp.0": (32, 8),
    "single_blocks.10.linear1": (56, 8),
    "single_blocks.3.linear2": (8, 40),
    "final_layer.adaLN_modulation.1": (16, 8),
}


def kohya_flux(path, alpha=1.0, text=True, seed=0):
    """A kohya LoRA on FLUX.1, and what it adds by the names of the single file, in float64."""
    tensors, added = {}, {}
    modules = {f"lora_unet_{m.replace('.', '_')}": (m, s) for m, s in FLUX_MODULES.items()}
    if text:
        q = "text_model.encoder.layers.0.self_attn.q_proj"
        modules[f"lora_te1_{q.replace('.', '_')}"] = (q, (12, 12))
    for number, (stem, (module, (out, into))) in enumerate(modules.items()):
        down, up = pair(out, into, seed=seed + number)
        tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": np.array(alpha, np.float32),
        }
        prefix = (
            "model.diffusion_model." if "_unet_" in stem else "text_encoders.clip_l.transformer."
        )
        added[f"{prefix}{module}.weight"] = up.astype(float) @ down.astype(float) * (alpha / 2)
    write(path, tensors, {"ss_base_model_version": "flux1"})
    return path, added


def config_of(folder):
    """The config of a folder."""
    return json.loads((folder / "config.json").read_text())


def sdxl_file(path):
    """SDXL's UNet and both text encoders as one file; the second has OpenCLIP's names."""
    unet, _ = both("sdxl", 1)
    clip_g, _ = both("open-clip")
    clip_l = {name: np.zeros(shape) for name, shape in CLIP.items()}
    single = {
        **{"model.diffusion_model." + n: x for n, x in unet.items()},
        **{"conditioner.embedders.0.transformer." + n: x for n, x in clip_l.items()},
        **{"conditioner.embedders.1.model." + n: x for n, x in clip_g.items()},
    }
    return write(path, numbers(single))


def wan_folder(folder):
    """Wan 2.2's two transformers in a folder of diffusers."""
    _, state = both("wan")
    for seed, part in enumerate(("transformer", "transformer_2")):
        path = folder / part / "diffusion_pytorch_model.safetensors"
        write(path, numbers(state, seed))
    (folder / "model_index.json").write_text("{}")
    return folder
