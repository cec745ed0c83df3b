"""Adapters and checkpoints of reports, rebuilt small: every number occurs once, and none can take another's place."""

import json
from math import prod

import numpy as np
from test_cases import BASES

from regraft.storage.safetensors import open_tensors, write_tensors

V4, V5 = "transformers-v4", "transformers-v5"
PREFIX = "base_model.model."


def numbered(shapes, dtype=np.float32):
    """Tensors of these shapes."""
    made, begun = {}, 1
    for name, shape in shapes.items():
        size = prod(shape)
        made[name] = np.arange(begun, begun + size).astype(dtype).reshape(shape)
        begun += size
    return made


def lora(modules, rank=2):
    """The shapes of LoRAs on modules, each with its number of outputs and inputs."""
    return {
        f"{PREFIX}{name}.lora_{letter}.weight": shape
        for name, (out, inside) in modules.items()
        for letter, shape in (("A", (rank, inside)), ("B", (out, rank)))
    }


def write_base(folder, kind, **fields):
    """The folder of a base, of which there is only the config."""
    folder.mkdir(exist_ok=True)
    config = {"model_type": kind, **BASES.get(kind, {}), **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder, shapes, **settings):
    """An adapter's folder; ``shapes`` may be tensors."""
    folder.mkdir(exist_ok=True)
    first = next(iter(shapes.values()))
    tensors = shapes if isinstance(first, np.ndarray) else numbered(shapes)
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_checkpoint(folder, shapes, kind, **fields):
    """A checkpoint of one file; ``shapes`` may be tensors."""
    write_base(folder, kind, **fields)
    first = next(iter(shapes.values()))
    tensors = shapes if isinstance(first, np.ndarray) else numbered(shapes)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


def read(folder):
    """All tensors of a result."""
    return {
        k: np.array(v) for f in folder.glob("*.safetensors") for k, v in open_tensors(f).items()
    }


def config_of(folder):
    """The config of an adapter."""
    return json.loads((folder / "adapter_config.json").read_text())


def same(one, other):
    """Whether two sets of tensors are equal, bit for bit."""
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and np.array_equal(one[k], other[k]) for k in one
    )


def codes(caught):
    """The codes of an error's findings."""
    return {finding.code for finding in caught.value.findings}
