"""Alpha and rank that no file says: given with ``alpha`` and ``rank``, for Megatron-Bridge's export."""

import json

import numpy as np
import pytest

import regraft
from regraft.cli import main
from regraft.storage.safetensors import open_tensors, write_tensors

MODULES = ("self_attn.q_proj", "self_attn.o_proj")


def export(folder, ranks=(2, 2)):
    """A LoRA as Megatron-Bridge exports it."""
    random, tensors = np.random.default_rng(0), {}
    for name, rank in zip(MODULES, ranks, strict=True):
        path = f"model.layers.0.{name}"
        tensors[f"{path}.lora_A.weight"] = random.normal(size=(rank, 8)).astype(np.float32)
        tensors[f"{path}.lora_B.weight"] = random.normal(size=(8, rank)).astype(np.float32)
    folder.mkdir()
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    base = folder.with_name("base")
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    return folder, base


def scale_of(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config["lora_alpha"] / config["r"]


def test_alpha_is_taken_for_the_rank_of_the_factors(tmp_path):
    lora, base = export(tmp_path / "lora")
    with pytest.raises(regraft.BadInputError, match="--alpha ALPHA"):
        regraft.convert(lora, tmp_path / "no", to="vllm", model=base)
    command = ["convert", str(lora), str(tmp_path / "out"), "--to", "vllm", "--model", str(base)]
    assert main([*command, "--alpha", "5"]) == 0
    assert scale_of(tmp_path / "out") == 2.5
    was, now = (open_tensors(x / "adapter_model.safetensors") for x in (lora, tmp_path / "out"))
    for name in was:
        np.testing.assert_array_equal(now[f"base_model.model.{name}"], was[name])


def test_several_ranks_need_theirs(tmp_path):
    lora, base = export(tmp_path / "lora", (2, 4))
    with pytest.raises(regraft.BadInputError, match="--rank RANK"):
        regraft.convert(lora, tmp_path / "no", to="vllm", model=base, alpha=4)


@pytest.mark.parametrize("given", [{"alpha": 3}, {"alpha": 4, "rank": 8}])
def test_what_a_file_says_otherwise_is_an_error(given, tmp_path):
    lora, base = export(tmp_path / "lora")
    (lora / "run_config.json").write_text('{"peft": {"dim": 2, "alpha": 4}}')
    with pytest.raises(regraft.BadInputError, match=r"and run_config.json says"):
        regraft.convert(lora, tmp_path / "no", to="vllm", model=base, **given)
    regraft.convert(lora, tmp_path / "out", to="vllm", model=base, alpha=4)
    assert scale_of(tmp_path / "out") == 2


def test_other_files_say_theirs(tmp_path):
    lora, base = export(tmp_path / "lora")
    regraft.convert(lora, tmp_path / "peft", to="transformers-v5", model=base, alpha=4)
    with pytest.raises(regraft.BadInputError, match="megatron-bridge"):
        regraft.convert(tmp_path / "peft", tmp_path / "no", to="vllm", model=base, alpha=4)
