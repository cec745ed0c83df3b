"""Let SGLang's own loader take what regraft writes for it: its functions, unchanged, without the package.

    python scripts/consumers/sglang_functions.py [--strict]

`LoRAConfig` and `LoRAAdapter` read the two files and join the parts, and `LoRAMemoryPool` copies them into the buffers
that its kernels read. What the buffers hold is multiplied, and compared with B A of the adapter that was converted.
Layers and kernels are not run.
"""

import json
import logging
import os
import re
import typing
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from shared.pinned import Quiet, archive, cut, stand_in
from shared.running import main
from shared.tiny import DENSE, EXPERTS, INNER, LATENT, LAYERS, MLP, SIZE, WORDS, adapter, off

import regraft

MODELS = ("llama", "mixtral", "qwen3_moe", "deepseek_v3")
# What is joined in one buffer, in its order.
JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
SIZES = {name.rpartition(".")[2]: size for name, size in (DENSE | MLP | LATENT).items()}

# What its sizes of buffers are told by; the numbers make no difference here.
SHAPE = dict.fromkeys(
    (
        *("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads", "v_head_dim"),
        *("intermediate_size", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim"),
        *("qk_nope_head_dim", "vocab_size"),
    ),
    8,
)


class Whole:
    """Stands for a layer in one process: nothing is cut."""

    def __init__(self):
        self.base_layer = SimpleNamespace(is_shared_fused_moe=False, moe_tp_rank=0)

    def slice_lora_a_weights(self, tensor, *_):
        """All of it."""
        return tensor

    slice_lora_b_weights = slice_moe_lora_a_weights = slice_moe_lora_b_weights = (
        slice_lora_a_weights
    )


class Experts(Whole):
    """Stands for a layer of experts."""


def functions():
    """SGLang's functions by name."""
    root = archive("sglang")
    have = {"torch": torch, "nn": torch.nn, "os": os, "re": re, "json": json}
    have |= {
        "AutoConfig": object,
        "logging": logging,
        "logger": Quiet(),
        "_SGLANG_EXPERIMENTAL_LORA_OPTI": False,
    }
    have |= {name: getattr(typing, name) for name in ("Dict", "List", "Optional", "Set", "Tuple")}
    have |= {name: getattr(typing, name) for name in ("Iterable", "Iterator", "Union", "overload")}
    for path, names in {
        "layers/utils/common.py": ("get_layer_id",),
        "lora/lora_config.py": ("LoRAConfig",),
        "lora/utils.py": (
            "get_normalized_target_modules",
            "get_stacked_multiply",
            "get_hidden_dim",
            "get_default_hidden_dim",
            "DSA_INDEXER_LORA_NAMES",
            "get_target_module_name",
            "copy_weight_into_buffer",
        ),
        "lora/lora.py": ("LoRALayer", "LoRAAdapter", "_ROUTED_EXPERT_PATTERN"),
        "lora/mem_pool.py": ("LoRAMemoryPool", "append_cache_key_suffix"),
    }.items():
        made = cut(root, f"sglang/srt/{path}", names, have)
        have |= {name: made[name] for name in names}
    # Two functions import from the package as they are called.
    stand_in("sglang.srt.lora.utils", have)
    stand_in("sglang.srt.lora.layers", {"FusedMoEWithLoRA": Experts})
    return SimpleNamespace(**have)


def parts_of(name):
    """The parts of a buffer."""
    return JOINED.get(name.removesuffix("_moe"), (name.removesuffix("_moe"),))


def buffers(model_type, rank):
    """Empty buffers (A, B) by name, and a layer's modules by path: for a tiny model of a type."""
    dense = set(DENSE if model_type != "deepseek_v3" else LATENT)
    dense |= set(MLP) if model_type == "llama" else set()
    leaves = {name.rpartition(".")[2] for name in dense}
    names = {joined for joined, parts in JOINED.items() if set(parts) <= leaves}
    names |= leaves - {part for name in names for part in JOINED[name]}
    a, b, modules = {}, {}, {}
    for name in sorted(names):
        parts = parts_of(name)
        rows = sum(SIZES[part][0] for part in parts)
        a[name] = [torch.full((1, rank * len(parts), SIZES[parts[0]][1]), 9.0)] * 1
        b[name] = [torch.full((1, rows, rank), 9.0)]
        modules[f"self_attn.{name}"] = Whole()
    if model_type != "llama":
        a["gate_up_proj_moe"] = [torch.full((1, EXPERTS, 2 * rank, SIZE), 9.0)]
        b["gate_up_proj_moe"] = [torch.full((1, EXPERTS, 2 * INNER, rank), 9.0)]
        a["down_proj_moe"] = [torch.full((1, EXPERTS, rank, INNER), 9.0)]
        b["down_proj_moe"] = [torch.full((1, EXPERTS, SIZE, rank), 9.0)]
        modules["mlp.experts"] = Experts()
    for each in (a, b):
        for name in each:
            each[name] = [each[name][0].clone() for _ in range(LAYERS)]
    return a, b, modules


def loaded(sglang, folder, model_type, *, strict=True, targets=None):
    """What the server adds, by layer and by the part's name, (experts first where there are experts).

    `strict` is its flag; `targets` are the modules that it has buffers for, those of the file if nothing is said.
    """
    config = sglang.LoRAConfig(path=str(folder), base_vocab_size=WORDS)
    made = SimpleNamespace(num_hidden_layers=LAYERS, vocab_size=WORDS, architectures=[])
    shape = SimpleNamespace(**SHAPE)
    for name in sglang.get_normalized_target_modules(config.target_modules):
        sglang.get_hidden_dim(name, shape, None, 0)  # raises where there is no buffer of this name
    lora = sglang.LoRAAdapter("one", config, made, None, None)
    lora.initialize_weights_from_tensors(load_file(folder / "adapter_model.safetensors"))
    pool = object.__new__(sglang.LoRAMemoryPool)
    pool.A_buffer, pool.B_buffer, modules = buffers(model_type, config.r)
    if targets is not None:
        for each in (pool.A_buffer, pool.B_buffer):
            for name in [n for n in each if n.removesuffix("_moe") not in targets]:
                del each[name]
    pool.num_layer, pool.max_lora_rank, pool.tp_rank, pool.tp_size = LAYERS, config.r, 0, 1
    pool.target_modules = {name.removesuffix("_moe") for name in pool.A_buffer}
    pool.base_hf_config, pool.base_model, pool.strict_loading = made, None, strict
    pool.experts_shared_outer_loras = pool.moe_use_local_expert_ids = False
    pool.pin_memory_available = pool.enable_lora_overlap_loading = False
    pool.embedding_A_buffer = pool.embedding_B_buffer = {}
    pool.lm_head_A_buffer = pool.lm_head_B_buffer = pool.new_embeddings_buffer = {}
    pool.lora_added_tokens_size = 0
    pool.load_lora_weight_to_buffer("one", 0, lora, [modules] * LAYERS, None, None)
    found = {}
    for layer in range(LAYERS):
        for name in pool.A_buffer:
            row = 0
            for number, part in enumerate(parts_of(name)):
                size = INNER if part in ("gate_proj", "up_proj") else SIZES[part][0]
                here = slice(number * config.r, (number + 1) * config.r)
                a = pool.A_buffer[name][layer][0][..., here, :]
                b = pool.B_buffer[name][layer][0][..., row : row + size, :]
                # The scale of experts is in B already; that of other layers is given to the kernel.
                scale = 1.0 if name.endswith("_moe") else lora.scaling
                found[layer, name.endswith("_moe"), part] = (scale * b @ a).numpy()
                row += size
    return found


def run(folder, model_type):
    """The largest difference of what the server adds to what the adapter is."""
    sglang = functions()
    # The router is no layer that it adapts.
    base, lora, wanted = adapter(folder, model_type, only=r"self_attn|experts|mlp\.\w+_proj")
    regraft.convert(lora, folder / "out", to="sglang", model=base)
    got = loaded(sglang, folder / "out", model_type)
    places = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    worst, seen = 0.0, set()
    for path, delta in wanted.items():
        layer, leaf = int(path.split(".")[2]), path.rpartition(".")[2]
        leaf, expert = places.get(leaf, leaf), re.search(r"experts\.(\d+)", path)
        key = layer, expert is not None, leaf
        seen.add(key)
        worst = max(worst, off(got[key] if expert is None else got[key][int(expert[1])], delta))
    assert seen == got.keys(), sorted(got.keys() - seen)[:4]
    return worst


if __name__ == "__main__":
    main("SGLang", MODELS, run, functions)
