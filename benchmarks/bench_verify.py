"""The certificate of a LoRA at the sizes of Qwen3-30B-A3B: seconds, and the most memory that it takes.

48 layers, 128 experts, every expert projection and attention: 37248 tensors. Both adapters are files, the second one
converted from the first; they are compared in a process of its own, whose peak is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

LAYERS, EXPERTS = 48, 128
HIDDEN, INTERMEDIATE = 2048, 768
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128

ATTENTION = {
    "q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "o_proj": (HIDDEN, HEADS * HEAD_DIM),
}
EXPERT = {
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}
MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": HIDDEN,
    "moe_intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "num_experts": EXPERTS,
}


def make_adapter(folder: Path, rank: int, layers: int) -> None:
    """Write an adapter of random bfloat16 factors, one tensor in memory at a time."""
    folder.mkdir()
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(layers):
        modules = {f"self_attn.{name}": shape for name, shape in ATTENTION.items()}
        for expert in range(EXPERTS):
            modules |= {f"mlp.experts.{expert}.{name}": shape for name, shape in EXPERT.items()}
        for name, (out, into) in modules.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            shapes[f"{path}.lora_A.weight"] = (rank, into)
            shapes[f"{path}.lora_B.weight"] = (out, rank)
    header, at = {}, 0
    for name, shape in sorted(shapes.items()):
        end = at + 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numbers = np.random.default_rng(0)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in sorted(shapes.items()):
            values = numbers.standard_normal(shape, dtype=np.float32)
            file.write(values.astype(ml_dtypes.bfloat16).tobytes())
    config = {"peft_type": "LORA", "peft_version": "0.18.1", "r": rank, "lora_alpha": 2 * rank}
    config |= {"target_modules": [*ATTENTION, *EXPERT]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def verify(first: Path, second: Path, model: Path, budget: float) -> None:
    """Compare two adapters, and print what it took as JSON."""
    from regraft.checking.certificate import verify_adapters

    start = time.perf_counter()
    done = verify_adapters(first, second, model, budget=budget)
    if not done.equal:
        raise SystemExit(f"not equal: {done.differences[0]}")
    figures = {
        "seconds": round(time.perf_counter() - start, 1),
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "targets": len(done.targets),
        "by random vectors": len(done.sampled),
        "largest error": done.error,
    }
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--budgets", type=float, nargs="+", default=[300.0, 0.0])
    parser.add_argument("--pair", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pair:
        verify(*options.pair, options.budgets[0])
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        base = folder / "config.json"
        base.write_text(json.dumps({**MODEL, "num_hidden_layers": options.layers}))
        make_adapter(folder / "v4", options.rank, options.layers)
        convert = "import sys, regraft; regraft.convert(*sys.argv[1:3], to='transformers-v5', model=sys.argv[3])"
        there = [str(folder / "v4"), str(folder / "v5"), str(base)]
        subprocess.run([sys.executable, "-c", convert, *there], check=True)
        size = (folder / "v4" / "adapter_model.safetensors").stat().st_size
        tensors = options.layers * 2 * (len(ATTENTION) + EXPERTS * len(EXPERT))
        print(
            f"{tensors} tensors of rank {options.rank}, {size / 1e6:.0f} MB, {os.cpu_count()} cores"
        )
        for budget in options.budgets:
            arguments = [sys.executable, __file__, "--pair", *there, "--budgets", str(budget)]
            told = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
            print(f"budget {budget:g} s: {told.strip()}")


if __name__ == "__main__":
    main()
