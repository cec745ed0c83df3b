"""Let mlx-lm, torchtune, LitGPT and llama.cpp's converter load, or write, what regraft writes for them.

    python scripts/consumers/llm_tools.py [TOOL ...] [--strict]

A PEFT adapter of a tiny model is converted and loaded by the tool's own functions; what they add to the base's weights
is compared with B A in numpy. llama.cpp's `convert_lora_to_gguf.py`, in the folder LLAMA_CPP, writes the same, and
the tensors are compared. A tool that is not installed is skipped by name; with `--strict` that is a failure.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import regraft
from regraft.storage.safetensors import write_tensors

HEADS, GROUPS, SIZE, INNER, LAYERS, WORDS, EXPERTS = 4, 2, 32, 48, 2, 96, 4
DENSE = {
    "self_attn.q_proj": (HEADS * 8, SIZE),
    "self_attn.k_proj": (GROUPS * 8, SIZE),
    "self_attn.v_proj": (GROUPS * 8, SIZE),
    "self_attn.o_proj": (SIZE, HEADS * 8),
}
MLP = {"mlp.gate_proj": (INNER, SIZE), "mlp.up_proj": (INNER, SIZE), "mlp.down_proj": (SIZE, INNER)}


def config_of(model_type):
    """A tiny config that transformers, mlx-lm and llama.cpp take."""
    from transformers import CONFIG_MAPPING

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
    }
    made = CONFIG_MAPPING[model_type]().to_dict()
    made |= {k: v for k, v in fields.items() if k in made or k == "head_dim"}
    made |= {
        "model_type": model_type,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "rope_scaling": None,
    }
    names = {"qwen3_moe": "Qwen3MoeForCausalLM", "smollm3": "SmolLM3ForCausalLM"}
    made["architectures"] = [names.get(model_type, f"{model_type.title()}ForCausalLM")]
    return made


def modules_of(model_type):
    """The modules of a layer, as transformers 4 names them."""
    if model_type == "mixtral":
        each = {"w1": (INNER, SIZE), "w3": (INNER, SIZE), "w2": (SIZE, INNER)}
        inside = "block_sparse_moe"
    elif model_type == "qwen3_moe":
        each, inside = {k.removeprefix("mlp."): v for k, v in MLP.items()}, "mlp"
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


def with_mlx(folder, model_type):
    """mlx-lm loads the adapter, and fuses it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import load_adapters

    base, lora, wanted = adapter(folder, model_type)
    regraft.convert(lora, folder / "out", to="mlx", model=base)
    module = __import__(f"mlx_lm.models.{model_type}", fromlist=["Model"])
    model = module.Model(module.ModelArgs.from_dict(json.loads((base / "config.json").read_text())))
    mx.eval(model.parameters())
    before = {k: np.array(v) for k, v in tree_flatten(model.parameters())}
    load_adapters(model, str(folder / "out"))
    after = {}
    for name, each in model.named_modules():
        if hasattr(each, "fuse") and hasattr(each, "lora_a"):
            after[name] = np.array(each.fuse().weight) - before[f"{name}.weight"]
    places = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    worst = 0.0
    for path, delta in wanted.items():
        found = re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)", path)
        if found is None:
            got = after[path]
        else:
            got = after[f"{found[1]}.switch_mlp.{places.get(found[3], found[3])}"][int(found[2])]
        worst = max(worst, off(got, delta))
    return worst


def with_torchtune(folder, model_type):
    """torchtune loads the adapter into its LoRA model, and merges it."""
    import torch
    from torchtune.models.convert_weights import tune_to_hf
    from torchtune.models.llama3 import lora_llama3
    from torchtune.modules.peft import get_merged_lora_ckpt

    base, lora, wanted = adapter(folder, model_type, only=r"q_proj|k_proj|up_proj")
    regraft.convert(lora, folder / "out", to="torchtune", model=base)
    said = json.loads((folder / "out/adapter_config.json").read_text())
    model = lora_llama3(
        ["q_proj", "k_proj"],
        apply_lora_to_mlp=True,
        vocab_size=WORDS,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=GROUPS,
        embed_dim=SIZE,
        max_seq_len=64,
        intermediate_dim=INNER,
        lora_rank=said["r"],
        lora_alpha=said["lora_alpha"],
    )
    state = torch.load(folder / "out/adapter_model.pt", weights_only=True)
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys, left.unexpected_keys
    assert not [k for k in left.missing_keys if "lora" in k], left.missing_keys
    before = {k: v.clone() for k, v in model.state_dict().items() if "lora" not in k}
    merged = get_merged_lora_ckpt(model.state_dict(), said["r"], said["lora_alpha"])
    sizes = {"num_heads": HEADS, "num_kv_heads": GROUPS, "dim": SIZE}
    one, two = (tune_to_hf(s, **sizes) for s in (before, merged))
    return max(
        off((two[f"{path}.weight"] - one[f"{path}.weight"]).numpy(), delta)
        for path, delta in wanted.items()
    )


