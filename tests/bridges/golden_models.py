"""The tiny models of ``tests/golden``, and what their adapters do to them."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent.parent / "golden"
INDEX = json.loads((GOLDEN / "index.json").read_text())

two_adapters = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.20"),
    reason="PEFT took one adapter of target_parameters before 0.20",
)


def case_folder(name):
    return GOLDEN / "cases" / name


def base_model(name):
    transformers.utils.logging.disable_progress_bar()
    return getattr(transformers, INDEX[name]["model_class"]).from_pretrained(
        GOLDEN / "bases" / INDEX[name]["base"], attn_implementation="eager", dtype=torch.float32
    )


def reference(name):
    """The inputs of a case, its outputs, and those of the bare base."""
    kept = load_file(case_folder(name) / "reference.safetensors")
    inputs = {key.removeprefix("input."): x for key, x in kept.items() if key.startswith("input.")}
    return inputs, kept["ref"], kept["ref_base"]


def outputs(model, name):
    inputs, _, _ = reference(name)
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


def is_adapted(model, name):
    """Whether a model's outputs are those that the adapter gave where it was trained."""
    _, want, bare = reference(name)
    effect = (want - bare).abs().max().item()
    tolerance = max(1e-4, 1e-4 * effect)
    assert effect > 10 * tolerance
    return (outputs(model, name) - want).abs().max().item() < tolerance


def is_bare(model, name):
    return torch.allclose(outputs(model, name), reference(name)[2], atol=1e-4)


def tree_of(model):
    """Everything that a failed load must leave alone."""
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    modules = [(path, id(module), module.training) for path, module in model.named_modules()]
    flags = [(path, p.requires_grad) for path, p in model.named_parameters()]
    hidden = {path: sorted(vars(module)) for path, module in model.named_modules()}
    return tensors, modules, flags, hidden


def same_tree(one, other):
    return (
        one[1:] == other[1:]
        and one[0].keys() == other[0].keys()
        and all(torch.equal(one[0][key], other[0][key]) for key in one[0])
    )
