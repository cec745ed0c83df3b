"""Tied weights that are stored as two tensors with other values: one model in one release, another in the other."""

import json

import numpy as np
import pytest
from models import MIXTRAL, mixtral, write_folder

import regraft
from regraft.checkpoints import ties
from regraft.checkpoints.verify import verify
from regraft.cli import main
from regraft.errors import BadInputError
from regraft.storage.safetensors import open_tensors

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {**MIXTRAL, "tie_word_embeddings": True}
NEW = "transformers-v5"


def tied(equal=True):
    tensors = mixtral()
    if equal:
        tensors[HEAD] = tensors[EMBEDDINGS].copy()
    return tensors


def result(path):
    config = json.loads((path / "config.json").read_text())
    return config, open_tensors(path / "model.safetensors")


def test_unequal_tied_weights_are_an_error_that_names_both_and_the_ways_out(tmp_path):
    src = write_folder(tmp_path / "src", mixtral(), TIED)
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, tmp_path / "out", to=NEW)
    (finding,) = caught.value.findings
    assert (finding.code, finding.key) == ("two-values", HEAD)
    assert EMBEDDINGS in finding.message
    assert "--untie" in finding.fix and f"--drop {HEAD}" in finding.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", [True, False, None])
def test_equal_ones_and_those_that_are_not_tied_convert_as_ever(tmp_path, field):
    config = MIXTRAL if field is None else {**MIXTRAL, "tie_word_embeddings": field}
    tensors = tied(equal=field is True)
    src = write_folder(tmp_path / "src", tensors, config)
    regraft.convert(src, tmp_path / "out", to=NEW)
    _, made = result(tmp_path / "out")
    assert all(np.array_equal(made[k], tensors[k]) for k in (HEAD, EMBEDDINGS))


def test_untie_keeps_both_and_says_so_in_the_config(tmp_path):
    src = write_folder(tmp_path / "src", mixtral(), TIED)
    report = regraft.convert(src, tmp_path / "out", to=NEW, untie=True)
    config, made = result(tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    assert all(np.array_equal(made[k], mixtral()[k]) for k in (HEAD, EMBEDDINGS))
    assert any(HEAD in note and EMBEDDINGS in note for note in report.checkpoint.notes)
    assert verify(src, tmp_path / "out").equal


def test_dropping_the_head_keeps_the_embeddings(tmp_path):
    src = write_folder(tmp_path / "src", mixtral(), TIED)
    report = regraft.convert(src, tmp_path / "out", to=NEW, drop=[HEAD])
    config, made = result(tmp_path / "out")
    assert HEAD not in made and config["tie_word_embeddings"] is True
    assert np.array_equal(made[EMBEDDINGS], mixtral()[EMBEDDINGS])
    assert any(f"dropped {HEAD}" in note for note in report.checkpoint.notes)
    assert verify(src, tmp_path / "out").equal


def test_dropping_the_embeddings_puts_the_heads_values_in_their_place(tmp_path):
    src = write_folder(tmp_path / "src", mixtral(), TIED)
    report = regraft.convert(src, tmp_path / "out", to=NEW, drop=[EMBEDDINGS])
    _, made = result(tmp_path / "out")
    assert HEAD not in made
    assert np.array_equal(made[EMBEDDINGS], mixtral()[HEAD])
    assert any("have its name now" in note for note in report.checkpoint.notes)


@pytest.mark.parametrize("options", [{"untie": True}, {"drop": ["no.such"]}])
def test_what_is_not_tied_is_not_untied_and_what_is_not_there_not_dropped(tmp_path, options):
    src = write_folder(tmp_path / "src", tied(), TIED)
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, tmp_path / "out", to=NEW, **options)
    assert caught.value.findings[0].code == "option"


def test_the_way_back_and_the_command(tmp_path, capsys):
    src = write_folder(tmp_path / "src", mixtral(), MIXTRAL)
    regraft.convert(src, tmp_path / "new", to=NEW)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    (tmp_path / "new" / "config.json").write_text(
        json.dumps({**config, "tie_word_embeddings": True})
    )
    words = ["convert", str(tmp_path / "new"), str(tmp_path / "old"), "--to", "transformers-v4"]
    assert main(words) == 1
    assert "--untie" in capsys.readouterr().err
    assert main([*words, "--drop", HEAD]) == 0
    # In its own layout nothing changes, so nothing is asked.
    same = [*words[:2], str(tmp_path / "same"), "--to", NEW]
    assert main(same) == 0


def test_the_installed_transformers_tells_the_ties_of_other_models(tmp_path):
    pytest.importorskip("transformers")
    config = {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 20,
        "max_position_embeddings": 16,
        "type_vocab_size": 2,
    }
    import transformers

    model = transformers.BertForMaskedLM(transformers.BertConfig(**config))
    tensors = {k: t.detach().numpy().copy() for k, t in model.state_dict().items()}
    decoder, words = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma"): t for k, t in tensors.items()}
    same = write_folder(tmp_path / "same", old, config)
    regraft.convert(same, tmp_path / "fine", to=NEW)
    old[decoder] = old[decoder] + 1
    src = write_folder(tmp_path / "src", old, config)
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, tmp_path / "out", to=NEW)
    (finding,) = caught.value.findings
    assert finding.key == decoder and words in finding.message
    regraft.convert(src, tmp_path / "out", to=NEW, untie=True)
    made, _ = result(tmp_path / "out")
    assert made["tie_word_embeddings"] is False


def test_comparing_stops_at_the_first_difference(tmp_path, monkeypatch):
    tensors = mixtral(hidden=64)
    src = write_folder(tmp_path / "src", tensors, TIED)
    read = []
    monkeypatch.setattr(ties, "_BUFFER", 256)
    genuine = ties.read_into

    def counted(file, view, at):
        read.append(len(view))
        genuine(file, view, at)

    monkeypatch.setattr(ties, "read_into", counted)
    with pytest.raises(BadInputError):
        regraft.convert(src, tmp_path / "out", to=NEW)
    # Once to find it, and once more for the pair that is named.
    assert sum(read) == 4 * 256


def test_the_text_models_field_decides_and_reaches_the_result():
    from regraft.checkpoints.config import convert_config

    old = {
        "model_type": "x",
        "tie_word_embeddings": False,
        "transformers_version": "4.57.6",
    }
    old["text_config"] = {"model_type": "y", "tie_word_embeddings": True}
    new, changes = convert_config(old, NEW)
    assert new["tie_word_embeddings"] is True and changes
