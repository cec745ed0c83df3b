"""Let NeMo Automodel's own functions take what regraft writes for it, unchanged, without the package.

    python scripts/consumers/nemo_functions.py [--strict]

The state-dict adapter of its Qwen3-MoE turns the file's keys into the grouped tensors of its model, told by the stamp
in `automodel_peft_config.json`; rank and alpha are read as it reads them. What it would add is compared with B A of the
adapter that was converted. Its layers are not run.
"""

import json
import os
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from shared.pinned import archive, cut, stand_in
from shared.running import main
from shared.tiny import EXPERTS, INNER, LAYERS, SIZE, adapter, off, packed

import regraft

MODELS = ("qwen3_moe one by one", "qwen3_moe packed", "llama")


def functions():
    """NeMo's functions by name."""
    root = archive("nemo-automodel")
    have: dict[str, Any] = {"torch": torch, "re": re, "os": os, "json": json, "Any": Any}
    have |= {"StateDictAdapter": object, "is_dtensor": lambda tensor: False}
    for path, names in {
        "moe/experts.py": ("is_gated_activation",),
        "moe/state_dict_mixin.py": (
            "MoESplitExpertsStateDictMixin",
            "_LORA_EXPERT_SUFFIXES",
            "_PARAMWRAPPER_LAYOUT_METADATA_KEY",
            "_PARAMWRAPPER_LAYOUT_MODERN",
            "_PARAMWRAPPER_LAYOUT_LEGACY",
        ),
        "models/qwen3_moe/state_dict_adapter.py": ("Qwen3MoeStateDictAdapter",),
        "checkpoint/addons.py": ("load_automodel_peft_config_dict",),
        "checkpoint/checkpointing.py": ("_read_paramwrapper_layout_metadata",),
    }.items():
        made = cut(root, f"nemo_automodel/components/{path}", names, have)
        have |= {name: made[name] for name in names}
    stand_in("nemo_automodel.components.moe.experts", have)
    stand_in("nemo_automodel.components.moe.state_dict_mixin", have)
    return SimpleNamespace(**have)


def loaded(nemo, folder):
    """Its tensors by name, as its model has them, and the scale."""
    sizes = SimpleNamespace(
        n_routed_experts=EXPERTS,
        moe_inter_dim=INNER,
        dim=SIZE,
        expert_activation="swiglu",
        expert_bias=False,
    )
    reader = nemo.Qwen3MoeStateDictAdapter(None, sizes, None)
    reader._paramwrapper_layout_hint = nemo._read_paramwrapper_layout_metadata(folder)
    tensors = reader.from_hf(load_file(folder / "adapter_model.safetensors"))
    config = nemo.load_automodel_peft_config_dict(folder)
    return {k: v.numpy() for k, v in tensors.items()}, config["alpha"] / config["dim"]


def run(folder, model):
    """The largest difference of what it adds to what the adapter is."""
    nemo = functions()
    if model.endswith("packed"):
        base, lora, wanted = packed(folder, "qwen3_moe")
    else:
        model_type = model.partition(" ")[0]
        base, lora, wanted = adapter(folder, model_type, only=r"self_attn|experts|mlp\.\w+_proj")
    regraft.convert(lora, folder / "out", to="nemo", model=base)
    tensors, scale = loaded(nemo, folder / "out")
    made, stem = {}, "base_model.model."
    for layer in range(LAYERS):
        place = f"{stem}model.layers.{layer}.mlp.experts.lora_"
        if f"{place}down_A" not in tensors:
            continue
        parts = {}
        for part, name in (("gate_and_up", "gate_up_proj"), ("down", "down_proj")):
            a, b = (tensors.pop(f"{place}{part}_{letter}") for letter in "AB")
            parts[name] = scale * np.transpose(a @ b, (0, 2, 1))
        if model.endswith("packed"):
            made |= {(layer, name): delta for name, delta in parts.items()}
            continue
        for expert in range(EXPERTS):
            here = f"model.layers.{layer}.mlp.experts.{expert}."
            both = parts["gate_up_proj"][expert]
            made |= {f"{here}gate_proj": both[:INNER], f"{here}up_proj": both[INNER:]}
            made[f"{here}down_proj"] = parts["down_proj"][expert]
    for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
        b = tensors[name.replace("lora_A", "lora_B")]
        made[name.removeprefix(stem).removesuffix(".lora_A.weight")] = scale * b @ tensors[name]
    assert made.keys() == wanted.keys(), sorted(map(str, made.keys() ^ wanted.keys()))[:4]
    return max(off(made[name], wanted[name]) for name in wanted)


if __name__ == "__main__":
    main("NeMo Automodel", MODELS, run, functions)