def with_litgpt(folder, model_type):
    """LitGPT loads the adapter into its LoRA model, and merges it."""
    import torch
    import yaml
    from litgpt.lora import GPT, Config, merge_lora_weights

    base, lora, wanted = adapter(folder, model_type, only=r"q_proj|v_proj|o_proj|mlp|moe")
    regraft.convert(lora, folder / "out", to="litgpt", model=base)
    said = yaml.safe_load((folder / "out/hyperparameters.yaml").read_text())
    mixture = model_type != "llama"
    config = Config(
        n_layer=LAYERS,
        n_embd=SIZE,
        n_head=HEADS,
        n_query_groups=GROUPS,
        head_size=8,
        vocab_size=WORDS,
        padded_vocab_size=WORDS,
        intermediate_size=INNER,
        moe_intermediate_size=INNER,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMoE" if mixture else "LLaMAMLP",
        n_expert=EXPERTS if mixture else 0,
        n_expert_per_token=2 if mixture else 0,
        **{k: v for k, v in said.items() if k.startswith("lora_")},
    )
    model = GPT(config)
    state = torch.load(folder / "out/lit_model.pth.lora", weights_only=True)["model"]
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys, left.unexpected_keys
    assert not [k for k in left.missing_keys if "lora" in k], left.missing_keys
    before = {k: v.clone() for k, v in model.state_dict().items()}
    merge_lora_weights(model)
    after = model.state_dict()
    names = {
        "self_attn.o_proj": "attn.proj",
        "mlp.gate_proj": "mlp.fc_1",
        "mlp.up_proj": "mlp.fc_2",
    }
    names |= {
        "mlp.down_proj": "mlp.proj",
        "mlp.gate": "mlp.gate",
        "block_sparse_moe.gate": "mlp.gate",
    }
    rows = {"q_proj": slice(0, HEADS * 8), "v_proj": slice(-GROUPS * 8, None)}
    places = {"w1": "fc_1", "w3": "fc_2", "w2": "proj", "gate_proj": "fc_1", "up_proj": "fc_2"}
    places["down_proj"] = "proj"
    worst = 0.0
    for path, delta in wanted.items():
        _, _, layer, rest = path.split(".", 3)
        taken = slice(None)
        if rest.endswith(("q_proj", "v_proj")):
            name, taken = "attn.qkv", rows[rest.rpartition(".")[2]]
        elif ".experts." in rest:
            number, leaf = rest.split(".")[-2:]
            name = f"mlp.experts.{number}.{places[leaf]}"
        else:
            name = names[rest]
        key = f"transformer.h.{layer}.{name}.linear.weight"
        worst = max(worst, off((after[key] - before[key])[taken].numpy(), delta))
    return worst


def with_llama_cpp(folder, model_type):
    """llama.cpp's own converter writes the same adapter; both files have the same tensors."""
    import gguf

    base, lora, _ = adapter(folder, model_type)
    regraft.convert(lora, folder / "ours.gguf", to="gguf", model=base)
    where = Path(os.environ["LLAMA_CPP"])
    command = [sys.executable, str(where / "convert_lora_to_gguf.py"), str(lora)]
    command += ["--base", str(base), "--outfile", str(folder / "theirs.gguf"), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-600:]
    one, two = (gguf.GGUFReader(str(folder / f"{name}.gguf")) for name in ("ours", "theirs"))
    fields = ("general.architecture", "adapter.lora.alpha", "general.type", "adapter.type")
    for field in fields:
        assert one.fields[field].contents() == two.fields[field].contents(), field
    mine, other = ({t.name: np.array(t.data) for t in each.tensors} for each in (one, two))
    assert mine.keys() == other.keys(), sorted(mine.keys() ^ other.keys())[:4]
    return max(off(mine[name], other[name]) for name in mine)


TOOLS = {
    "mlx-lm": ("mlx_lm", with_mlx, ("llama", "qwen3", "mixtral", "qwen3_moe")),
    "torchtune": ("torchtune", with_torchtune, ("llama",)),
    "litgpt": ("litgpt", with_litgpt, ("llama", "mixtral", "qwen3_moe")),
    "llama.cpp": (
        "gguf",
        with_llama_cpp,
        ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "granite", "smollm3"),
    ),
}


def main():
    """One line for each tool and model."""
    asked = [name for name in sys.argv[1:] if not name.startswith("-")]
    strict, wrong = "--strict" in sys.argv, []
    for tool, (package, run, models) in TOOLS.items():
        if asked and tool not in asked:
            continue
        there = importlib.util.find_spec(package) is not None
        if not there or (tool == "llama.cpp" and "LLAMA_CPP" not in os.environ):
            print(f"{tool:10} skipped: it is not installed")
            wrong += [tool] * strict
            continue
        for model_type in models:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    error = run(Path(folder), model_type)
                except Exception as problem:
                    # Whatever a tool raises is its verdict on what it was given.
                    error, why = None, f"{type(problem).__name__}: {str(problem)[:300]}"
            fine = error is not None and error < 1e-5
            wrong += [] if fine else [f"{tool} {model_type}"]
            print(
                f"{tool:10} {model_type:12} {f'off by {error:.1e}' if error is not None else why}"
            )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
