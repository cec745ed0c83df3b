"""Checkpoints of random numbers for the benchmarks, made one tensor at a time.

python benchmarks/made.py mixtral FOLDER --gb 2.2
"""

import argparse
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np

SHARD = 500_000_000
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "model_type": "mixtral",
    "num_attention_heads": 16,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
GRANITE = {
    **MIXTRAL,
    "architectures": ["GraniteMoeForCausalLM"],
    "intermediate_size": 3584,
    "model_type": "granitemoe",
    "num_local_experts": 16,
}

SMALL_MIXTRAL = {
    **MIXTRAL,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "max_position_embeddings": 512,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
}
"""A layer of it has 182 MB, so that 1.1 GB are six of them."""
QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "head_dim": 32,
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 128,
    "num_attention_heads": 8,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "vocab_size": 8000,
}
"""As many tensors as Qwen3-30B-A3B has, and each of them tiny."""


def qwen_shapes(config, layers):
    hidden, inner, width = (config[k] for k in ("hidden_size", "moe_intermediate_size", "head_dim"))
    queries, values = (config[f"num_{k}_heads"] * width for k in ("attention", "key_value"))
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, rows in (("q", queries), ("k", values), ("v", values)):
            yield f"{at}self_attn.{name}_proj.weight", (rows, hidden)
        yield f"{at}self_attn.o_proj.weight", (hidden, queries)
        for name in ("q", "k"):
            yield f"{at}self_attn.{name}_norm.weight", (width,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{name}.weight", (hidden,)
        yield at + "mlp.gate.weight", (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            inside = f"{at}mlp.experts.{expert}."
            yield inside + "gate_proj.weight", (inner, hidden)
            yield inside + "up_proj.weight", (inner, hidden)
            yield inside + "down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def shapes_of(config, layers):
    hidden, inner, experts = (
        config[k] for k in ("hidden_size", "intermediate_size", "num_local_experts")
    )
    values = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", values), ("v", values), ("o", hidden)):
            yield f"{at}self_attn.{name}_proj.weight", (rows, hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{name}.weight", (hidden,)
        moe = at + "block_sparse_moe."
        if config["model_type"] == "granitemoe":
            yield moe + "router.layer.weight", (experts, hidden)
            yield moe + "input_linear.weight", (experts, 2 * inner, hidden)
            yield moe + "output_linear.weight", (experts, hidden, inner)
            continue
        yield moe + "gate.weight", (experts, hidden)
        for expert in range(experts):
            yield f"{moe}experts.{expert}.w1.weight", (inner, hidden)
            yield f"{moe}experts.{expert}.w2.weight", (hidden, inner)
            yield f"{moe}experts.{expert}.w3.weight", (inner, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def make(folder, config, gigabytes, holes=False):
    """A checkpoint of about a size; see `write`."""
    per_layer = sum(2 * int(np.prod(s)) for n, s in shapes_of(config, 1) if ".layers." in n)
    layers = max(1, round(gigabytes * 1e9 / per_layer))
    write(folder, config, layers, holes)


def write(folder, config, layers, holes=False):
    """A checkpoint of random numbers in shards, one tensor in memory at a time; or of holes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({**config, "num_hidden_layers": layers}, indent=2)
    )
    shapes = (qwen_shapes if config["model_type"] == "qwen3_moe" else shapes_of)(config, layers)
    shards, size = [[]], 0
    for name, shape in shapes:
        if size > SHARD:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += 2 * int(np.prod(shape))
    random_numbers = np.random.default_rng(0)
    total, where = 0, {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in shard:
            end = at + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
            at, where[name] = end, file
        total += at
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            if holes:
                out.truncate(8 + len(text) + at)
                continue
            for _, shape in shard:
                values = random_numbers.standard_normal(shape, dtype=np.float32)
                values *= 0.02
                out.write(values.astype(ml_dtypes.bfloat16).tobytes())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    os.sync()


def make_huge(folder):
    """Headers of a 1 TB checkpoint over holes: 100k tensors in 200 shards."""
    folder.mkdir(parents=True)
    config = {**GRANITE, "model_type": "qwen3_moe", "hidden_size": 4096, "num_experts": 272}
    config |= {"moe_intermediate_size": 1216, "num_hidden_layers": 122}
    config["num_key_value_heads"] = config["num_attention_heads"]
    del config["num_local_experts"]
    (folder / "config.json").write_text(json.dumps(config))
    names = [("model.embed_tokens.weight", (32000, 4096)), ("model.norm.weight", (4096,))]
    for layer in range(122):
        at = f"model.layers.{layer}."
        names.append((at + "mlp.gate.weight", (272, 4096)))
        names += [(f"{at}self_attn.{p}_proj.weight", (4096, 4096)) for p in "qkvo"]
        for expert in range(272):
            inside = f"{at}mlp.experts.{expert}."
            names += [(f"{inside}{p}_proj.weight", (1216, 4096)) for p in ("gate", "up")]
            names.append((inside + "down_proj.weight", (4096, 1216)))
    where, total = {}, 0
    per_file = -(-len(names) // 200)
    for number in range(200):
        file = f"model-{number + 1:05d}-of-00200.safetensors"
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in names[number * per_file : (number + 1) * per_file]:
            end = at + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
            at, where[name] = end, file
        total += at
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + at)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["mixtral", "granite", "huge", "small-mixtral", "qwen"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=2.2)
    parser.add_argument(
        "--holes", action="store_true", help="headers over holes in place of numbers"
    )
    options = parser.parse_args()
    if options.kind == "huge":
        make_huge(options.folder)
        return
    if options.kind in ("small-mixtral", "qwen"):
        config, layers = (QWEN, 48) if options.kind == "qwen" else (SMALL_MIXTRAL, 6)
        write(options.folder, config, layers, options.holes)
        return
    config = MIXTRAL if options.kind == "mixtral" else GRANITE
    make(options.folder, config, options.gb, options.holes)


if __name__ == "__main__":
    main()
