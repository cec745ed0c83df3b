"""A book of the user's own moves tensors to another class's layout; the config still names the class before."""

import json

import numpy as np
import pytest

import regraft
from regraft.storage.safetensors import write_tensors

BOOK = """
name = "mine"
title = "Mine: one name changes"
left = "mine-1"
right = "mine-2"
model_types = ["mine"]

[[equation]]
name = "o"
text = "blocks.{l}.o.weight : o i == blocks.{l}.out.weight : o i"
"""


@pytest.mark.parametrize("named", [["MineForCausalLM"], None])
def test_the_class_that_the_config_names_is_said(tmp_path, named):
    (tmp_path / "mine.toml").write_text(BOOK)
    src = tmp_path / "src"
    src.mkdir()
    tensors = {"blocks.0.o.weight": np.ones((2, 2), np.float32)}
    write_tensors(src / "model.safetensors", tensors, {})
    config = {"model_type": "mine"} | ({"architectures": named} if named else {})
    (src / "config.json").write_text(json.dumps(config))
    to = tmp_path / "out"
    report = regraft.convert(src, to, to="mine-2", rules=tmp_path / "mine.toml").checkpoint
    assert any("still MineForCausalLM" in note for note in report.notes) == bool(named)
    again = regraft.convert(to, tmp_path / "same", to="mine-2", rules=tmp_path / "mine.toml")
    assert not any("architectures" in note for note in again.checkpoint.notes)
