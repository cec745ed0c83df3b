"""A carry-over's bound counts, whether it is a number or the config's."""

import json

import numpy as np
import pytest

import regraft
from regraft.storage.safetensors import write_tensors

BOOK = """
name = "toy"
title = "Toy"
left = "toy-a"
right = "toy-b"
model_types = ["toy"]
source = "made up"

[[equation]]
name = "a"
text = "model.layers.{l}.a.weight : o i == model.layers.{l}.b.weight : o i"

[[carry]]
keys = ["model.layers.{l}.n.weight"]
where = "l < BOUND"
why = "norms are the same in both"
"""


@pytest.mark.parametrize("bound", ["2", "config.num_hidden_layers"])
def test_keys_beyond_the_bound_of_a_carry_over(bound, tmp_path):
    (tmp_path / "book.toml").write_text(BOOK.replace("BOUND", bound))
    tensors = {f"model.layers.{layer}.n.weight": np.zeros(3, np.float32) for layer in range(4)}
    tensors["model.layers.0.a.weight"] = np.zeros((3, 2), np.float32)
    (tmp_path / "in").mkdir()
    write_tensors(tmp_path / "in" / "model.safetensors", tensors, {})
    config = {"model_type": "toy", "num_hidden_layers": 2}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    with pytest.raises(regraft.BadInputError, match="the base model has 2") as caught:
        regraft.convert(
            tmp_path / "in", tmp_path / "out", to="toy-b", rules=[tmp_path / "book.toml"]
        )
    assert [finding.key for finding in caught.value.findings] == ["model.layers.2.n.weight"]
