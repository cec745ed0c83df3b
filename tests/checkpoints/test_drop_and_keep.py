"""Tensors that a model does not use: left out or kept by patterns, reported, noted, and the same on the way back."""

import json

import numpy as np
import pytest
from checkpoints.models import MIXTRAL, mixtral, snapshot, write_folder

import regraft
from regraft.cli import main
from regraft.errors import BadInputError, UnmatchedKeysError
from regraft.storage.safetensors import open_tensors, read_header

V4, V5 = "transformers-v4", "transformers-v5"
FOREIGN = {
    "cls.seq_relationship.weight": np.ones((2, 8), np.float32),
    "cls.seq_relationship.bias": np.ones(2, np.float32),
    "probe.0.weight": np.full((3, 3), 7, np.float32),
}


@pytest.fixture
def src(tmp_path):
    return write_folder(tmp_path / "src", mixtral() | FOREIGN, MIXTRAL, shards=2)


def tensors_of(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in open_tensors(f).items()}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in other)


def test_without_them_it_is_an_error(src, tmp_path):
    with pytest.raises(UnmatchedKeysError, match=r"cls\.seq_relationship"):
        regraft.convert(src, tmp_path / "new", to=V5)


def test_dropped_and_kept_there_and_back(src, tmp_path):
    report = regraft.convert(src, tmp_path / "new", to=V5, drop=["cls.*"], keep=["probe.*"])
    new = tensors_of(tmp_path / "new")
    assert np.array_equal(new["probe.0.weight"], FOREIGN["probe.0.weight"])
    assert not any(name.startswith("cls.") for name in new)
    done = report.checkpoint
    assert sorted(done.dropped) == ["cls.seq_relationship.bias", "cls.seq_relationship.weight"]
    assert done.kept == ["probe.0.weight"]
    assert any("2 tensors dropped" in n and "cls.seq_relationship.bias" in n for n in report.notes)
    told = [
        json.loads(m["regraft"]) for m in map(metadata, files(tmp_path / "new")) if "regraft" in m
    ]
    assert sorted(told[0]["dropped"]) == sorted(done.dropped)
    # The way back needs not be told again, and says what is not there.
    back = regraft.convert(tmp_path / "new", tmp_path / "old", to=V4)
    assert same(
        tensors_of(tmp_path / "old"), mixtral() | {"probe.0.weight": FOREIGN["probe.0.weight"]}
    )
    assert any("not brought back" in note and "cls.seq_relationship" in note for note in back.notes)
    again = regraft.convert(tmp_path / "old", tmp_path / "again", to=V5)
    assert again.checkpoint.kept == ["probe.0.weight"]


def files(folder):
    return sorted(folder.glob("*.safetensors"))


def metadata(file):
    return read_header(file).metadata


@pytest.mark.parametrize(
    ("options", "key", "words"),
    [
        ({"drop": ["cls.*", "no.such.*"], "keep": ["probe.*"]}, "no.such.*", "no tensor"),
        ({"drop": ["cls.*"], "keep": ["nothing", "probe.*"]}, "nothing", "no tensor"),
        ({"drop": ["cls.*", "probe.*"], "keep": ["probe.0.*"]}, "probe.0.weight", "and to be kept"),
        ({"drop": ["cls.*"], "keep": ["probe.*", "*.w2.weight"]}, None, "a rule moves it"),
        ({"drop": ["*"]}, None, "nothing would be left"),
    ],
)
def test_patterns_that_cannot_be(src, tmp_path, options, key, words):
    before = snapshot(src)
    with pytest.raises(BadInputError, match=words) as caught:
        regraft.convert(src, tmp_path / "new", to=V5, **options)
    assert key is None or key in [finding.key for finding in caught.value.findings]
    assert snapshot(src) == before and not (tmp_path / "new").exists()


def test_what_only_other_layouts_move_may_be_kept(src, tmp_path):
    """GGUF names the norms and the head otherwise; on the way to transformers 5 they stay what they are."""
    keep = ["probe.*", "lm_head.weight", "model.norm.weight"]
    regraft.convert(src, tmp_path / "new", to=V5, drop=["cls.*"], keep=keep)
    with pytest.raises(BadInputError, match="a rule moves it") as caught:
        regraft.convert(src, tmp_path / "no", to=V5, drop=["cls.*"], keep=[*keep, "*.gate.weight"])
    assert all("gguf" not in (finding.rule or "") for finding in caught.value.findings)


def test_half_a_group_cannot_be_dropped(src, tmp_path):
    with pytest.raises(BadInputError, match=r"experts"):
        regraft.convert(
            src, tmp_path / "new", to=V5, drop=["cls.*", "probe.*", "*.layers.0.*.experts.1.*"]
        )


def test_a_file_that_is_in_the_layout_already(src, tmp_path):
    report = regraft.convert(src, tmp_path / "old", to=V4, drop=["cls.*"])
    assert same(
        tensors_of(tmp_path / "old"), mixtral() | {"probe.0.weight": FOREIGN["probe.0.weight"]}
    )
    assert len(report.checkpoint.dropped) == 2


def test_a_book_that_only_says_what_stays_and_goes(src, tmp_path):
    """It stands beside regraft's own, which has the equations."""
    book = tmp_path / "mine.toml"
    book.write_text(
        """
name = "mine"
title = "what a probe left in it"
left = "transformers-v4"
right = "transformers-v5"
model_types = ["mixtral"]

[[drop]]
side = "left"
keys = ["cls.seq_relationship.{*q}"]
why = "nothing uses the head for sentences"

[[carry]]
keys = ["probe.{l}.{*q}"]
why = "the probe is mine"
"""
    )
    report = regraft.convert(src, tmp_path / "new", to=V5, rules=[book])
    new = tensors_of(tmp_path / "new")
    assert "probe.0.weight" in new and "model.layers.0.mlp.experts.gate_up_proj" in new
    assert any("nothing uses the head" in note for note in report.notes)
    regraft.convert(tmp_path / "new", tmp_path / "old", to=V4, rules=[book, "built-in"])
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in tensors_of(tmp_path / "old")


def test_a_book_beside_the_registry_and_the_command(tmp_path, capsys):
    """bert-base-uncased: a pooler and a head for sentences, in a model for masked words."""
    transformers = pytest.importorskip("transformers")
    from regraft.live.state_dict import convert_state_dict

    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
    )
    whole = transformers.BertForPreTraining(config)
    state = {
        k: v.numpy() for k, v in convert_state_dict(whole.state_dict(), to=V4, model=whole).items()
    }
    data = {**config.to_dict(), "architectures": ["BertForMaskedLM"]}
    src = write_folder(tmp_path / "src", state, data)
    words = ["convert", str(src), str(tmp_path / "new"), "--to", V5]
    assert main(words) == 1
    assert "--drop" in capsys.readouterr().err
    assert main([*words, "--drop", "cls.seq_relationship.*", "--drop", "bert.pooler.*"]) == 0
    assert "cls.seq_relationship.weight" in capsys.readouterr().out
    new = tensors_of(tmp_path / "new")
    assert not any("pooler" in name or "seq_rel" in name for name in new)
