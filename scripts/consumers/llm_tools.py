"""Let mlx-lm, torchtune, LitGPT and llama.cpp's converter load, or write, what regraft writes for them.

    python scripts/consumers/llm_tools.py [TOOL ...] [--strict]

A PEFT adapter of a tiny model is converted and loaded by the tool's own functions; what they add to the base's weights
is compared with B A in numpy. llama.cpp's `convert_lora_to_gguf.py`, from the folder LLAMA_CPP or a pinned archive,
writes the same, and the tensors are compared. A tool that is not there is skipped by name; with `--strict` that is a
failure.
"""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from shared.pinned import NotThereError, archive
from shared.running import rows
from shared.tiny import GROUPS, HEADS, INNER, LAYERS, SIZE, WORDS, adapter, off

import regraft


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


def torchtune_of(model_type):
    """The builder of a model type's LoRA model, and what turns its weights into transformers' names.

    As `FullModelHFCheckpointer` of torchtune 0.6.1 chooses it: Qwen2's rows are not permuted.
    """
    from torchtune.models import convert_weights, gemma, gemma2, llama3, mistral, phi3, qwen2
    from torchtune.models.gemma2 import _convert_weights as of_gemma2
    from torchtune.models.phi3 import _convert_weights as of_phi3
    from torchtune.models.qwen2 import _convert_weights as of_qwen2

    def phi3_to_hf(state, **_):
        return of_phi3.phi3_tune_to_hf(state)

    return {
        "llama": (llama3.lora_llama3, convert_weights.tune_to_hf),
        "mistral": (mistral.lora_mistral, convert_weights.tune_to_hf),
        "gemma": (gemma.lora_gemma, convert_weights.tune_to_hf),
        "gemma2": (gemma2.lora_gemma2, of_gemma2.gemma2_tune_to_hf),
        "qwen2": (qwen2.lora_qwen2, of_qwen2.qwen2_tune_to_hf),
        "phi3": (phi3.lora_phi3, phi3_to_hf),
    }[model_type]


def with_torchtune(folder, model_type):
    """torchtune loads the adapter into its LoRA model, and merges it."""
    import torch
    from torchtune.modules.peft import get_merged_lora_ckpt

    build, to_hf = torchtune_of(model_type)
    base, lora, wanted = adapter(folder, model_type, only=r"q_proj|k_proj|qkv_proj|up_proj")
    regraft.convert(lora, folder / "out", to="torchtune", model=base)
    said = json.loads((folder / "out/adapter_config.json").read_text())
    fused = model_type == "phi3"
    model = build(
        ["q_proj", "k_proj", *["v_proj"] * fused],
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
        **({"head_dim": 8} if model_type.startswith("gemma") else {}),
    )
    state = torch.load(folder / "out/adapter_model.pt", weights_only=True)
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys, left.unexpected_keys
    assert not [k for k in left.missing_keys if "lora" in k], left.missing_keys
    before = {k: v.clone() for k, v in model.state_dict().items() if "lora" not in k}
    merged = get_merged_lora_ckpt(model.state_dict(), said["r"], said["lora_alpha"])
    sizes = {"num_heads": HEADS, "num_kv_heads": GROUPS, "dim": SIZE}
    one, two = (to_hf(s, **sizes) for s in (before, merged))
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
    # As `litgpt merge_lora` makes it.
    switches = {k: v for k, v in said.items() if k.startswith("lora_")}
    config = Config.from_file(folder / "out/model_config.yaml", **switches)
    config.padded_vocab_size = WORDS
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


def llama_cpp():
    """The folder of llama.cpp: LLAMA_CPP, or the one in the archive of llama-cpp-python."""
    given = os.environ.get("LLAMA_CPP")
    return Path(given) if given else archive("llama-cpp-python", source=True) / "vendor/llama.cpp"


def with_llama_cpp(folder, model_type):
    """llama.cpp's own converter writes the same adapter; both files have the same tensors."""
    import gguf

    base, lora, _ = adapter(folder, model_type)
    regraft.convert(lora, folder / "ours.gguf", to="gguf", model=base)
    command = [sys.executable, str(llama_cpp() / "convert_lora_to_gguf.py"), str(lora)]
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


TORCHTUNE_TYPES = ("llama", "mistral", "gemma", "gemma2", "qwen2", "phi3")
TOOLS = {
    "mlx-lm": ("mlx_lm", with_mlx, ("llama", "qwen3", "mixtral", "qwen3_moe")),
    "torchtune": ("torchtune", with_torchtune, TORCHTUNE_TYPES),
    "litgpt": ("litgpt", with_litgpt, ("llama", "mixtral", "qwen3_moe")),
    "llama.cpp": (
        "gguf",
        with_llama_cpp,
        ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "granite", "smollm3"),
    ),
}


def ready(tool, package):
    """Raises `NotThereError` where a tool is not installed."""
    if importlib.util.find_spec(package) is None:
        raise NotThereError("it is not installed")
    if tool == "llama.cpp":
        llama_cpp()


def main():
    """One line for each tool and model."""
    asked = [name for name in sys.argv[1:] if not name.startswith("-")]
    wrong = []
    for tool, (package, run, models) in TOOLS.items():
        if not asked or tool in asked:
            wrong += rows(tool, models, run, functools.partial(ready, tool, package))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
