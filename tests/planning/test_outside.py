"""Every name is one that the model has: what a book only seems to know is asked about, and never passed over."""

import json

import numpy as np
import pytest
from checkpoints.models import MIXTRAL, mixtral, write_folder

import regraft
from regraft.errors import UnmatchedKeysError
from regraft.names.keys import group_names
from regraft.planning.lookup import Lookup
from regraft.planning.model import ModelConfig, Told
from regraft.planning.outside import outside
from regraft.planning.own_class import told_by_class
from regraft.rules.book import books_for
from regraft.storage.safetensors import write_tensors

MODEL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
NAMES = [f"model.layers.{n}.self_attn.{p}_proj.weight" for n in range(3) for p in "qkvo"] + [
    "model.norm.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
]
STRANGE = [
    "model.layers.0.self_attn.foo_proj.weight",
    "model.layers.0.self_attn.q_proj.foo",
    "model.layers.0.self_attn.q_proj.inner.weight",
    "model.layers.0.self_attn.sinks",
    "model.layers.0.linear_attn.out_proj.weight",
    "model.layers.0.input_layernorm.foo",
    "model.norm.foo",
    "lm_head.foo.weight",
]
ELSEWHERE = [
    "model.layers.0.foo.norm.weight",
    "foo.norm.weight",
    "model.foo.embed_tokens.weight",
    "foo.layers.0.self_attn.q_proj.weight",
]


class Known:
    """Something that has one class with some names."""

    def __init__(self, book=None, there=True):
        self.told, self.there, self.asked = book and Told(book, "asked"), there, 0

    def has_class(self, names):
        return self.there

    def book(self):
        self.asked += 1
        return self.told


def asked(names, foreign, config=None):
    model = ModelConfig(MODEL if config is None else config, "config.json")
    books = books_for(["mixtral"])
    scopes = {book.name: model.scope_of(book.model_types) for book in books}
    return told_by_class(Lookup.of(books, group_names(names), scopes), model, foreign, foreign.book)


def test_what_a_book_names_is_asked_of_nobody():
    known = Known()
    assert asked(NAMES, known) == (None, ()) and not known.asked
    assert not outside(Lookup.of(books_for(["mixtral"]), group_names(NAMES)), None)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_name_that_is_elsewhere_is_for_the_class_to_say(name):
    book, *_ = books_for(["llama"])
    told, notes = asked([*NAMES, name], Known(book))
    assert told is not None and told.book is book and not notes
    _, (note,) = asked([*NAMES, name], Known(there=None))
    assert name in note and "transformers is not installed" in note
    _, (note,) = asked([*NAMES, name], Known(there=False))
    assert "MixtralForCausalLM is not a class of transformers" in note
    _, (note,) = asked([*NAMES, name], Known(), {"model_type": "mixtral"})
    assert "the config names no class" in note


def test_the_class_is_believed_where_it_knows_all_names():
    book, *_ = books_for(["qwen3_next"])
    name = "model.layers.0.linear_attn.out_proj.weight"
    assert asked([*NAMES, name], Known(book))[0].book is book
    assert asked([*NAMES, "model.layers.0.foo"], Known(book)) == (None, ())


@pytest.mark.parametrize("name", STRANGE)
def test_a_module_that_no_model_has_is_an_error(name, tmp_path):
    tensors = {**mixtral(), name: np.ones((8, 8), np.float32)}
    src = write_folder(tmp_path / "src", tensors, MIXTRAL)
    with pytest.raises(UnmatchedKeysError) as caught:
        regraft.convert(src, tmp_path / "new", to="transformers-v5")
    (finding,) = caught.value.findings
    assert finding.key == name and "--keep" in (finding.fix or "")
    report = regraft.convert(src, tmp_path / "new", to="transformers-v5", keep=[name])
    assert any(name in note for note in report.notes)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_could_not_be_checked_is_said(name, tmp_path):
    tensors = {**mixtral(), name: np.ones((8, 8), np.float32)}
    src = write_folder(tmp_path / "src", tensors, MIXTRAL)
    report = regraft.convert(src, tmp_path / "new", to="transformers-v5")
    assert [n for n in report.notes if "could not be checked" in n and name in n]


@pytest.mark.parametrize("name", ["score.weight", "qa_outputs.weight"])
def test_a_head_of_another_class_is_for_the_class_to_say(name, tmp_path):
    tensors = {**mixtral(), name: np.ones((2, 8), np.float32)}
    config = {**MIXTRAL, "architectures": ["MixtralForCausalLM"]}
    src = write_folder(tmp_path / "src", tensors, config)
    with pytest.raises(UnmatchedKeysError) as caught:
        regraft.convert(src, tmp_path / "new", to="transformers-v5")
    assert {finding.key for finding in caught.value.findings} == {name}
    report = regraft.convert(src, tmp_path / "new", to="transformers-v5", drop=[name])
    assert any(name in note for note in report.notes)


def test_an_adapter_for_a_module_that_no_model_has_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    size = MIXTRAL["hidden_size"]
    src = tmp_path / "src"
    src.mkdir()
    tensors = {
        f"base_model.model.model.layers.0.self_attn.{module}.lora_{letter}.weight": np.ones(
            (2, size) if letter == "A" else (size, 2), np.float32
        )
        for module in ("q_proj", "foo_proj")
        for letter in "AB"
    }
    write_tensors(src / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj", "foo_proj"],
    }
    (src / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnmatchedKeysError) as caught:
        regraft.convert(src, tmp_path / "new", to="transformers-v5", model=tmp_path)
    assert "foo_proj" in (caught.value.findings[0].key or "")
