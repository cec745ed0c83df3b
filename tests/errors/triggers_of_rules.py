"""What provokes the codes of rule books, of the notation, of lint, of plans and of the command line."""

from dataclasses import replace

import numpy as np
from errors.lab import provokes
from making import book_of, equation_of, headers_of, plan_of, rule_book

import regraft
from regraft.arrays.anonymous import rearrange
from regraft.equation.notation import parse_key
from regraft.layouts.graph import edges_to
from regraft.planning.build import build_plan
from regraft.rules.book import Gap
from regraft.rules.lint.renames import Rename, lint_renames

STACK = "{*p}.{l}.experts.{e}.w : o i == {*p}.{l}.experts.w : e o i"


def experts(count):
    return {f"m.0.experts.{e}.w": (2, 3) for e in range(count)}


# Plans

_PLANS = {
    "unmatched": (STACK, {"z": (1,)}, {}),
    "missing": (STACK + " where e = config.experts", experts(3), {"experts": 5}),
    "extra": (STACK + " where e = config.experts", experts(4), {"experts": 3}),
    "shape": (STACK, {**experts(3), "m.0.experts.1.w": (2, 4)}, {}),
    "wrong-base": (STACK + " where o = config.size", experts(2), {"size": 9}),
    "unknown-size": ("x : (a + b) == y : a, z : b where a = config.size", {"x": (5,)}, {}),
    "mixed-layouts": (STACK, {**experts(2), "m.1.experts.w": (2, 2, 3)}, {}),
}


@provokes(*_PLANS)
def _(lab, code):
    text, tensors, config = _PLANS[code]
    plan_of(rule_book(text), tensors, config=config)


@provokes("doubled-target")
def _(lab):
    book = rule_book("a.{l} : o == c.{l} : o", "b.{l} : o == c.{l} : o")
    plan_of(book, {"a.0": (2,), "b.0": (2,)})


@provokes("two-rules")
def _(lab):
    book = rule_book("{*p}.x.{l} : o == {*p}.y.{l} : o", "a.{*p}.{l} : o == b.{*p}.{l} : o")
    plan_of(book, {"a.x.0": (2,)})


@provokes("other-layouts")
def _(lab):
    build_plan(headers_of(experts(3)), edges_to([rule_book(STACK)], "mine"))


@provokes("no-rule")
def _(lab):
    gap = Gap(parse_key("odd.{l}"), "the library does it in code")
    plan_of(replace(rule_book(STACK), gaps=(gap,)), {"odd.1": (2,)}, to="old")


@provokes("name")
def _(lab):
    headers_of({"a\0b": (1,)})


# Equations


@provokes("arrays")
def _(lab):
    rearrange("a i, b i == (a + b) i", np.zeros((2, 2)))


@provokes("copies-differ")
def _(lab):
    rearrange("t i == i where copies t", np.eye(2), t=2)


@provokes("padding")
def _(lab):
    rearrange("(a + p) == a where p = 1, fill p = 0", np.ones(3))


# Rule books

_BOOKS = {
    "notation": equation_of("{*p}.a.{l}.w : a b == {*p}.b.{l}.w : a c"),
    "undetermined": equation_of("x : (a + b) == y : a, z : b"),
    "kind": equation_of("x : a i == y : a i", left_kind="lineal"),
    "rule-book": "colour = 'red'\n",
}


@provokes(*_BOOKS)
def _(lab, code):
    book_of(_BOOKS[code])


@provokes("toml")
def _(lab):
    book_of("name = 3 3\n")


# Lint

_SOUND = equation_of(
    "{*p}.layers.{l}.up.weight : o i == {*p}.layers.{l}.mlp.up : o i where l < config.num_hidden_layers",
    "up",
)
_NORMS = "\n[[carry]]\nkeys = ['{*p}.norm.{*q}']\nwhy = 'norms stay'\n"


def _beside(text, kind="any"):
    return equation_of(text, text[:40], kind, kind)


