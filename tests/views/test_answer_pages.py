"""Pages of explain, diff and rules lint: they say what the command says, and hold every tensor once."""

import json
import shutil
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import regraft
from regraft.checking.rule_books import lint
from regraft.cli import main
from regraft.explaining.diff import diff
from regraft.explaining.explain import explain
from regraft.names.patterns import group_alike
from regraft.storage.safetensors import open_tensors, write_tensors
from regraft.views.answers import (
    page_of_diff,
    page_of_explanation,
    page_of_lint,
    path_of_text,
)
from regraft.views.model import STATES, path_of

GOLDEN = Path(__file__).parents[1] / "golden"
BASE = GOLDEN / "bases/mixtral"
MIXED = """\
[book]
name = "mixed"
title = "mixed"
layouts = ["transformers-v4", "transformers-v5"]
model_types = ["mixed"]

[[equation]]
name = "one"
text = "a.{l}.w : o i == b.{l}.w : o i"

[[equation]]
name = "two"
text = "c.{l}.w : o i == b.{l}.w : o i"
"""


def keys(side):
    found = Counter()
    for row in side.rows:
        assert row.state in STATES
        parts = [
            [part] if isinstance(part, str) else [str(n) for a, b in part for n in range(a, b + 1)]
            for part in row.path
        ]
        names = list(map(".".join, product(*parts)))
        assert row.count == len(names)
        found.update(names)
    return found


@given(st.sets(st.tuples(st.sampled_from("ab"), st.integers(0, 30), st.integers(0, 3)), min_size=1))
def test_patterns_in_words_are_read_back(names):
    for pattern in group_alike([f"{a}.{i}.x.{j}" for a, i, j in names]):
        if "…" not in str(pattern):
            assert path_of_text(str(pattern)) == path_of(pattern)


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    out = tmp_path_factory.mktemp("diff") / "v5"
    regraft.convert(BASE, out, to="transformers-v5")
    return out


@pytest.mark.parametrize("proposed", [False, True])
def test_diff_shows_every_tensor_of_both_once(new, proposed):
    page = page_of_diff(diff(BASE, new, propose_book=proposed))
    assert page.verdict.name == "Equal"
    assert keys(page.left) == Counter(open_tensors(BASE / "model.safetensors").keys())
    assert keys(page.right) == Counter(open_tensors(new / "model.safetensors").keys())
    (flow,) = [flow for flow in page.flows if "gate_up_proj" in flow.note]
    assert {page.left.rows[i].path[-2] for i in flow.sources} == {"w1", "w3"}
    assert [page.right.rows[i].path[-1] for i in flow.targets] == ["gate_up_proj"]
    assert flow.state == "fused"
    assert (proposed and page.next[0].value.startswith("#")) or bool(page.next) == proposed


def test_diff_shows_what_differs(new, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(new, changed)
    stored = open_tensors(new / "model.safetensors")
    tensors = {name: array.copy() for name, array in stored.items()}
    tensors["model.layers.1.mlp.experts.gate_up_proj"].view(np.uint8).reshape(-1)[0] ^= 1
    tensors["more"] = tensors.pop("model.norm.weight")
    write_tensors(changed / "model.safetensors", tensors, {"format": "pt"})
    page = page_of_diff(diff(BASE, changed))
    assert page.verdict.name == "Not equal"
    assert keys(page.right)["model.layers.1.mlp.experts.gate_up_proj"] == 1
    (wrong,) = [row for row in page.right.rows if row.state == "differs"]
    assert wrong.path == ("model", "layers", "1", "mlp", "experts", "gate_up_proj")
    assert [row.path for row in page.right.rows if row.state == "extra"] == [("more",)]


@pytest.mark.parametrize(
    ("key", "verdict", "left", "right"),
    [
        ("layers.0.block_sparse_moe.experts.1.w3.weight", "Moved", "fused", "fused"),
        ("layers.0.block_sparse_moe.gate.weight", "Moved", "renamed", "renamed"),
        ("embed_tokens.weight", "Carried over", "kept", "kept"),
        ("layers.0.block_sparse_moe.experts.1.w4.weight", "It goes nowhere", "unmatched", None),
    ],
)
def test_explain(key, verdict, left, right):
    found = explain(BASE, f"model.{key}", to="transformers-v5")
    page = page_of_explanation(found)
    assert page.verdict.name == verdict
    assert {row.state for row in page.left.rows} == {left}
    assert (page.right is None) == (right is None)
    if right is not None:
        assert {row.state for row in page.right.rows} == {right}
        assert f"model.{key}" in keys(page.left)
        assert any(row.facts.get("asked for") for row in page.left.rows)
    else:
        assert any("'w1' where the key has 'w4'" in note for note in page.notes)


def test_lint_shows_severities_as_states(tmp_path):
    book = tmp_path / "mixed.toml"
    book.write_text(MIXED)
    found = lint(str(book))
    assert not found.sound
    page = page_of_lint(found)
    shown = Counter(row.state for row in page.left.rows)
    assert shown["problem"] == sum(fault.severity == "error" for fault in found.faults)
    assert page.verdict.name == "Not sound"
    assert any(row.group.startswith("mixed.toml:") for row in page.left.rows)
    sound = page_of_lint(lint("mixtral"))
    assert sound.verdict.name == "Sound" and sound.left is None


@pytest.mark.parametrize(
    ("args", "status", "verdict"),
    [
        (("explain", BASE, "model.norm.weight", "--to", "transformers-v5"), 0, "Carried over"),
        (("explain", BASE, "no.such", "--to", "transformers-v5"), 4, "It goes nowhere"),
        (("explain", "nowhere", "x", "--to", "transformers-v5"), 1, "Bad input"),
        (("diff", BASE, BASE), 0, "Equal"),
        (("diff", BASE, "nowhere"), 1, "Bad input"),
        (("rules", "lint", "mixtral"), 0, "Sound"),
        (("rules", "lint", "no-such-book"), 1, "Bad input"),
    ],
)
def test_the_commands_write_them(args, status, verdict, tmp_path, capsys):
    file = tmp_path / "page.html"
    assert main([*map(str, args), "--html", str(file)]) == status
    data = json.loads(file.read_text().split('id="data">')[1].split("</script>")[0])
    assert data["page"]["verdict"]["name"] == verdict
    assert ("Page: " in capsys.readouterr().out) == (status != 1)
