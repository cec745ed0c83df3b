"""Adapters with something wrong: each is an error of its own before anything is written, never a wrong result.

Found by trying with transformers 5.23.0 and PEFT 0.21.2, which load most of them.
"""

import json
from itertools import pairwise

import numpy as np
import pytest
from rebuilt import V5, codes, lora, numbered, write_adapter, write_base

import regraft

Q = "base_model.model.model.layers.0.self_attn.q_proj."
SHAPES = lora({f"model.layers.{n}.self_attn.{m}_proj": (16, 16) for n in range(2) for m in "qv"})


def spoil(change):
    tensors = numbered(SHAPES)
    change(tensors)
    return tensors


TENSORS = {
    "three dims": lambda t: t.update({f"{Q}lora_A.weight": np.ones((2, 16, 1), np.float32)}),
    "whole numbers": lambda t: t.update({f"{Q}lora_A.weight": np.ones((2, 16), np.int32)}),
    "another rank": lambda t: t.update({f"{Q}lora_B.weight": np.ones((16, 3), np.float32)}),
    "other inputs": lambda t: t.update({f"{Q}lora_A.weight": np.ones((2, 8), np.float32)}),
    "half a pair": lambda t: t.pop(f"{Q}lora_B.weight"),
    "a module of nobody": lambda t: t.update(
        {k.replace("q_proj", "typo_proj"): v for k, v in t.items()}
    ),
    "a layer too many": lambda t: t.update(
        {k.replace("layers.1.", "layers.7."): v for k, v in t.items()}
    ),
    "a number beyond any": lambda t: t.update(
        {k.replace("layers.1.", f"layers.{10**20}."): v for k, v in t.items()}
    ),
}
CONFIGS = {
    "a list for a type": {"peft_type": ["LORA"]},
    "an object for a type": {"peft_type": {"a": 1}},
    "nobody's type": {"peft_type": "FOO"},
    "a rank of text": {"r": "two"},
    "no rank": {"r": 0},
    "a huge rank": {"r": 10**30},
    "alpha of text": {"lora_alpha": "x"},
    "targets of numbers": {"target_modules": 3},
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors(what, tmp_path):
    model = write_base(tmp_path / "base", "llama")
    src = write_adapter(tmp_path / "src", spoil(TENSORS[what]), target_modules=["q_proj", "v_proj"])
    with pytest.raises(regraft.RegraftError) as caught:
        regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert codes(caught) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("what", CONFIGS)
def test_settings(what, tmp_path):
    model = write_base(tmp_path / "base", "llama")
    settings = {"target_modules": ["q_proj", "v_proj"], **CONFIGS[what]}
    src = write_adapter(tmp_path / "src", SHAPES, **settings)
    with pytest.raises(regraft.RegraftError) as caught:
        regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert codes(caught) and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"r": NaN}', "[" * 100_000, '{"a": "\\ud800"}', "\0"]
)
def test_configs_that_are_none(text, tmp_path):
    model = write_base(tmp_path / "base", "llama")
    src = write_adapter(tmp_path / "src", SHAPES)
    (src / "adapter_config.json").write_text(text)
    with pytest.raises(regraft.RegraftError):
        regraft.convert(src, tmp_path / "new", to=V5, model=model)


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    model = write_base(tmp_path / "base", "llama")
    tensors = spoil(TENSORS["half a pair"])
    del tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"]
    src = write_adapter(tmp_path / "src", tensors, target_modules=["q_proj", "v_proj"])
    with pytest.raises(regraft.RegraftError) as caught:
        regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert len(caught.value.findings) == 2


def test_the_head_of_a_class_that_has_none_is_not_passed_over(tmp_path):
    model = write_base(tmp_path / "base", "llama")
    tensors = numbered(SHAPES) | {
        "base_model.model.value_head.weight": np.ones((1, 16), np.float32)
    }
    src = write_adapter(
        tmp_path / "src",
        tensors,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["value_head"],
    )
    with pytest.raises(regraft.UnmatchedKeysError) as caught:
        regraft.convert(src, tmp_path / "new", to=V5, model=model)
    assert "value_head" in str(caught.value)


def test_a_base_without_a_layer_of_the_adapter_is_a_wrong_base(tmp_path):
    from time import perf_counter

    model = write_base(tmp_path / "base", "llama", hidden_size=24)
    src = write_adapter(tmp_path / "src", SHAPES, target_modules=["q_proj", "v_proj"])
    times = []
    for _ in range(2):
        times.append(perf_counter())
        verdict = regraft.check(src, model=model)
        assert not verdict.healthy and "wrong-base" in json.dumps(verdict.to_dict())
    times.append(perf_counter())
    assert min(b - a for a, b in pairwise(times)) < 1
