"""Fields that say that a module was saved, or tokens trained, of which the file has nothing: PEFT would not load it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import regraft
from regraft.errors import BadInputError
from regraft.storage.safetensors import open_tensors, write_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
CASE, BASE = GOLDEN / "cases/mixtral__gud_attn", GOLDEN / "bases/mixtral"
TOKENS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
V4, V5 = "transformers-v4", "transformers-v5"


def changed(folder, tensors=None, **fields):
    folder.mkdir()
    config = json.loads((CASE / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    there = dict(open_tensors(CASE / "adapter_model.safetensors").items())
    write_tensors(folder / "adapter_model.safetensors", {**there, **(tensors or {})}, {})
    return folder


@pytest.mark.parametrize(
    ("entries", "lacking"),
    [
        (["lm_head"], "lm_head"),
        (["norm"], "model.layers.0.input_layernorm (and 4 more)"),
        (["gate"], "model.layers.0.block_sparse_moe.gate (and 1 more)"),
        (["wte", "model.embed_tokens"], "model.embed_tokens"),
    ],
)
@pytest.mark.parametrize("to", [V4, V5])
def test_modules_that_are_not_in_the_file(tmp_path, entries, lacking, to):
    src = changed(tmp_path / "src", modules_to_save=entries)
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, tmp_path / "out", to=to, model=BASE)
    (finding,) = caught.value.findings
    assert (finding.code, finding.key) == ("missing", "modules_to_save")
    assert lacking in finding.message and not (tmp_path / "out").exists()


def test_what_names_no_module_does_nothing_and_stays(tmp_path):
    src = changed(tmp_path / "src", modules_to_save=["classifier", "score", "wte"])
    regraft.convert(src, tmp_path / "out", to=V5, model=BASE)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "score", "wte"]


@pytest.mark.parametrize("weights", [True, False])
def test_what_named_no_module_names_none_afterwards(tmp_path, weights):
    """``mlp`` is none of the old names; in the new ones it would leave out all experts."""
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    if not weights:
        (base / "model.safetensors").unlink()
    src = changed(tmp_path / "src", modules_to_save=["mlp"])
    regraft.convert(src, tmp_path / "out", to=V5, model=base)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == []


def test_without_the_bases_names_it_is_said(tmp_path):
    saved = {"base_model.model.lm_head.weight": np.ones((32, 16), np.float32)}
    entries = ["gate", "lm_head", "classifier"]
    src = changed(tmp_path / "src", saved, modules_to_save=entries, task_type="SEQ_CLS")
    shutil.copy(BASE / "config.json", tmp_path)
    report = regraft.convert(src, tmp_path / "out", to=V5, model=tmp_path / "config.json")
    (note,) = [note for note in report.notes if "modules_to_save" in note]
    assert note.startswith("modules_to_save names 'gate', and the file has no tensor of it")


@pytest.mark.parametrize("entry", ["experts", "mlp"])
def test_experts_that_are_adapted_and_named_as_saved(tmp_path, entry):
    regraft.convert(CASE, tmp_path / "new", to=V5, model=BASE)
    path = tmp_path / "new" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "modules_to_save": [entry]}))
    with pytest.raises(BadInputError, match=f"names '{entry}', and the file has no tensor of"):
        regraft.convert(tmp_path / "new", tmp_path / "out", to=V4, model=BASE)


@pytest.mark.parametrize("given", [[4, 5], {"embed_tokens": [3]}])
@pytest.mark.parametrize("model", [BASE, BASE / "config.json"])
def test_trained_tokens_that_are_not_in_the_file(tmp_path, given, model):
    src = changed(tmp_path / "src", trainable_token_indices=given)
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, tmp_path / "out", to=V5, model=model)
    assert [f.key for f in caught.value.findings] == ["trainable_token_indices"]


def test_as_many_rows_as_tokens(tmp_path):
    rows = {TOKENS: np.ones((3, 16), np.float32)}
    src = changed(tmp_path / "src", rows, trainable_token_indices=[4, 5])
    with pytest.raises(BadInputError, match="names 2 tokens"):
        regraft.convert(src, tmp_path / "out", to=V5, model=BASE)
