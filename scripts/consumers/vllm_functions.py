"""Let vLLM's own loader take what regraft writes for it: its functions, unchanged, without the package.

    python scripts/consumers/vllm_functions.py [--strict]

The functions read the two files, map the names, check them, and join the parts of fused layers and experts
(`PEFTHelper`, `LoRAModel`, `WeightsMapper`, and the manager's `_create_merged_loras_inplace`). What a slot then has is
multiplied and compared with B A of the adapter that was converted. The model's own tables (`packed_modules_mapping`,
`hf_to_vllm_mapper`, the experts' names) are taken from its file. Layers and kernels are not run.
"""

import ast
import contextlib
import copy
import json
import math
import os
import re
from dataclasses import MISSING, dataclass, field, fields, replace
from types import SimpleNamespace

import safetensors
import torch
from shared.pinned import Quiet, archive, attributes, cut, parse
from shared.running import main
from shared.tiny import EXPERTS, LAYERS, adapter, off, packed

import regraft

# The class, its file, and the linear layers that it has, as vLLM names them.
FUSED = ("self_attn.qkv_proj", "self_attn.o_proj")
LATENT = ("fused_qkv_a_proj", "q_b_proj", "o_proj")
MODELS = {
    "llama": ("LlamaForCausalLM", "llama", (*FUSED, "mlp.gate_up_proj", "mlp.down_proj")),
    "mixtral": ("MixtralForCausalLM", "mixtral", (*FUSED, "block_sparse_moe.experts")),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "qwen3_moe", (*FUSED, "mlp.experts")),
    "deepseek_v3": (
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        (*(f"self_attn.{name}" for name in LATENT), "mlp.experts"),
    ),
    "gpt_oss": ("GptOssForCausalLM", "gpt_oss", ("mlp.experts",)),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe", ("mlp.experts",)),
}
PACKED = ("gpt_oss", "qwen3_vl_moe")


class Flat:
    """Stands for vLLM's layer of experts, one process."""

    use_ep = False


class Stacked(Flat):
    """The same, for models whose experts are packed."""

    ep_rank, global_num_experts = 0, EXPERTS
    w13_lora_a_stacked = (torch.empty(1, EXPERTS),)


def functions():
    """vLLM's functions by name."""
    root = archive("vllm", source=True)
    logger = Quiet()
    have = {"torch": torch, "os": os, "json": json, "math": math, "logger": logger}
    have |= {"dataclass": dataclass, "field": field, "fields": fields, "MISSING": MISSING}
    have |= {"safetensors": safetensors, "PIN_MEMORY": False, "replace": replace, "re": re}
    have |= {"contextmanager": contextlib.contextmanager, "LRUCacheLoRAModelManager": None}
    have |= {
        "get_adapter_absolute_path": str,
        "copy": copy,
        "FusedMoEWithLoRA": Flat,
        "FusedMoE3DWithLoRA": Stacked,
    }
    for path, names in {
        "vllm/model_executor/models/utils.py": ("WeightsMapper",),
        "vllm/lora/peft_helper.py": ("PEFTHelper",),
        "vllm/lora/utils.py": (
            "parse_fine_tuned_lora_name",
            "is_base_embedding_weights",
            "get_lora_id",
            "_GLOBAL_LORA_ID",
        ),
        "vllm/lora/lora_weights.py": (
            "LoRALayerWeights",
            "PackedLoRALayerWeights",
            "LoRAFullModuleWeights",
        ),
        "vllm/lora/lora_model.py": (
            "LoRAModel",
            "MoEEPLoadSpec",
            "_is_remote_expert_key",
            "_EXPERTS_SEPARATOR",
        ),
        "vllm/lora/model_manager.py": ("LoRAModelManager",),
        "vllm/lora/worker_manager.py": ("WorkerLoRAManager",),
    }.items():
        made = cut(root, path, names, have)
        have |= {name: made[name] for name in names}
    return SimpleNamespace(**have, root=root)


def experts_of(root, path):
    """An expert's gate, down and up, as the model's layer of experts or its `get_expert_mapping` has them."""
    wanted = [f"ckpt_{name}_proj_name" for name in ("gate", "down", "up")]
    for node in ast.walk(parse(root, path)):
        found = {k.arg: k.value for k in node.keywords} if isinstance(node, ast.Call) else {}
        if "ckpt_names" in found:
            return ast.literal_eval(found["ckpt_names"])
        if set(wanted) <= set(found):
            return [ast.literal_eval(found[name]) for name in wanted]
    return ["gate_proj", "down_proj", "up_proj"]


