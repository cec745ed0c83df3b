"""Learning a rule book from ordinary checkpoints of a gigabyte: seconds, and the memory that it takes.

A llama in bfloat16 with random weights, and the same with qkv fused by group, gate and up fused, rows of q and k in
another order, and other names. Memory is that of a process of its own, without the pages of the files that it maps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from regraft.storage.safetensors import write_tensors

MOST_SECONDS, MOST_MB = 60, 500
CONFIG = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 5632,
    "vocab_size": 32000,
}

LEARN = """
import sys, time
from regraft.learning.learn import Pair, learn_pairs
began = time.perf_counter()
found = learn_pairs([Pair.of(sys.argv[1], sys.argv[2])], layouts=("old", "new"))
seconds = time.perf_counter() - began
peak = dict(line.split(":") for line in open("/proc/self/status"))["VmHWM"]
print(seconds, found.sound, found.explained, found.total, len(found.book.rules), peak.split()[0])
"""


def write_pair(folder: Path, gigabytes: float) -> int:
    """Both checkpoints; how many bytes one has."""
    random = np.random.default_rng(1)
    h, kv = CONFIG["hidden_size"], CONFIG["num_key_value_heads"]
    d, m = CONFIG["head_dim"], CONFIG["intermediate_size"]
    q = CONFIG["num_attention_heads"] * d
    shapes = {
        "self_attn.q_proj": (q, h),
        "self_attn.k_proj": (kv * d, h),
        "self_attn.o_proj": (h, q),
    }
    shapes |= {"self_attn.v_proj": (kv * d, h), "mlp.gate_proj": (m, h), "mlp.up_proj": (m, h)}
    shapes |= {"mlp.down_proj": (h, m), "input_layernorm": (h,), "post_attention_layernorm": (h,)}

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32).astype(ml_dtypes.bfloat16)

    before = {"model.embed_tokens.weight": draw((CONFIG["vocab_size"], h))}
    after = {"tok.weight": before["model.embed_tokens.weight"]}
    layer = 0
    while sum(t.nbytes for t in before.values()) < gigabytes * 1e9:
        p, n = f"model.layers.{layer}.", f"blocks.{layer}."
        made = {name: draw(shape) for name, shape in shapes.items()}
        before |= {f"{p}{name}.weight": t for name, t in made.items()}
        parts = [made[f"self_attn.{x}_proj"].reshape(kv, -1, d, h) for x in "qkv"]
        parts = [np.concatenate([x[:, :, 0::2], x[:, :, 1::2]], 2) for x in parts[:2]] + parts[2:]
        after[n + "qkv"] = np.concatenate(parts, 1).reshape(-1, h)
        after[n + "gate_up"] = np.concatenate([made["mlp.gate_proj"], made["mlp.up_proj"]])
        after[n + "down"] = np.ascontiguousarray(made["mlp.down_proj"].T)
        after[n + "out"] = made["self_attn.o_proj"]
        after[n + "norm1"] = made["input_layernorm"]
        after[n + "norm2"] = made["post_attention_layernorm"]
        layer += 1
    for name, tensors in (("before", before), ("after", after)):
        (folder / name).mkdir()
        write_tensors(folder / name / "model.safetensors", tensors, {"format": "pt"})
        (folder / name / "config.json").write_text(
            json.dumps({**CONFIG, "num_hidden_layers": layer})
        )
    return sum(t.nbytes for t in before.values())


def main() -> None:
    """Write a pair, learn from it, print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        size = write_pair(folder, given.gigabytes)
        began = time.perf_counter()
        code = [sys.executable, "-c", LEARN, str(folder / "before"), str(folder / "after")]
        child = subprocess.Popen(code, stdout=subprocess.PIPE, text=True)
        held = 0
        while child.poll() is None:
            try:
                lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
            except OSError:
                break
            own = [int(x.split()[1]) for x in lines if x.startswith("RssAnon:")]
            held = max(held, *own, 0)
            time.sleep(0.02)
        out = child.communicate()[0].split()
        seconds = time.perf_counter() - began
    ok = seconds <= MOST_SECONDS and held / 1024 <= MOST_MB and out[1:2] == ["True"]
    print(
        f"{size / 1e9:.2f} GB each: {seconds:.1f} s (at most {MOST_SECONDS}), {held / 1024:.0f} MB (at most {MOST_MB})"
    )
    print(
        f"sound {out[1]}, {out[2]} of {out[3]} tensors explained by {out[4]} rules; {'ok' if ok else 'MISSED'}"
    )


if __name__ == "__main__":
    main()
