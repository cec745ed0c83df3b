"""Faults planted by hand, in rule books, checkpoints and adapters: each is found, with the line that it is on."""

import json
import re
import shutil
from pathlib import Path

import pytest

from regraft.cli import main
from regraft.rules import book as books
from regraft.storage.safetensors import open_tensors, write_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
ADAPTER, BASE = GOLDEN / "cases/mixtral__gud_attn", GOLDEN / "bases/mixtral"
LIBRARY = Path(books.__file__).parent / "library"

HEAD = """name = "planted"
title = "a book with a fault"
left = "old"
right = "new"
model_types = ["mixtral"]
"""

SOUND = """
[[equation]]
name = "up"
text = "{*p}.layers.{l}.up.weight : o i == {*p}.layers.{l}.mlp.up : o i where l < config.num_hidden_layers"

[[carry]]
keys = ["{*p}.norm.{*q}"]
why = "norms stay"
"""


def equation(name, text, kinds="any"):
    return (
        f"\n[[equation]]\nname = '{name}'\ntext = '''\n{text}\n'''\n"
        f"left_kind = '{kinds}'\nright_kind = '{kinds}'\n"
    )


# What is planted: the code that tells it, the severity, and the body; the fault is in the last table.
PLANTED = {
    "two rules claim one key": (
        "rules-overlap",
        "error",
        SOUND + equation("again", "{*p}.layers.{l}.up.weight : a b == {*p}.other.{l}.w : a b"),
    ),
    "two rules make one key": (
        "collision",
        "error",
        SOUND
        + equation(
            "same result", "{*p}.layers.{l}.gate.weight : a b == {*p}.layers.{l}.mlp.up : a b"
        ),
    ),
    "a carry-over behind a wider one": (
        "shadowed",
        "warning",
        SOUND
        + "\n[[carry]]\nkeys = ['{*p}.norm.weight : i']\nwhere = 'i = config.hidden_size'\nwhy = 'never counts'\n",
    ),
    "a rule that eats another's output": (
        "eats-output",
        "warning",
        SOUND
        + equation("eats", "{*p}.layers.{l}.mlp.up : a b == {*p}.layers.{l}.ffn.up.weight : a b"),
    ),
    "no way back": (
        "undetermined",
        "error",
        SOUND
        + equation("fuse", "{*p}.q.{l}.w : a i, {*p}.k.{l}.w : b i == {*p}.qk.{l}.w : (a + b) i"),
    ),
    "one name for two things": (
        "not-idempotent",
        "warning",
        SOUND
        + equation(
            "turned", "{*p}.layers.{l}.down.weight : o i == {*p}.layers.{l}.down.weight : i o"
        ),
    ),
    "an index that is left out": (
        "incomplete-index",
        "warning",
        SOUND
        + equation(
            "shards",
            "{*p}.shard.0.w : a i\n{*p}.shard.1.w : b i\n{*p}.shard.3.w : c i\n"
            "    == {*p}.whole : (a + b + c) i\nwhere a = b, b = c",
        ),
    ),
    "a number that only the keys tell": (
        "incomplete-index",
        "warning",
        SOUND + equation("experts", "{*p}.e.{l}.{e}.w : a i == {*p}.e.{l}.all : e a i"),
    ),
    "parameters of no module": (
        "dead-table",
        "warning",
        SOUND
        + "\n[[parameters]]\nside = 'right'\nmodule = '{*p}.layers.{l}.mpl'\nnames = ['up']\n",
    ),
    "a carry-over of what a rule makes": (
        "carry-collides",
        "warning",
        SOUND + "\n[[carry]]\nkeys = ['{*p}.layers.{l}.mlp.{*q}']\nwhy = 'too wide'\n",
    ),
    "a rule that does nothing": (
        "does-nothing",
        "warning",
        SOUND
        + equation(
            "idle", "{*p}.layers.{l}.o.weight : a b == {*p}.layers.{l}.o.weight : a b", "linear"
        ),
    ),
    "a kind that does not fit": (
        "kind",
        "error",
        SOUND + equation("kinds", "{*p}.a.{l}.w : a b == {*p}.b.{l}.w : a b", "experts"),
    ),
    "a box without a partner": (
        "notation",
        "error",
        SOUND + equation("boxes", "{*p}.a.{l}.w : a b == {*p}.b.{l}.w : a c"),
    ),
}