def manager_of(vllm, model_type):
    """The manager of adapters, with the modules of a tiny model."""
    name, file, layers = MODELS[model_type]
    path = f"vllm/model_executor/models/{file}.py"
    given = {"WeightsMapper": vllm.WeightsMapper, "re": re}
    # The mapper of the inner model stands in the outer one by its name.
    inner = name.replace("ForCausalLM", "Model")
    given[inner] = SimpleNamespace(
        **attributes(vllm.root, path, inner, ("hf_to_vllm_mapper",), given)
    )
    wanted = ("packed_modules_mapping", "hf_to_vllm_mapper")
    table = attributes(vllm.root, path, name, wanted, given)
    if model_type == "qwen3_vl_moe":
        parent = "Qwen3VLForConditionalGeneration", ("hf_to_vllm_mapper",), given
        table |= attributes(vllm.root, path.replace("_moe", ""), *parent)
    packing = table["packed_modules_mapping"]
    if model_type == "deepseek_v3":
        # Its constructor adds this where queries are compressed.
        packing["fused_qkv_a_proj"] = ["q_a_proj", "kv_a_proj_with_mqa"]
    if model_type not in PACKED:
        gate, down, up = experts_of(vllm.root, path)
        packing["experts"] = [
            f"experts.{number}.{leaf}" for number in range(EXPERTS) for leaf in (gate, down, up)
        ]
    made = object.__new__(vllm.LoRAModelManager)
    made.packed_modules_mapping, made.packed_modules, made.modules = packing, {}, {}
    made.is_pooling_model = made._enable_moe_shared_loras = made._is_non_gated_moe = False
    made._enable_mixed_moe_lora_format = made.supports_mm = made._use_ep = False
    made._is_3d_moe_model = model_type in PACKED
    made._is_moe, made._classification_head = "mlp.experts" in layers, None
    made.moe_ep_load_spec = None
    made.supported_lora_modules = [layer.rpartition(".")[2] for layer in layers]
    made.model = SimpleNamespace(hf_to_vllm_mapper=table.get("hf_to_vllm_mapper"))
    stem = "language_model.model.layers" if "_vl_" in model_type else "model.layers"
    for layer in range(LAYERS):
        for name in layers:
            place = f"{stem}.{layer}.{name}"
            kind = Stacked if model_type in PACKED else Flat
            made.modules[place] = kind() if name.endswith("experts") else object()
            made._register_packed_modules(place)
    return made


def slot(vllm, shape, a, b):
    """Factors as they are in the slot of a plain layer of a shape (out, in)."""
    path = "vllm/lora/layers/base_linear.py"
    given = {"torch": torch, "BaseLayerWithLoRA": object}
    layer = object.__new__(
        cut(vllm.root, path, ("BaseLinearLayerWithLoRA",), given)["BaseLinearLayerWithLoRA"]
    )
    layer.n_slices = layer.tp_size = 1
    layer.lora_a_stacked = (torch.ones(1, 1, len(a), shape[1]),)
    layer.lora_b_stacked = (torch.ones(1, 1, shape[0], len(a)),)
    layer.set_lora(0, a, b)
    return layer.lora_a_stacked[0][0, 0], layer.lora_b_stacked[0][0, 0]


def loaded(vllm, manager, folder, shapes=None):
    """What the server adds, by the name of the part in vLLM; in slots where `shapes` has a layer's."""
    worker = SimpleNamespace(
        _adapter_manager=manager,
        max_position_embeddings=None,
        vocab_size=None,
        _lora_model_cls=vllm.LoRAModel,
        lora_config=SimpleNamespace(max_lora_rank=64, lora_dtype=torch.float32),
    )
    request = SimpleNamespace(lora_path=str(folder), lora_int_id=1, is_3d_lora_weight=False)
    model = vllm.WorkerLoRAManager._load_adapter(worker, request)
    manager._create_merged_loras_inplace(model)
    made = {}
    for place in manager.modules:
        lora = manager._get_lora_layer_weights(model, place)
        if lora is None:
            continue
        parts = manager.packed_modules.get(place, [place])
        if place.endswith("experts") and len(lora.lora_a) == 3:
            for number, (a, b) in enumerate(zip(lora.lora_a, lora.lora_b, strict=True)):
                scale = lora.scaling[number]
                for expert in range(EXPERTS):
                    made[parts[3 * expert + number]] = scale * b[expert] @ a[expert]
        elif place.endswith("experts"):
            for name, a, b in zip(
                ("gate_up_proj", "down_proj"), lora.lora_a, lora.lora_b, strict=True
            ):
                made[f"{place}.{name}"] = b @ a
        elif lora.is_packed:
            for name, a, b in zip(parts, lora.lora_a, lora.lora_b, strict=True):
                if a is not None:
                    made[name] = b @ a
        else:
            a, b = lora.lora_a, lora.lora_b
            if place in (shapes or {}):
                a, b = slot(vllm, shapes[place], a, b)
            made[place] = lora.scaling * b @ a
    return {name: delta.numpy() for name, delta in made.items()}


def run(folder, model_type):
    """The largest difference of what the server adds to what the adapter is."""
    vllm = functions()
    if model_type in PACKED:
        base, lora, wanted = packed(folder, model_type)
        stem = "language_model.model.layers" if "_vl_" in model_type else "model.layers"
        wanted = {f"{stem}.{n}.mlp.experts.{name}": x for (n, name), x in wanted.items()}
    else:
        only = None if model_type == "llama" else r"self_attn|experts"
        base, lora, wanted = adapter(folder, model_type, only=only)
    regraft.convert(lora, folder / "out", to="vllm", model=base)
    manager = manager_of(vllm, model_type)
    mapper = manager.model.hf_to_vllm_mapper
    if mapper is not None and model_type not in PACKED:
        mapper = mapper.get_rename_mapper()
        wanted = {
            mapper.map_name(f"{k}.weight").removesuffix(".weight"): x for k, x in wanted.items()
        }
    got = loaded(vllm, manager, folder / "out")
    assert got.keys() == wanted.keys(), sorted(got.keys() ^ wanted.keys())[:4]
    return max(off(got[name], wanted[name]) for name in wanted)


if __name__ == "__main__":
    main("vLLM", MODELS, run, functions)
