"""Compare the rule books for mlx-lm, torchtune, LitGPT and Megatron with what these tools make of labelled weights.

Every model type that a book names is built small by transformers, its tensors are filled with labels, the tool's own
function converts them, and so does the book; then back. Run it where the tool is installed:

    pip install mlx-lm==0.32.2 mlx==0.32.4 mlx-cpu==0.32.4    python scripts/learn/tool_books.py mlx
    pip install torchtune==0.6.1 torchao==0.9.0               python scripts/learn/tool_books.py torchtune
    pip install litgpt==0.5.13                                python scripts/learn/tool_books.py litgpt
    pip install --no-deps --target WHERE megatron-bridge==0.3.1
                                         PYTHONPATH=WHERE python scripts/learn/tool_books.py megatron
"""

import sys
from importlib import import_module
from pathlib import Path

import numpy as np

from regraft.arrays.apply import apply_plan
from regraft.bridges.transformers.probing import outline_of
from regraft.layouts.graph import Edge
from regraft.learning.probe import labels
from regraft.learning.shrink import shrink
from regraft.names.keys import group_names
from regraft.planning.build import build_plan
from regraft.planning.model import ModelConfig
from regraft.planning.plan import Headers
from regraft.rules.book import library

CONFIGS = {
    "llama": {"num_key_value_heads": 8, "tie_word_embeddings": False},
    "mistral": {"num_key_value_heads": 8},
    "mixtral": {"num_key_value_heads": 8, "num_local_experts": 8},
    "phi3": {"num_key_value_heads": 8, "pad_token_id": 0},
    "qwen3_moe": {"num_experts": 8, "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": 8},
    "olmoe": {"num_experts": 8},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "glm4_moe": {"n_routed_experts": 8, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}
MLX_WANTS = {"rope_theta": 10000.0, "rope_scaling": None, "partial_rotary_factor": 0.5}
"""Fields that mlx-lm wants and transformers 5 keeps elsewhere."""
LITGPT_NAMES = {"gemma2": "gemma-2", "gemma3_text": "gemma-3", "phi": "phi-2", "phi3": "Phi-3"}


def small_config(model_type):
    """A config of a type, with sizes that tell axes apart."""
    from transformers import CONFIG_MAPPING

    data = CONFIG_MAPPING[model_type]().to_dict()
    data |= {"model_type": model_type, **CONFIGS.get(model_type, {})}
    made = shrink(data, 0)
    if "text_config" in made:
        made["text_config"] = fitted(made["text_config"])
        return made
    return fitted(made) | {
        name: value for name, value in MLX_WANTS.items() if made.get(name) is None
    }


def fitted(made):
    """Head counts and sizes that a model can have."""
    model_type = made["model_type"]
    if model_type == "phi3":
        made["rope_scaling"] = None
    if (
        made.get("num_key_value_heads")
        and made["num_attention_heads"] % made["num_key_value_heads"]
    ):
        made["num_key_value_heads"] = made["num_attention_heads"] // 2
    if made.get("head_dim") and made["head_dim"] % 2:
        made["head_dim"] += 1
    if not made.get("head_dim"):
        made["hidden_size"] = made["num_attention_heads"] * 8
        made["head_dim"] = 8
    return made


def through_mlx(state, config):
    """mlx-lm's own way from a file's weights to the model's."""
    import mlx.core as mx

    module = import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    weights = {key: mx.array(array) for key, array in state.items()}
    made = model.sanitize(weights) if hasattr(model, "sanitize") else weights
    return {key: np.array(array) for key, array in made.items()}


def through_torchtune(state, config):
    """torchtune's, as its checkpointer chooses it."""
    import torch
    from torchtune.models import convert_weights
    from torchtune.models.gemma2._convert_weights import gemma2_hf_to_tune
    from torchtune.models.phi3._convert_weights import phi3_hf_to_tune
    from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune

    weights = {key: torch.from_numpy(array) for key, array in state.items()}
    sizes = {
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "dim": config["hidden_size"],
    }
    kind = config["model_type"]
    if kind == "phi3":
        made = phi3_hf_to_tune(weights, **sizes)
    else:
        made = {"gemma2": gemma2_hf_to_tune, "qwen2": qwen2_hf_to_tune}.get(
            kind, convert_weights.hf_to_tune
        )(weights, head_dim=config.get("head_dim"), **sizes)
    return {key: tensor.numpy() for key, tensor in made.items()}


def through_litgpt(state, config):
    """LitGPT's, as its script chooses it."""
    from functools import partial
    from types import SimpleNamespace

    import torch
    from litgpt.scripts import convert_hf_checkpoint as script

    kind, qkv = config["model_type"], {}
    mlp = "LLaMAMoE" if kind in ("mixtral", "qwen3_moe") else "LLaMAMLP"
    about = SimpleNamespace(mlp_class_name=mlp, name=LITGPT_NAMES.get(kind, kind))
    copy = {
        "gemma2": partial(script.copy_weights_gemma_2, qkv),
        "gemma3_text": partial(script.copy_weights_gemma_3, qkv, config=about),
        "phi": partial(script.copy_weights_phi, about, qkv),
        "phi3": partial(script.copy_weights_phi, about, qkv),
        "qwen2": partial(script.copy_weights_qwen_2_5, about, qkv),
        "qwen3": partial(script.copy_weights_qwen_3, about, qkv),
        "qwen3_moe": partial(script.copy_weights_qwen_3, about, qkv),
    }.get(kind, partial(script.copy_weights_hf_llama, about, qkv))
    made = {}
    copy(made, {key: torch.from_numpy(array) for key, array in state.items()}, debug_mode=False)
    return {key: tensor.numpy() for key, tensor in made.items()}


def through_megatron(state, config):
    """Megatron-Bridge's mappings on one rank, with stand-ins for what wants a GPU; see megatron_books."""
    import megatron_books
    import torch

    kind = config["model_type"]
    where = next(Path(p) for p in sys.path if (Path(p) / "megatron" / "bridge").is_dir())
    if not any(isinstance(each, megatron_books.StandIns) for each in sys.meta_path):
        sys.meta_path.insert(0, megatron_books.StandIns(where))
    weights = {key: torch.from_numpy(array) for key, array in state.items()}
    made = megatron_books.converter(kind, config)(weights)
    # Two of its names for the norm before an MLP; which one a layer has is for the layer to say, and a dense one fuses.
    dense = range(config["first_k_dense_replace"]) if kind == "deepseek_v3" else ()
    for layer in dense:
        at = f"decoder.layers.{layer}."
        made[f"{at}mlp.linear_fc1.layer_norm_weight"] = made.pop(f"{at}pre_mlp_layernorm.weight")
    return {key: tensor.numpy() for key, tensor in made.items()}


TOOLS = {
    "mlx": through_mlx,
    "torchtune": through_torchtune,
    "litgpt": through_litgpt,
    "megatron": through_megatron,
}


def along(book, layout, state, config):
    """A state dict along one book."""
    names, arrays = list(state), list(state.values())
    headers = Headers(group_names(names), [a.shape for a in arrays], [a.dtype.name for a in arrays])
    scopes = {book.name: ModelConfig(config, "config.json").scope_of(book.model_types)}
    plan = build_plan(headers, [Edge.to(book, layout)], scopes=scopes)
    return apply_plan(plan, arrays)


def judge(tool, book, model_type):
    """What differs between the tool and the book, both ways."""
    config = small_config(model_type)
    outline = outline_of(config, model_type, book.left)
    skipped = {a for a in outline.shapes if any_absent(book, a)}
    shapes = {k: s for k, s in outline.shapes.items() if k not in skipped}
    state = labels(shapes, 1)
    if config.get("tie_word_embeddings"):
        state.pop("lm_head.weight", None)
    wanted = TOOLS[tool](dict(state), config)
    if tool == "litgpt" and "lm_head.weight" not in state:
        wanted.pop("lm_head.weight", None)
    made = along(book, book.right, state, config)
    if made.keys() != wanted.keys():
        return f"other names: {sorted(made.keys() ^ wanted.keys())[:6]}"
    odd = [k for k in wanted if not np.array_equal(made[k], wanted[k])]
    if odd:
        return f"other numbers: {odd[:6]}"
    back = along(book, book.left, made, config)
    same = back.keys() == state.keys() and all(np.array_equal(back[k], state[k]) for k in state)
    return "equal, both ways" if same else "not the same back"


def any_absent(book, key):
    """Whether the target has no place for a key."""
    from regraft.rules.templates import match_group

    (group,) = group_names([key])
    return any(match_group(absent.key, group) is not None for absent in book.absents)


def main():
    """Print one line for each model type."""
    tool, only = sys.argv[1], sys.argv[2:]
    for book in library():
        if book.right != tool:
            continue
        for model_type in book.model_types:
            if (only and model_type not in only) or model_type.endswith(("_vision", "vl_text")):
                continue
            try:
                verdict = judge(tool, book, model_type)
            except Exception as error:
                # A model that the tool or transformers does not build so small is no question to the book.
                verdict = f"not compared: {type(error).__name__}: {str(error)[:200]}"
            print(f"{tool:10} {book.name:18} {model_type:14} {verdict}", flush=True)


if __name__ == "__main__":
    main()
