"""Hazards of ordered renames: each is found, with its line and with a key that goes wrong."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.rules.lint.renames import Rename, apply_all, example_of, lint_renames


def renames(*pairs):
    return [Rename(f"rename {i}", a, b, f"list.py:{i}") for i, (a, b) in enumerate(pairs, 1)]


def codes(faults):
    return {(f.severity, f.finding.code, f.finding.where) for f in faults}


CASES = {
    "it eats the output of the one before": (
        [(r"norm0", "norm1"), (r"norm1", "norm2")],
        (),
        ("warning", "eats-output", "list.py:2"),
    ),
    "a wrapper's name inside a prefix": (
        [(r"^base_model\.model\.", ""), (r"^model\.", "")],
        ("base_model.model.model.w",),
        ("warning", "eats-output", "list.py:2"),
    ),
    "it comes too late": (
        [(r"block_sparse_moe", "mlp"), (r"block_sparse_moe\.bias", "mlp.gate.bias")],
        (),
        ("error", "shadowed", "list.py:2"),
    ),
    "twice is not once": (
        [(r"^layers", "model.layers"), (r"weight$", "weight.weight")],
        (),
        ("warning", "not-idempotent", "list.py:2"),
    ),
    "two keys become one": (
        [(r"\.(gate|up)\.", ".fused.")],
        ("m.gate.w", "m.up.w"),
        ("error", "collision", "list.py:1"),
    ),
    "no way back": (
        [(r"layers\.\d+\.mlp", "mlp")],
        (),
        ("warning", "not-invertible", "list.py:1"),
    ),
    "exponential time": ([(r"(?:a+)+\.w", "x")], (), ("error", "runaway-regex", "list.py:1")),
    "two parts across segments": (
        [(r"^(.*)\.mlp\.(.*)", r"\1.ffn.\2")],
        (),
        ("warning", "runaway-regex", "list.py:1"),
    ),
    "indices below ten": (
        [(r"layers\.(\d)\.", r"l.\1.")],
        (),
        ("error", "incomplete-index", "list.py:1"),
    ),
    "a dot that is any letter": (
        [(r"fc1.weight", "up.weight")],
        (),
        ("note", "loose-regex", "list.py:1"),
    ),
    "part of a word": (
        [(r"gate", "router")],
        ("mlp.gate.weight", "mlp.gate_proj.weight"),
        ("warning", "loose-regex", "list.py:1"),
    ),
    "it matches nothing": ([(r"nowhere", "x")], ("a.b",), ("warning", "dead-rule", "list.py:1")),
    "no expression": ([(r"(a", "x")], (), ("error", "regex", "list.py:1")),
    "a group that is not there": ([(r"a", r"\1")], (), ("error", "regex", "list.py:1")),
}


@pytest.mark.parametrize("name", CASES)
def test_hazards(name):
    pairs, keys, expected = CASES[name]
    faults = lint_renames(renames(*pairs), keys)
    assert expected in codes(faults)
    assert all(fault.finding.fix for fault in faults)


def test_the_example_goes_wrong():
    (fault,) = lint_renames(renames(("norm0", "norm1"), ("norm1", "norm2")))
    assert fault.other == "rename 1 (list.py:1)"
    assert apply_all(renames(("norm0", "norm1"), ("norm1", "norm2")), fault.example)[-1] == "norm2"


def test_sound_renames():
    sound = renames(
        (r"^encoder\.layer\.(\d+)\.attn\.", r"layers.\1.self_attn."), (r"^pooler\.", "pool.")
    )
    keys = [f"encoder.layer.{n}.attn.{part}.weight" for n in range(12) for part in "qkv"]
    assert lint_renames(sound, [*keys, "pooler.weight"]) == ()


expressions = st.recursive(
    st.sampled_from(["a", "b", r"\.", r"\d+", "[xy]", "[^.]", ".", r"\w", "(?:c|d)", "7"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        inner.map(lambda part: f"({part})"),
        inner.map(lambda part: f"(?:{part})?"),
    ),
    max_leaves=6,
)


@given(expressions)
def test_examples_match(source):
    example = example_of(source)
    assert re.fullmatch(source, example) or re.search(source, example)


@given(st.lists(st.tuples(expressions, st.sampled_from(["", "x", "a.b", "7"])), max_size=4))
def test_never_stumbles(pairs):
    for fault in lint_renames(renames(*pairs), ("a.b.7", "x.y", "")):
        assert fault.finding.where.startswith("list.py:")
