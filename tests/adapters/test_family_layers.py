"""Families that the table of all families cannot make: compared with PEFT's own layers here."""

import json
from pathlib import Path

import numpy as np
import pytest
from making import book_of, equation_of
from safetensors import safe_open
from test_families import HEAD, SHAPES, model_of
from test_more_families import RENAME, book, convert, lily, shared

from regraft.adapters.families.base import FAMILY, OPERATIONS, Part
from regraft.adapters.families.bone import Bone
from regraft.adapters.families.miss import Miss
from regraft.errors import BadInputError

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

with safe_open(Path(__file__).parent / "bone.safetensors", "np") as file:
    CASES = json.loads(file.metadata()["cases"])
    BONE = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


# -- Bone, whose own layer is in PEFT 0.18 only: scripts/make_bone.py


@pytest.mark.parametrize("name", CASES)
def test_bone_adds_what_peft_added(name):
    base, block, merged = (BONE[f"{name}.{what}"] for what in ("base", "block", "merged"))
    part = Part({"bone_block": block}, *base.shape)
    delta = Bone(CASES[name], {}).delta(part, lambda: base.astype(np.float64))
    np.testing.assert_allclose(base + delta, merged, atol=1e-6)


@pytest.mark.parametrize("operation", ["join out", "split out", "split in", "transpose"])
def test_bone_goes_on_as_itself_or_as_a_lora(operation, monkeypatch):
    (path,) = {"m.0.n"} if "split" in operation else {"m.0.q"}
    block = BONE["plain.block"]
    block = np.concatenate([block, block], axis=1) if "split" in operation else block
    tensors = {f"base_model.model.{path}.bone_block": block}
    config = {"peft_type": "BONE", "r": 4, "init_weights": True, "target_modules": [path[-1]]}
    done = convert(config, tensors, book(SHAPES[operation][0].text), monkeypatch)
    stays = Bone.cell(operation).rung == FAMILY
    assert done.config["peft_type"] == ("BONE" if stays else "LORA")


def test_bone_can_do_what_miss_can():
    assert all(Bone.cell(operation) == Miss.cell(operation) for operation in OPERATIONS)


# -- trainable tokens


class Embedded(torch.nn.Module):
    """An embedding in the place of a module."""

    def __init__(self, name, weight):
        super().__init__()
        self.m = torch.nn.ModuleList([torch.nn.Module()])
        self.m[0].add_module(name, torch.nn.Embedding.from_pretrained(torch.tensor(weight)))


def embedded(name, weight, config):
    return peft.get_peft_model(Embedded(name, weight), config)


TOKENS = "m.{l}.q.weight : v d == m.{l}.z.weight : v d where v = 6, d = 4"


def test_trainable_tokens_follow_a_new_name(tmp_path, monkeypatch):
    random = np.random.default_rng(2)
    weight = random.standard_normal((6, 4)).astype(np.float32)
    config = peft.TrainableTokensConfig(token_indices=[1, 4], target_modules=["q"])
    model = embedded("q", weight, config)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = torch.tensor(random.standard_normal(parameter.shape)).float()
    want = model.base_model.model.m[0].q(torch.arange(6)).detach()
    tensors = {n: t.numpy().copy() for n, t in peft.get_peft_model_state_dict(model).items()}
    data = json.loads(json.dumps(config.to_dict(), default=sorted))
    text = equation_of(TOKENS, "it", "embedding", "embedding")
    done = convert(data, tensors, book_of(text, head=HEAD), monkeypatch)
    (tmp_path / "adapter_config.json").write_text(json.dumps(done.config))
    again = embedded("z", weight, peft.PeftConfig.from_pretrained(tmp_path))
    state = {name: torch.tensor(tensor) for name, tensor in done.tensors.items()}
    assert not peft.set_peft_model_state_dict(again, state).unexpected_keys
    assert torch.equal(again.base_model.model.m[0].z(torch.arange(6)), want)


# -- Lily, whose modules share A and B


def lily_model(leaf, config, layers):
    weights = {f"m.{layer}.{leaf}.weight": np.zeros((8, 16), np.float32) for layer in layers}
    return peft.get_peft_model(model_of(weights), config)


def test_lily_shares_after_as_it_shared_before(tmp_path, monkeypatch):
    layers = range(4)
    paths = [f"m.{layer}.q" for layer in layers]
    tensors, config = lily(paths, stride=2)
    shared(tensors, "B", *paths)
    shared(tensors, "A", *paths[:2])
    shared(tensors, "A", *paths[2:])
    config = {**peft.LilyConfig(r=2, num_B=2, stride_A=2).to_dict(), "target_modules": ["q"]}
    config = json.loads(json.dumps(config, default=list))
    done = convert(config, tensors, book(RENAME), monkeypatch)
    x = torch.tensor(np.random.default_rng(0).standard_normal((1, 3, 16))).float()
    outputs = []
    for leaf, (told, state) in {"q": (config, tensors), "z": (done.config, done.tensors)}.items():
        (tmp_path / "adapter_config.json").write_text(json.dumps(told))
        model = lily_model(leaf, peft.PeftConfig.from_pretrained(tmp_path), layers).eval()
        made = {name: torch.tensor(tensor) for name, tensor in state.items()}
        assert not peft.set_peft_model_state_dict(model, made).unexpected_keys
        for name, tensor in peft.get_peft_model_state_dict(model).items():
            assert torch.equal(tensor, made[name])
        modules = [model.base_model.model.get_submodule(f"m.{n}.{leaf}") for n in layers]
        outputs.append(torch.stack([m(x) for m in modules]).detach())
    assert outputs[0].abs().max() > 0.1
    assert torch.equal(*outputs)


# -- what is no adapter of its family


@pytest.mark.parametrize("name", ["lora_A", "delora_w_norm"])
def test_factors_whose_ranks_differ_are_named(name, monkeypatch):
    """A rank that one tensor has and another has not is found before anything moves."""
    kind = {"lora_A": "ADALORA", "delora_w_norm": "DELORA"}[name]
    prefix = "base_model.model.m.0.q."
    tensors = {
        "ADALORA": {"lora_A": (3, 16), "lora_B": (8, 2), "lora_E": (2, 1)},
        "DELORA": {
            "delora_A": (3, 16),
            "delora_B": (8, 2),
            "delora_lambda": (1,),
            "delora_w_norm": (16,),
        },
    }[kind]
    made = {prefix + end: np.ones(shape, np.float32) for end, shape in tensors.items()}
    config = {"peft_type": kind, "r": 3, "init_r": 3, "lora_alpha": 1, "target_modules": ["q"]}
    with pytest.raises(BadInputError, match="size of rank"):
        convert(config, made, book(RENAME), monkeypatch)
