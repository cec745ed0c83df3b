"""What `inspect` tells of other tools' files whose base is not known."""

import json

import numpy as np
import pytest
from dialects.test_tools import ATTENTION, make_adapter, make_base, through

import regraft
from regraft.storage.safetensors import write_tensors


@pytest.mark.parametrize("tool", ["gguf", "torchtune", "litgpt"])
def test_the_form_tells_the_layout(tmp_path, tool):
    lora, base = make_adapter(tmp_path / "lora", ATTENTION), make_base(tmp_path / "base", "llama")
    made = through(tmp_path, lora, base, tool)
    (told,) = regraft.inspect(made).adapters
    assert told.layout == tool
    asked = " ".join(told.evidence)
    assert "not known" not in asked or "such as" in asked
    assert "dense" not in asked  # no name of a rule book


def test_parameters_of_packed_experts_are_named_without_a_base(tmp_path):
    rank, experts, hidden, inner = 2, 3, 16, 12
    tensors = {}
    for part, (into, out) in {"gate_and_up": (hidden, 2 * inner), "down": (inner, hidden)}.items():
        place = f"base_model.model.model.layers.0.mlp.experts.lora_{part}_"
        tensors[f"{place}A"] = np.ones((experts, into, rank), np.float32)
        tensors[f"{place}B"] = np.ones((experts, rank, out), np.float32)
    write_tensors(tmp_path / "adapter_model.safetensors", tensors, {})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": []}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "automodel_peft_config.json").write_text("{}")
    (told,) = regraft.inspect(tmp_path).adapters
    names = {target.pattern.rpartition(".")[2] for target in told.targets}
    assert names == {"gate_up_proj", "down_proj"}
