"""Trained tokens must be tokens of the base, and infinite factors make no warnings of numpy."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

import regraft
from regraft.errors import BadInputError
from regraft.storage.safetensors import open_tensors, write_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
CASE, BASE = GOLDEN / "cases/mixtral__gud_attn", GOLDEN / "bases/mixtral"


def changed(folder, tensors, **fields):
    folder.mkdir()
    config = json.loads((CASE / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    there = dict(open_tensors(CASE / "adapter_model.safetensors").items())
    write_tensors(folder / "adapter_model.safetensors", {**there, **tensors}, {})
    return folder


@pytest.mark.parametrize(("token", "sound"), [(31, True), (32, False)])
def test_a_trained_token_that_the_base_has_not(tmp_path, token, sound):
    delta = {
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones(
            (1, 16), np.float32
        )
    }
    src = changed(tmp_path / "src", delta, trainable_token_indices=[token])
    if sound:
        regraft.convert(src, tmp_path / "out", to="transformers-v5", model=BASE)
        return
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, tmp_path / "out", to="transformers-v5", model=BASE)
    assert caught.value.findings[0].code == "vocabulary"


def test_infinite_factors_that_stay_are_noted_without_a_warning(tmp_path):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    values = np.array([[np.inf] * 8 + [-np.inf] * 8] * 4, np.float32)
    src = changed(tmp_path / "src", {key: values})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = regraft.convert(src, tmp_path / "out", to="transformers-v4", model=BASE)
    assert any("NaN or infinite" in note for note in report.adapters[0].notes)
