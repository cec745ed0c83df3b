"""Let Unsloth's own functions take what regraft writes for it, unchanged, without the package.

    python scripts/consumers/unsloth_functions.py [--strict]

`unsloth_zoo` reads the record of how packed experts lie, and splits the factors for its grouped matrix product; what
comes out is compared with B A of the adapter that was converted. The other way, a file whose columns lie as Unsloth
laid them until 2026.9.5 is converted, and compared with what its own repacking makes of it. Its kernels are not run.
"""

import json
import os
import re
from types import SimpleNamespace
from typing import Optional

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from shared.pinned import archive, cut
from shared.running import main
from shared.tiny import EXPERTS, INNER, LAYERS, SIZE, adapter, off, packed

import regraft

MODELS = ("qwen3_moe", "qwen3_moe one by one", "mixtral one by one", "gpt_oss", "qwen3_moe grouped")
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def functions():
    """Unsloth's functions by name."""
    root = archive("unsloth_zoo")
    names = (
        "LORA_B_LAYOUT_RANK_MAJOR",
        "LORA_B_LAYOUT_GROUPED_BY_EXPERT",
        "_LORA_B_LAYOUTS",
        "_MOE_LORA_B_LAYOUT",
        "MoELoRABLayoutError",
        "_read_moe_lora_b_layout_from_env",
        "moe_lora_b_layout",
        "_resolve_moe_lora_b_layout",
        "_moe_lora_b_column_permutation",
        "_ExpertMajorGroupedOperand",
        "_ExpertMajorColumns",
        "_moe_lora_b_columns_expert_major",
        "unflatten_moe_lora_b",
        "_canonical_lora_weights_for_grouped_mm",
        "_reversed_lora_weights_for_grouped_mm",
        "extract_moe_lora_weights_for_grouped_mm",
        "FUSED_EXPERT_LORA_LAYOUT_KEY",
        "FUSED_EXPERT_LORA_DETAIL_KEY",
        "_SEPARATED_MOE_LORA_PARAMETER_NAMES",
        "_declared_lora_b_layouts",
        "saved_lora_b_layouts",
        "convert_legacy_lora_b",
    )
    given = {"torch": torch, "os": os, "Optional": Optional}
    given |= {"_should_use_separated_lora": lambda: True, "_wrapper_has_adapter": lambda *_: True}
    made = cut(root, "unsloth_zoo/temporary_patches/moe_utils.py", names, given)
    return SimpleNamespace(**{name: made[name] for name in names})


def wrapper(name, b):
    """Stands for PEFT's wrapper of a parameter."""
    made = torch.nn.Module()
    made.parameter_name, made.num_experts = name, EXPERTS
    made.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(b.shape[1], len(b), bias=False)})
    made.lora_B["default"].weight.data = torch.from_numpy(b.copy())
    return made


def loaded(unsloth, folder):
    """What it adds to the parameters of experts, (experts, out, in), by layer and parameter."""
    tensors = load_file(folder / FILE)
    config = json.loads((folder / CONFIG).read_text())
    made = {}
    for layer in range(LAYERS):
        for name in ("gate_up_proj", "down_proj"):
            place = f"base_model.model.model.layers.{layer}.mlp.experts"
            place += ".base_layer" * (name == "gate_up_proj")
            a, b = (tensors[f"{place}.lora_{letter}.weight"] for letter in "AB")
            inside = wrapper(name, b)
            unsloth.convert_legacy_lora_b(torch.nn.ModuleList([inside]), "default", config)
            rank, rows = len(a) // EXPERTS, 2 * INNER if name == "gate_up_proj" else SIZE
            # PEFT gives each parameter its alpha; what Unsloth multiplies with comes from there.
            alpha, path = config["lora_alpha"], f"model.layers.{layer}.mlp.experts.{name}"
            for pattern, value in (config.get("alpha_pattern") or {}).items():
                alpha = value if re.fullmatch(rf"(.*\.)?({pattern})", path) else alpha
            scale = alpha / rank
            first, second, scale, _ = unsloth.extract_moe_lora_weights_for_grouped_mm(
                None,
                torch.from_numpy(a),
                inside.lora_B["default"].weight.detach(),
                scale,
                EXPERTS,
                input_dim=a.shape[1],
                output_dim=rows,
            )
            made[layer, name] = scale * np.transpose((first @ second).numpy(), (0, 2, 1))
    return made


def group(lora):
    """Lay the columns of packed factors one expert after another, and say so as Unsloth does."""
    tensors = load_file(lora / FILE)
    for name, b in tensors.items():
        if name.endswith("lora_B.weight"):
            split = b.reshape(len(b), -1, EXPERTS).transpose(0, 2, 1)
            tensors[name] = np.ascontiguousarray(split).reshape(b.shape)
    save_file(tensors, lora / FILE)
    config = json.loads((lora / CONFIG).read_text()) | {"lora_B_layout": "grouped_by_expert"}
    (lora / CONFIG).write_text(json.dumps(config))


def run(folder, model):
    """The largest difference of what it adds to what the adapter is."""
    unsloth = functions()
    model_type = model.partition(" ")[0]
    if model.endswith("one by one"):
        base, lora, paths = adapter(folder, model_type, only=r"\.experts\.")
        wanted = {}
        for layer in range(LAYERS):
            place = f"model.layers.{layer}.mlp.experts"
            names = ["gate_proj", "up_proj", "down_proj"]
            if model_type == "mixtral":
                place, names = place.replace("mlp", "block_sparse_moe"), ["w1", "w3", "w2"]
            each = [
                np.stack([paths[f"{place}.{e}.{name}"] for e in range(EXPERTS)]) for name in names
            ]
            wanted[layer, "gate_up_proj"] = np.concatenate(each[:2], axis=1)
            wanted[layer, "down_proj"] = each[2]
    else:
        base, lora, wanted = packed(folder, model_type)
    if model.endswith("grouped"):
        group(lora)
    regraft.convert(lora, folder / "out", to="unsloth", model=base)
    made = loaded(unsloth, folder / "out")
    return max(off(made[name], wanted[name]) for name in wanted)


if __name__ == "__main__":
    main("Unsloth", MODELS, run, functions)
