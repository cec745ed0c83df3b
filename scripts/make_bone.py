"""Writes tests/adapters/bone.safetensors: what PEFT's own Bone layer makes of a small weight.

Needs PEFT 0.18, the last version that has Bone: python scripts/make_bone.py

Of every case: a base weight, the block that was trained, and the weight after merging.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import BoneConfig, get_peft_model
from safetensors.torch import save_file

FILE = Path(__file__).parents[1] / "tests/adapters/bone.safetensors"

CASES = {
    "plain": {"r": 4, "init_weights": True},
    "uneven": {"r": 3, "init_weights": True},
    "bat": {"r": 4, "init_weights": "bat"},
}


def main() -> None:
    """Merge every case."""
    torch.manual_seed(0)
    tensors = {}
    for name, options in CASES.items():
        model = torch.nn.Sequential(torch.nn.Linear(16, 8))
        tensors[f"{name}.base"] = model[0].weight.detach().clone()
        model = get_peft_model(model, BoneConfig(target_modules=["0"], **options))
        (block,) = (p for p in model.parameters() if p.requires_grad)
        block.data = torch.randn_like(block)
        tensors[f"{name}.block"] = block.detach().clone()
        merged = model.merge_and_unload()
        tensors[f"{name}.merged"] = merged[0].weight.detach().clone()
    save_file(tensors, FILE, {"cases": json.dumps(CASES)})


if __name__ == "__main__":
    main()
