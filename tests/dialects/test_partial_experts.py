"""Experts that are not all there: whose fault it is does not depend on what the adapter is converted to."""

import json

import numpy as np
import pytest
from dialects.test_tools import EXPERTS, HIDDEN, INNER, LAYERS, make_base, through

import regraft
from regraft.storage.safetensors import write_tensors

TARGETS = [
    "transformers-v4",
    "transformers-v5",
    "vllm",
    "sglang",
    "unsloth",
    "nemo",
    "gguf",
    "mlx",
    "litgpt",
]
SIZES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


def adapter(folder, has, names):
    """A LoRA of single experts of Qwen3-MoE; ``names`` makes ``target_modules`` of the modules that it has."""
    random, tensors, modules = np.random.default_rng(0), {}, []
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            for leaf, (out, into) in SIZES.items():
                if not has(layer, expert, leaf):
                    continue
                modules.append(f"model.layers.{layer}.mlp.experts.{expert}.{leaf}")
                for letter, shape in (("A", (2, into)), ("B", (out, 2))):
                    numbers = (random.integers(1, 9, shape) / 16).astype(np.float32)
                    tensors[f"base_model.model.{modules[-1]}.lora_{letter}.weight"] = numbers
    folder.mkdir()
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": names(modules)}
    (folder / "adapter_config.json").write_text(json.dumps({**about, "peft_version": "0.18.0"}))
    return folder


def by_leaf(modules):
    return sorted(SIZES)


def one_by_one(modules):
    return modules


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "base", "qwen3_moe", num_experts=EXPERTS)


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize(
    "has",
    [
        lambda layer, expert, leaf: expert == 1,
        lambda layer, expert, leaf: (layer, expert, leaf) != (1, EXPERTS - 1, "up_proj"),
    ],
    ids=["one_expert", "one_projection_less"],
)
def test_an_expert_that_a_listed_name_promises_was_lost_for_every_target(tmp_path, base, has, to):
    lora = adapter(tmp_path / "lora", has, by_leaf)
    with pytest.raises(regraft.BadInputError) as caught:
        through(tmp_path, lora, base, to)
    assert {finding.code for finding in caught.value.findings} == {"missing"}
    assert not (tmp_path / f"0-{to}").exists()


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize(
    ("has", "names"),
    [
        (lambda layer, expert, leaf: expert == 1, one_by_one),
        (lambda layer, expert, leaf: leaf == "down_proj" and expert % 2, one_by_one),
        (lambda layer, expert, leaf: leaf == "up_proj", by_leaf),
        (lambda layer, expert, leaf: layer == 0, by_leaf),
    ],
    ids=["one_expert", "odd_ones_down", "up_alone", "one_layer"],
)
def test_experts_that_nothing_promises_are_not_adapted_in_any_target(
    tmp_path, base, has, names, to
):
    lora = adapter(tmp_path / "lora", has, names)
    made = through(tmp_path, lora, base, to)
    assert regraft.verify(lora, made, model=base).equal


def test_it_is_not_merged_either(tmp_path):
    base = make_base(tmp_path / "base", "qwen3_moe", num_experts=EXPERTS)
    lora = adapter(tmp_path / "lora", lambda layer, expert, leaf: expert == 1, by_leaf)
    weights = {
        f"model.layers.{layer}.mlp.experts.{expert}.{leaf}.weight": np.ones(size, np.float32)
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
        for leaf, size in SIZES.items()
    }
    write_tensors(base / "model.safetensors", weights, {"format": "pt"})
    with pytest.raises(regraft.BadInputError, match="has no factors for it"):
        regraft.merge(base, [lora], tmp_path / "merged")