def last_table(text):
    return max(n for n, line in enumerate(text.splitlines(), 1) if line.startswith("[["))


def lint(capsys, *args):
    status = main(["rules", "lint", *map(str, args), "--json"])
    return status, json.loads(capsys.readouterr().out)["faults"]


@pytest.mark.parametrize("name", PLANTED)
def test_faults_in_a_book(name, tmp_path, capsys):
    code, severity, body = PLANTED[name]
    file = tmp_path / "planted.toml"
    file.write_text(HEAD + body)
    status, faults = lint(capsys, file)
    found = {
        (fault["severity"], fault["finding"]["where"])
        for fault in faults
        if fault["finding"]["code"] == code
    }
    assert found == {(severity, f"{file}:{last_table(HEAD + body)}")}, faults
    assert status == (4 if severity == "error" else 0)


def test_a_sound_book(tmp_path, capsys):
    file = tmp_path / "sound.toml"
    file.write_text(HEAD + SOUND)
    assert lint(capsys, file) == (0, [])


def line_of(file, name):
    lines = (LIBRARY / file).read_text().splitlines()
    at = lines.index(f'name = "{name}"')
    return at if lines[at - 1] == "[[equation]]" else None


def test_a_misspelt_rule_never_fires(tmp_path, capsys):
    text = (LIBRARY / "mixtral.toml").read_text()
    text = text.replace(
        "block_sparse_moe.gate.weight : r i ==", "block_sparse_mo.gate.weight : r i =="
    )
    text = text.replace("mlp.gate.weight : r i\n", "mpl.gate.weight : r i\n")
    shutil.copy(LIBRARY / "_decoder.toml", tmp_path)
    file = tmp_path / "mixtral.toml"
    file.write_text(text)
    status, faults = lint(capsys, file, "--keys", BASE)
    dead, unmatched = (
        next(f["finding"] for f in faults if f["finding"]["code"] == code)
        for code in ("dead-rule", "unmatched")
    )
    assert dead["where"] == f"{file}:{line_of('mixtral.toml', 'router')}"
    assert unmatched["key"] == "model.layers.0.block_sparse_moe.gate.weight"
    assert status == 4


def test_a_module_is_dead_where_nothing_of_it_is_there(tmp_path, capsys):
    """Mixtral has no biases, which a rule for modules would move."""
    part = """
[[module]]
name = "{name}"
left = "{{*p}}.layers.{{l}}.{module}"
right = "{{*p}}.layers.{{l}}.x.{module}"
kind = "linear"
"""
    text = (LIBRARY / "mixtral.toml").read_text()
    text += part.format(name="of all", module="self_attn.q_proj")
    text += part.format(name="of none", module="self_attn.qq_proj")
    shutil.copy(LIBRARY / "_decoder.toml", tmp_path)
    file = tmp_path / "mixtral.toml"
    file.write_text(text)
    _, faults = lint(capsys, file, "--keys", BASE)
    dead = [f["finding"]["rule"] for f in faults if f["finding"]["code"] == "dead-rule"]
    assert "of none" in dead and not any("of all" in (rule or "") for rule in dead)


def copy_base(tmp_path, change):
    folder = tmp_path / "base"
    shutil.copytree(BASE, folder)
    tensors = {n: t.copy() for n, t in open_tensors(folder / "model.safetensors").items()}
    change(tensors)
    write_tensors(folder / "model.safetensors", tensors, {})
    return folder


def copy_adapter(tmp_path, change):
    folder = tmp_path / "adapter"
    shutil.copytree(ADAPTER, folder)
    file = folder / "adapter_model.safetensors"
    tensors = {n: t.copy() for n, t in open_tensors(file).items()}
    write_tensors(file, change(tensors), {})
    return folder