_FAULTS = {
    "rules-overlap": _beside("{*p}.layers.{l}.up.weight : a b == {*p}.other.{l}.w : a b"),
    "collision": _beside("{*p}.layers.{l}.gate.weight : a b == {*p}.layers.{l}.mlp.up : a b"),
}
"""Rules beside a sound one: what is wrong with them."""


@provokes(*_FAULTS)
def _(lab, code):
    return lab.lint(_SOUND + _FAULTS[code])


_WARNED = {
    "shadowed": "\n[[carry]]\nkeys = ['{*p}.norm.weight : i']\nwhere = 'i = config.n'\nwhy = 'never counts'\n",
    "carry-collides": "\n[[carry]]\nkeys = ['{*p}.layers.{l}.mlp.{*q}']\nwhy = 'too wide'\n",
    "dead-table": "\n[[parameters]]\nside = 'right'\nmodule = '{*p}.layers.{l}.mpl'\nnames = ['up']\n",
    "eats-output": _beside("{*p}.layers.{l}.mlp.up : a b == {*p}.layers.{l}.ffn.up.weight : a b"),
    "not-idempotent": _beside(
        "{*p}.layers.{l}.down.weight : o i == {*p}.layers.{l}.down.weight : i o"
    ),
    "does-nothing": _beside(
        "{*p}.layers.{l}.o.weight : a b == {*p}.layers.{l}.o.weight : a b", "linear"
    ),
    "incomplete-index": _beside("{*p}.e.{l}.{e}.w : a i == {*p}.e.{l}.all : e a i"),
}
"""Warnings, which end with 4 where an error stands beside them."""


@provokes(*_WARNED)
def _(lab, code):
    return lab.lint(_SOUND + _NORMS + _WARNED[code] + _FAULTS["collision"])


_RENAMES = {
    "not-invertible": (r"layers\.\d+\.mlp", "mlp"),
    "runaway-regex": (r"(?:a+)+\.w", "x"),
    "loose-regex": (r"fc1.weight", "up.weight"),
    "dead-rule": (r"nowhere", "x"),
    "regex": (r"(a", "x"),
}


@provokes(*_RENAMES)
def _(lab, code):
    """Renames of another library: what the command prints of them has the status of its errors."""
    rename = Rename("rename", *_RENAMES[code], "list.py:1")
    faults = lint_renames([rename], ("a.b",) if code == "dead-rule" else ())
    return 4, [{"code": fault.finding.code} for fault in faults]


# The command line


@provokes("usage")
def _(lab):
    return lab.run("covnert")


@provokes("unknown-layout")
def _(lab):
    lab.convert(lab.adapter(), to="transformers-v9")


@provokes("internal")
def _(lab):
    def fail(*_, **__):
        raise ValueError("half way")

    lab.patch.setattr("regraft.converting.adapters.find_source", fail)
    return lab.run("convert", lab.adapter(), lab.out, "--to", "transformers-v5")


# Learning


@provokes("not-explained")
def _(lab):
    regraft.learn_from(lambda state: {"b": state["a"] + 1}, {"a": (3, 4)}, torch=False)


@provokes("not-verified")
def _(lab):
    one, two = np.random.default_rng(1).random((2, 4, 3)).astype(np.float32)
    regraft.learn({"a": one}, {"b": one.T}, ({"a": two}, {"b": two}))


@provokes("which-reading")
def _(lab):
    one = np.ones(3, np.float32)
    regraft.learn({"a": one, "b": one}, {"x": one, "y": one})


@provokes("not-a-number")
def _(lab):
    regraft.learn({"a": np.array([np.nan])}, {"b": np.array([1.0])})


@provokes("converter")
def _(lab):
    regraft.learn_from(lambda state: state["missing"], {"a": (3,)}, torch=False)


@provokes("unsteady")
def _(lab):
    random = np.random.default_rng(1)
    regraft.learn_from(lambda state: {"b": random.random(3)}, {"a": (3,)}, torch=False)


@provokes("probe")
def _(lab):
    regraft.learn_from(lambda state: state, {"a": (4000, 4000)}, torch=False)
