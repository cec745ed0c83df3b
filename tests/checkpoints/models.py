"""Small checkpoints for tests, made of numbers that tell every element from every other."""

import json

import numpy as np

from regraft.storage.safetensors import write_tensors

HIDDEN, INNER, EXPERTS, LAYERS = 8, 6, 3, 2
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_local_experts": EXPERTS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
    "rope_theta": 1e6,
    "dtype": "float32",
}


def mixtral(hidden=HIDDEN, inner=INNER, experts=EXPERTS, layers=LAYERS, dtype=np.float32):
    """The tensors of a small Mixtral in the layout of transformers 4."""
    shapes = {"model.embed_tokens.weight": (10, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2), ("o", hidden)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, hidden)
        shapes[at + "input_layernorm.weight"] = (hidden,)
        shapes[at + "block_sparse_moe.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            inside = f"{at}block_sparse_moe.experts.{expert}."
            shapes[inside + "w1.weight"] = shapes[inside + "w3.weight"] = (inner, hidden)
            shapes[inside + "w2.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (10, hidden)
    count = 0
    tensors = {}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        tensors[name] = np.arange(count, count + size).reshape(shape).astype(dtype)
        count += size
    return tensors


def write_folder(folder, tensors, config=MIXTRAL, shards=1, metadata=None):
    """A folder with a config and one file or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} if metadata is None else metadata
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_tensors(folder / "model.safetensors", tensors, metadata)
        return folder
    names = list(tensors)
    where = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[number::shards]
        write_tensors(folder / file, {name: tensors[name] for name in mine}, metadata)
        where |= dict.fromkeys(mine, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def snapshot(folder):
    """Every file below a folder and its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def beside(folder):
    """What stands beside a folder, hidden or not."""
    return sorted(path.name for path in folder.parent.iterdir())
