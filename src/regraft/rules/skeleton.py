"""The start of a rule book: one that is sound already, with a test by the conformance kit beside it."""

from __future__ import annotations

_BOOK = """\
name = "{name}"
title = "{name}: what differs between {left} and {right}, in a line"
left = "{left}"
right = "{right}"
model_types = ["{model_type}"]
source = "where this is known from: a release, and a file of its source"

# Each [[equation]] says how tensors of one side are those of the other. {{l}} and {{e}} count, {{*p}} is any prefix.
# Dimensions stand after the colon: e (a + b) i is a stack of a on b, for each e.

[[equation]]
name = "gate and up"
text = '''
{{*p}}.layers.{{l}}.mlp.gate.weight : a i
{{*p}}.layers.{{l}}.mlp.up.weight : b i
    == {{*p}}.layers.{{l}}.mlp.gate_up.weight : (a + b) i
where a = b
'''
left_kind = "linear"
right_kind = "linear"

# What is the same on both sides, and why.

[[carry]]
keys = ["{{*p}}.layers.{{l}}.mlp.down.weight : o i"]
kind = "linear"
why = "down is the same in both"

[[carry]]
keys = ["{{*p}}.norm.{{*q}} : ..."]
kind = "any"
why = "norms are the same in both"
"""

_TEST = '''\
"""{name}.toml carries every element there and back; run it with pytest."""

from pathlib import Path

from regraft import load_book
from regraft.testing import check_book

SHAPES = {{
    "model.layers.0.mlp.gate.weight": (6, 4),
    "model.layers.0.mlp.up.weight": (6, 4),
    "model.layers.0.mlp.down.weight": (4, 6),
    "model.norm.weight": (4,),
}}
"""Tensors of {left}, small, with no two axes alike."""


def test_the_book_is_a_bijection():
    check_book(load_book(Path(__file__).with_name("{file}")), SHAPES)
'''


def book_text(name: str, left: str, right: str, model_type: str) -> str:
    """A book with one equation and two carry-overs, to be changed."""
    return _BOOK.format(name=name, left=left, right=right, model_type=model_type)


def test_text(name: str, left: str, file: str) -> str:
    """Its test."""
    return _TEST.format(name=name, left=left, file=file)
