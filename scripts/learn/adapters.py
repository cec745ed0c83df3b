"""Adapters through learned rule books against the books that regraft has or makes from transformers' registry.

    python scripts/learn/adapters.py [--only GLOB ...] [--sample N] [--out FILE]

For each class a book is learned from two sizes, with the kinds that the live classes of the old layout tell. A LoRA on
every linear module of the old layout is then converted twice, by the learned book and without it. The results must
be the same files, or both are refused.
"""

import argparse
import fnmatch
import json
import logging
import os
import random
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import registry
import torch
import transformers
from compare import classes, registered
from explained import explain
from safetensors.numpy import load_file, save_file

import regraft
from regraft.bridges.transformers.probing import outline_of
from regraft.errors import RegraftError
from regraft.learning.learn import learn_pairs

LAYOUTS = "transformers-v4", "transformers-v5"


def write_adapter(folder, outline, base, seed):
    """A LoRA on every linear module of an outline."""
    random_numbers = np.random.default_rng(seed)
    modules = [k.removesuffix(".weight") for k, kind in outline.kinds.items() if kind == "linear"]
    modules = [m for m in modules if m + ".weight" in outline.shapes]
    tensors = {}
    for module in modules:
        rows, columns = outline.shapes[module + ".weight"]
        for name, shape in (("A", (2, columns)), ("B", (rows, 2))):
            key = f"base_model.model.{module}.lora_{name}.weight"
            tensors[key] = random_numbers.standard_normal(shape).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": modules}
    config |= {"base_model_name_or_path": str(base), "task_type": None, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return len(modules)


def of_few_layers(config):
    """A config whose lists say something of each layer that it has, and of no other: classes check it."""
    count = config.get("num_hidden_layers")
    result = {}
    for name, value in config.items():
        if isinstance(value, dict):
            result[name] = of_few_layers(value)
        elif isinstance(value, list) and count and len(value) > count and _is_of_layers(name):
            result[name] = value[:count]
        else:
            result[name] = value
    return result


def _is_of_layers(name):
    return "layer" in name or name == "intermediate_size"


def convert(src, dst, base, rules):
    """What comes out: the files, or the codes of what is refused."""
    try:
        regraft.convert(src, dst, to=LAYOUTS[1], model=base, rules=rules)
    except RegraftError as error:
        return [f"{f.code}: {f.key}: {f.message}"[:200] for f in error.findings]
    return load_file(dst / "adapter_model.safetensors"), json.loads(
        (dst / "adapter_config.json").read_text()
    )


def differ(one, other):
    """How two results differ; empty where they do not."""
    if isinstance(one, list) or isinstance(other, list):
        if isinstance(one, list) and isinstance(other, list):
            return ""
        side = "without it" if isinstance(one, list) else "by the learned book"
        return f"refused {side}: {(one if isinstance(one, list) else other)[0]}"
    if one[0].keys() != other[0].keys():
        odd = sorted(one[0].keys() ^ other[0].keys())
        return f"{len(odd)} keys: {odd[0]}"
    wrong = [k for k in one[0] if not np.array_equal(one[0][k], other[0][k])]
    if wrong:
        return f"{len(wrong)} tensors: {wrong[0]}"
    mine, yours = one[1], other[1]
    # The tensors are the same, so the same modules are adapted, however they are named.
    names = (mine.keys() | yours.keys()) - {"target_modules"}
    fields = [k for k in names if _set(mine.get(k)) != _set(yours.get(k))]
    return f"config: {fields}" if fields else ""


def _set(value):
    return sorted(value) if isinstance(value, list) else value or None


def judge(cls):
    """One class: (kind, verdict, why); ``None`` where nothing is registered."""
    with torch.device("meta"):
        model = cls(registry.config_of(cls, registry.FIRST[0]))
    if not registered(model):
        return None
    sizes = registry.buildable(cls)[:2]
    pairs = [registry.pair(cls, each, seed) for seed, each in enumerate(sizes, 1)]
    config = of_few_layers(registry.config_of(cls, sizes[0]).to_dict())
    data = {**config, "architectures": [cls.__name__]}
    old, new = (outline_of(data, "", layout) for layout in (None, LAYOUTS[1]))
    kinds = old.kinds.get, new.kinds.get
    found = learn_pairs(
        pairs,
        layouts=LAYOUTS,
        kind_of=kinds,
        model_types=[config["model_type"]],
        orders=lambda: new.parameters,
    )
    kind = registry.kind_of(pairs[0])
    if not found.sound:
        return kind, "not learned", ""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = folder / "base"
        base.mkdir()
        (base / "config.json").write_text(json.dumps(data, default=str))
        book = folder / "learned.toml"
        book.write_text(found.text)
        modules = write_adapter(folder / "adapter", old, base, 1)
        if not modules:
            return kind, "no linear modules", ""
        known = convert(folder / "adapter", folder / "known", base, ())
        mine = convert(folder / "adapter", folder / "mine", base, [str(book)])
        why = differ(known, mine)
        if why:
            return kind, "differs", why
        return kind, "both refused" if isinstance(known, list) else "equal", ""


def main():
    """Judge classes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--sample", type=int, default=40)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    chosen = [
        cls
        for cls in classes()
        if not given.only or any(fnmatch.fnmatch(cls.__name__, glob) for glob in given.only)
    ]
    random.Random(given.seed).shuffle(chosen)
    table, rows = Counter(), []
    for cls in chosen:
        if sum(table.values()) >= given.sample:
            break
        try:
            verdict = judge(cls)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".split("\n")[0][:150]
            verdict = ("?", "not built", text) if registry.why_not(cls) else None
        if verdict is None:
            continue
        kind, word, why = verdict
        if word != "not built":
            table[kind, word] += 1
        reason = explain(cls.__name__, transformers.__version__)
        rows.append({"class": cls.__name__, "kind": kind, "verdict": word, "why": why})
        print(
            f"{cls.__name__:50} {kind:10} {word:18} {why} {'(parity)' * bool(reason)}", flush=True
        )
    for (kind, word), count in sorted(table.items()):
        print(f"{count:4} {kind} {word}")
    if given.out:
        Path(given.out).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