def test_an_expert_that_is_missing(tmp_path, capsys):
    def change(tensors):
        del tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"]

    status, faults = lint(capsys, "mixtral", "--keys", copy_base(tmp_path, change))
    (found,) = [f["finding"] for f in faults if f["finding"]["code"] == "incomplete-index"]
    assert found["where"] == f"mixtral.toml:{line_of('mixtral.toml', 'experts down')}"
    assert "number 2 of 4" in found["message"]
    assert status == 4


def explain(capsys, *args):
    status = main(["explain", *map(str, args), "--to", "transformers-v5", "--json"])
    return status, json.loads(capsys.readouterr().out)


def renamed(old, new):
    return lambda tensors: {re.sub(old, new, name): t for name, t in tensors.items()}


def test_a_key_of_an_adapter_that_no_rule_knows(tmp_path, capsys):
    folder = copy_adapter(tmp_path, renamed(r"experts\.(\d)\.w2", r"experts.\1.w4"))
    key = "base_model.model.model.layers.1.block_sparse_moe.experts.0.w4.lora_A.weight"
    status, found = explain(capsys, folder, key, "--model", BASE)
    assert (status, found["fate"]) == (4, "unmatched")
    near = {(n["where"], n["expected"], n["found"], n["at"]) for n in found["near"]}
    assert (f"mixtral.toml:{line_of('mixtral.toml', 'experts down')}", "w2", "w4", 6) in near
    assert "model.layers.1.block_sparse_moe.experts.0.w1.weight" in found["closest"]


def test_a_scope_that_is_spelt_otherwise(tmp_path, capsys):
    folder = copy_adapter(tmp_path, renamed("block_sparse_moe", "sparse_block_moe"))
    key = "model.layers.0.sparse_block_moe.experts.1.w1.weight"
    status, found = explain(capsys, folder, key, "--model", BASE)
    assert status == 4
    first = found["near"][0]
    assert first["where"] == f"mixtral.toml:{line_of('mixtral.toml', 'experts gate and up')}"
    assert (first["expected"], first["found"]) == ("block_sparse_moe", "sparse_block_moe")


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [(r"experts\.3", "experts.9", "extra"), (r"layers\.1\.block", "layers.7.block", "wrong-base")],
)
def test_an_index_that_the_base_has_not(tmp_path, capsys, old, new, code):
    folder = copy_adapter(tmp_path, renamed(old, new))
    key = next(
        n for n in open_tensors(folder / "adapter_model.safetensors") if new in n.replace("\\", "")
    )
    status, found = explain(capsys, folder, key, "--model", BASE)
    problems = [p for p in found["problems"] if p["code"] == code]
    lines = [line_of("mixtral.toml", f"experts {name}") for name in ("gate and up", "down")]
    lines.append(line_of("mixtral.toml", "router"))
    assert status == 4
    assert any(f"(mixtral.toml:{line})" in problems[0]["rule"] for line in lines)


def test_a_wrapper_in_the_keys(tmp_path, capsys):
    folder = copy_adapter(tmp_path, renamed(r"base_model\.model\.", "base_model.model.module."))
    key = next(iter(open_tensors(folder / "adapter_model.safetensors")))
    status, found = explain(capsys, folder, key, "--model", BASE)
    assert (status, found["problems"]) == (0, [])
    assert found["key"] == key


def test_the_genuine_ones_have_no_faults(capsys):
    status, faults = lint(capsys, "mixtral", "--keys", BASE)
    # Of MiniMax, which the book is for as well: M2 alone has a bias, and the first one lightning attention.
    assert status == 0
    assert [(fault["severity"], fault["finding"]["rule"]) for fault in faults] == [
        ("warning", "router bias"),
        ("note", None),
    ]
    line = int(faults[1]["finding"]["where"].rpartition(":")[2])
    carry = "\n".join((LIBRARY / "mixtral.toml").read_text().splitlines()[line - 1 :])
    assert carry.startswith("[[carry]]")
    assert "lightning attention" in carry.partition("\n\n")[0]
    for name in open_tensors(ADAPTER / "adapter_model.safetensors"):
        status, found = explain(capsys, ADAPTER, name)
        assert status == 0, found
        assert found["fate"] in ("moved", "carried")
        if "experts" in name:
            assert found["pieces"][0]["source"] == found["base"]
            break
