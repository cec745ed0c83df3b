"""A checkpoint over several layouts: one plan, and each byte moves once."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import regraft
from regraft.errors import BadInputError
from regraft.rules.book import library, load_book
from regraft.rules.write import write_book
from regraft.storage.safetensors import open_tensors

BASE = Path(__file__).parents[1] / "golden/bases/mixtral"
FLAT = """
name = "flat"
title = "Flat: experts turned, gate and up apart"
left = "transformers-v5"
right = "flat"
model_types = ["mixtral"]

[[equation]]
name = "down, turned"
text = "{*p}.experts.down_proj : e o f == {*p}.experts.down : f (e o) where e = config.num_local_experts"
left_kind = "any"
right_kind = "any"

[[equation]]
name = "gate and up apart"
text = "{*p}.experts.gate_up_proj : e (a + b) i == {*p}.experts.gate : a e i, {*p}.experts.up : e i b where a = b"
left_kind = "any"
right_kind = "any"

[[carry]]
keys = ["{*p}.{*q}", "lm_head.weight"]
why = "it is the same"
"""


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "flat.toml"
    path.write_text(FLAT)
    return [path, "built-in"]


def tensors_in(folder):
    return open_tensors(next(folder.glob("*.safetensors")))


def test_a_route_gives_what_its_steps_give(tmp_path, rules):
    v5, two, one, back = (tmp_path / name for name in ("v5", "two", "one", "back"))
    regraft.convert(BASE, v5, to="transformers-v5")
    regraft.convert(v5, two, to="flat", source="transformers-v5", rules=rules)
    done = regraft.convert(BASE, one, to="flat", source="transformers-v4", rules=rules)
    assert done.checkpoint.source_layout == "transformers-v4"
    wanted, made = tensors_in(two), tensors_in(one)
    assert sorted(wanted) == sorted(made)
    assert all(np.array_equal(wanted[name], made[name]) for name in wanted)
    regraft.convert(one, back, to="transformers-v4", source="flat", rules=rules)
    first, again = tensors_in(BASE), tensors_in(back)
    assert sorted(first) == sorted(again)
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_two_ways_of_one_length_are_a_question(tmp_path, rules):
    (mixtral,) = (b for b in library() if b.name == "mixtral")
    flat = load_book(rules[0])
    detour = [replace(mixtral, name="d1", right="there"), replace(flat, name="d2", left="there")]
    with pytest.raises(regraft.AmbiguousError) as caught:
        regraft.convert(
            BASE, tmp_path / "o", to="flat", source="transformers-v4", rules=[*detour, *rules]
        )
    assert "there -> flat" in str(caught.value)


def test_a_layout_that_no_route_leads_to(tmp_path, rules):
    text = write_book(load_book(rules[0])).replace('"transformers-v5"', '"elsewhere"')
    rules[0].write_text(text)
    with pytest.raises(BadInputError):
        regraft.convert(BASE, tmp_path / "o", to="flat", source="transformers-v4", rules=rules)
