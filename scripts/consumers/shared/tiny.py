"""Tiny adapters of language models, and what they add to the base's weights."""

import json
import re

import numpy as np

from regraft.storage.safetensors import write_tensors

HEADS, GROUPS, SIZE, INNER, LAYERS, WORDS, EXPERTS = 4, 2, 32, 48, 2, 96, 4
DENSE = {
    "self_attn.q_proj": (HEADS * 8, SIZE),
    "self_attn.k_proj": (GROUPS * 8, SIZE),
    "self_attn.v_proj": (GROUPS * 8, SIZE),
    "self_attn.o_proj": (SIZE, HEADS * 8),
}
MLP = {"mlp.gate_proj": (INNER, SIZE), "mlp.up_proj": (INNER, SIZE), "mlp.down_proj": (SIZE, INNER)}
# DeepSeek's compressed attention, with the sizes of `config_of`.
LATENT = {
    "self_attn.q_a_proj": (16, SIZE),
    "self_attn.q_b_proj": (HEADS * 12, 16),
    "self_attn.kv_a_proj_with_mqa": (20, SIZE),
    "self_attn.o_proj": (SIZE, HEADS * 8),
}


def config_of(model_type):
    """A tiny config that transformers, mlx-lm and llama.cpp take."""
    from transformers import CONFIG_MAPPING

    if model_type == "qwen3_vl_moe":
        made = CONFIG_MAPPING[model_type]().to_dict()
        inner = config_of("qwen3_moe") | {"model_type": "qwen3_vl_moe_text"}
        return made | {"text_config": inner, "architectures": [class_of(model_type)]}
    fields = {
        "hidden_size": SIZE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": 8,
        "intermediate_size": INNER,
        "moe_intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "vocab_size": WORDS,
        "tie_word_embeddings": False,
        "max_position_embeddings": 128,
        "num_experts": EXPERTS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "n_routed_experts": EXPERTS,
        "first_k_dense_replace": 0,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    made = CONFIG_MAPPING[model_type]().to_dict()
    made |= {
        k: v
        for k, v in fields.items()
        if k in made or k == "head_dim" or (k == "num_experts" and "moe" in model_type)
    }
    made |= {
        "model_type": model_type,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "rope_scaling": None,
    }
    made["architectures"] = [class_of(model_type)]
    return made


def class_of(model_type):
    """The class that transformers has for a model type."""
    from transformers.models.auto import modeling_auto as auto

    names = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return names[model_type]


def modules_of(model_type):
    """The modules of a layer, as transformers 4 names them."""
    if model_type == "mixtral":
        each = {"w1": (INNER, SIZE), "w3": (INNER, SIZE), "w2": (SIZE, INNER)}
        inside = "block_sparse_moe"
    elif model_type == "qwen3_moe":
        each, inside = {k.removeprefix("mlp."): v for k, v in MLP.items()}, "mlp"
    elif model_type == "deepseek_v3":
        each, inside = {k.removeprefix("mlp."): v for k, v in MLP.items()}, "mlp"
        experts = {f"mlp.experts.{e}.{n}": s for e in range(EXPERTS) for n, s in each.items()}
        return LATENT | experts
    elif model_type == "phi3":
        fused = {"self_attn.qkv_proj": ((HEADS + 2 * GROUPS) * 8, SIZE)}
        return fused | {"mlp.gate_up_proj": (2 * INNER, SIZE), "mlp.down_proj": (SIZE, INNER)}
    else:
        return DENSE | MLP
    experts = {f"{inside}.experts.{e}.{n}": s for e in range(EXPERTS) for n, s in each.items()}
    return DENSE | experts | {f"{inside}.gate": (EXPERTS, SIZE)}


def adapter(folder, model_type, rank=4, only=None):
    """A base's folder, a PEFT adapter's, and what it adds, by the names of transformers 4."""
    random, tensors, wanted = np.random.default_rng(3), {}, {}
    (folder / "base").mkdir(parents=True)
    (folder / "base/config.json").write_text(json.dumps(config_of(model_type)))
    (folder / "lora").mkdir()
    names = []
    for layer in range(LAYERS):
        for name, (out, into) in modules_of(model_type).items():
            if only is not None and not re.search(only, name):
                continue
            path = f"model.layers.{layer}.{name}"
            a, b = (random.integers(-9, 9, s) / 16 for s in ((rank, into), (out, rank)))
            wanted[path] = 2.0 * b @ a
            tensors[f"base_model.model.{path}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"base_model.model.{path}.lora_B.weight"] = b.astype(np.float32)
            names.append(path)
    write_tensors(folder / "lora/adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": names}
    config |= {"peft_version": "0.18.0", "task_type": "CAUSAL_LM", "base_model_name_or_path": None}
    (folder / "lora/adapter_config.json").write_text(json.dumps(config))
    return folder / "base", folder / "lora", wanted


def off(got, wanted):
    """The largest difference, relative to the largest entry."""
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def packed(folder, model_type, rank=2):
    """The same for experts as PEFT packs them since 0.19; what is added to parameter p of layer l is at (l, p).

    What is added has the shape (experts, out, in), with the rows in the order of the base.
    """
    random, tensors, wanted = np.random.default_rng(3), {}, {}
    (folder / "base").mkdir(parents=True)
    (folder / "base/config.json").write_text(json.dumps(config_of(model_type)))
    (folder / "lora").mkdir()
    stem = "model.language_model.layers" if "_vl_" in model_type else "model.layers"
    sizes = {"gate_up_proj": (2 * INNER, SIZE), "down_proj": (SIZE, INNER)}
    for layer in range(LAYERS):
        for name, (out, into) in sizes.items():
            place = f"base_model.model.{stem}.{layer}.mlp.experts"
            place += ".base_layer" * (name == "gate_up_proj")
            a = random.integers(-9, 9, (EXPERTS, rank, into)) / 16
            b = random.integers(-9, 9, (EXPERTS, out, rank)) / 16
            wanted[layer, name] = 2.0 * b @ a
            one, two = a.reshape(-1, into), b.transpose(1, 2, 0).reshape(out, -1)
            tensors[f"{place}.lora_A.weight"] = one.astype(np.float32)
            tensors[f"{place}.lora_B.weight"] = two.astype(np.float32)
    write_tensors(folder / "lora/adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": []}
    config["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config |= {"peft_version": "0.21.2", "task_type": "CAUSAL_LM", "base_model_name_or_path": None}
    (folder / "lora/adapter_config.json").write_text(json.dumps(config))
    return folder / "base", folder / "lora", wanted
