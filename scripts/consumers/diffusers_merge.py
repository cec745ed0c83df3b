"""Compare what regraft merges with what diffusers fuses.

    python scripts/consumers/diffusers_merge.py [FAMILY ...]

For every family: a LoRA in kohya's format without alphas is merged by regraft into the model's single file (names of
the model's own code) and into diffusers' folder; diffusers loads the same file into its model and fuses it. The weights
must be the same, to the rounding of float32.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers_loras import MODELS, random_lora
from safetensors.torch import load_file

import regraft
from regraft.storage.safetensors import open_tensors, write_tensors

SCALE = 0.7
FAMILIES = ("sdxl", "sd15", "qwen-image")
"""diffusers' converters of LoRAs for FLUX and SD3 have published widths in their code, and Wan's fails on embedders."""
LAYOUTS: dict[str, str | None] = {"sdxl": "ldm", "sd15": "ldm", "qwen-image": None}


def kohya_lora(family: str, model: torch.nn.Module, prefix: str, folder: Path) -> Path:
    """A LoRA of one rank, without alphas, as kohya's tools name it."""
    tensors, _, deltas = random_lora(model, family, prefix)
    same = {name: tensor for name, tensor in tensors.items() if not name.endswith("alpha")}
    for module in deltas:
        down, up = (f"{prefix}.{module}.lora_{x}.weight" for x in "AB")
        same[down], same[up] = same[down][:2] / 8, np.ascontiguousarray(same[up][:, :2]) / 8
    write_tensors(folder / "lora.safetensors", same, {"format": "pt"})
    regraft.convert(
        folder / "lora.safetensors", folder / "named.safetensors", to="kohya", source=family
    )
    plain = {
        n: x
        for n, x in open_tensors(folder / "named.safetensors").items()
        if not n.endswith(".alpha")
    }
    write_tensors(folder / "kohya.safetensors", plain, {"format": "pt"})
    return folder / "kohya.safetensors"


def fused(family: str, model: torch.nn.Module, path: Path) -> dict[str, np.ndarray]:
    """The weights after diffusers has loaded and fused a file."""
    mixin, prefix, _, _ = MODELS[family]
    config = {"unet_config": model.config} if prefix == "unet" else {}
    state, *alphas, _ = mixin.lora_state_dict(
        load_file(path), return_alphas=True, return_lora_metadata=True, **config
    )
    model.load_lora_adapter(state, network_alphas=alphas[0] if alphas else None, prefix=prefix)
    model.fuse_lora(lora_scale=SCALE)
    model.unload_lora()
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def merged(
    family: str, model: torch.nn.Module, path: Path, folder: Path
) -> list[dict[str, np.ndarray]]:
    """The weights after regraft has merged the file: into the folder, and into the single file and converted."""
    inner = folder / "part"
    model.save_pretrained(inner)
    weights = "diffusion_pytorch_model.safetensors"
    regraft.merge(inner, [(path, SCALE)], folder / "in_folder", source=family)
    single = folder / "single.safetensors"
    if LAYOUTS[family] is None:  # its names are the same in both
        shutil.copy(inner / weights, single)
    else:
        regraft.convert(inner / weights, single, to=LAYOUTS[family], source=family)
    regraft.merge(single, [(path, SCALE)], folder / "out.safetensors", source=family)
    back = folder / "out.safetensors"
    if LAYOUTS[family] is not None:
        back = folder / "back.safetensors"
        regraft.convert(folder / "out.safetensors", back, to="diffusers", source=family)
    files = folder / "in_folder" / weights, back
    return [{n: x.copy() for n, x in open_tensors(file).items()} for file in files]


def check(family: str, folder: Path) -> list[str]:
    """What is wrong in a family."""
    _, prefix, kind, config = MODELS[family]
    torch.manual_seed(0)
    model = kind(**config)
    path = kohya_lora(family, model, prefix, folder)
    before = {n: x.detach().numpy().copy() for n, x in model.state_dict().items()}
    results = merged(family, model, path, folder)
    want = fused(family, model, path)
    wrong = []
    for name, got in zip(("folder", "single file"), results, strict=True):
        changed = [n for n in want if not np.array_equal(before[n], got[n])]
        off = max(np.abs(got[n] - want[n]).max() / (np.abs(want[n]).max() or 1) for n in want)
        print(
            f"{family:12} {name:12} {len(changed)} of {len(want)} tensors merged, off by {off:.2g}"
        )
        wrong += [f"{family}, {name}: off by {off:.2g}"] if off > 1e-6 or not changed else []
    return wrong


def main() -> int:
    """Check the families that are named, or all."""
    wrong = []
    for family in [x for x in sys.argv[1:] if x != "--strict"] or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            wrong += check(family, Path(folder))
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
