"""Rules that begin at an index, rules that read one side only, and padding without meaning."""

import numpy as np
import pytest

from regraft.arrays.apply import apply_plan
from regraft.equation.notation import parse_equation
from regraft.errors import BadInputError
from regraft.layouts.graph import Edge
from regraft.names.keys import group_names
from regraft.planning.build import build_plan
from regraft.planning.model import Scope
from regraft.planning.plan import Headers
from regraft.rules.book import load_book
from regraft.rules.lint.book import lint_book
from regraft.rules.write import write_book

BOOK = """
name = "begins"
title = "Dense layers first: made for a test"
left = "one"
right = "other"
model_types = ["begins"]

[[equation]]
name = "norm"
text = "layers.{l}.norm : i == blocks.{l}.fused_norm : i"
left_kind = "vector"
right_kind = "vector"

[[equation]]
name = "norm before experts"
text = "layers.{l}.norm : i == blocks.{l}.own_norm : i where l from config.dense"
left_kind = "vector"
right_kind = "vector"

[[equation]]
name = "norms of all layers"
text = "layers.{l}.norm : i == blocks.norms : l i where l = config.layers"
left_kind = "any"
right_kind = "any"
reads = "right"

[[equation]]
name = "words"
text = "words : v i == rows : (v + p) i where v = config.words, p = config.padded - v, fill p = any"
left_kind = "any"
right_kind = "any"
"""


@pytest.fixture
def book(tmp_path):
    (tmp_path / "begins.toml").write_text(BOOK)
    return load_book(tmp_path / "begins.toml")


def move(book, to, state, **config):
    headers = Headers(group_names(list(state)), [a.shape for a in state.values()], ["float32"] * 9)
    scopes = {"begins": Scope({"dense": 1, "layers": 3, "words": 4, **config})}
    plan = build_plan(headers, [Edge.to(book, to)], scopes=scopes)
    return plan, apply_plan(plan, list(state.values()))


def norms(*names):
    return {name: np.full(2, n, np.float32) for n, name in enumerate(names)}


def test_a_rule_speaks_of_nothing_below_its_first_index(book):
    left = norms("layers.0.norm", "layers.1.norm", "layers.2.norm")
    right = norms("blocks.0.fused_norm", "blocks.1.own_norm", "blocks.2.own_norm")
    _, made = move(book, "other", left)
    assert {k: v.tolist() for k, v in made.items()} == {k: v.tolist() for k, v in right.items()}
    _, back = move(book, "one", made)
    assert {k: v.tolist() for k, v in back.items()} == {k: v.tolist() for k, v in left.items()}
    _, all_fused = move(book, "other", left, dense=3)
    assert all_fused.keys() == {f"blocks.{n}.fused_norm" for n in range(3)}


def test_a_rule_for_reading_writes_nothing(book):
    stacked = np.arange(6, dtype=np.float32).reshape(3, 2)
    _, made = move(book, "one", {"blocks.norms": stacked})
    assert [made[f"layers.{n}.norm"].tolist() for n in range(3)] == stacked.tolist()
    assert lint_book(book) == ()
    assert 'reads = "right"' in write_book(book)


def test_padding_without_meaning_is_left_and_said(book):
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    plan, made = move(book, "one", {"rows": rows})
    assert made["words"].tolist() == rows[:4].tolist()
    assert [entry.cut for entry in plan.entries] == [{"rows": 2}]
    _, back = move(book, "other", made)
    assert back["rows"].tolist() == rows[:4].tolist()
    _, padded = move(book, "other", made, padded=8)
    assert padded["rows"].tolist() == [*rows[:4].tolist(), *[[0, 0]] * 4]


def test_what_it_is_written_as():
    text = "a.{l} : v == b.{l} : (v + p) where v = config.v, l from config.k - 1, fill p = any"
    assert str(parse_equation(text)) == text
    assert str(parse_equation(str(parse_equation(text)))) == text


def test_only_a_loop_begins(tmp_path):
    (tmp_path / "begins.toml").write_text(BOOK.replace("l = config.layers", "l from config.dense"))
    with pytest.raises(BadInputError, match="l is no loop"):
        load_book(tmp_path / "begins.toml")
