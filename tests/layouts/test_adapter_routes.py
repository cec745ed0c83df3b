"""Adapters over several layouts, parts in several layouts, and questions whose answers are names."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import regraft
from regraft.cli import main
from regraft.errors import AmbiguousError
from regraft.storage.safetensors import open_tensors, write_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
CASE, BASE = GOLDEN / "cases/mixtral__gud_attn", GOLDEN / "bases/mixtral"
OWN = """
name = "{name}"
title = "A layout that nobody has"
left = "{left}"
right = "{right}"
model_types = ["mixtral"]

[[module]]
left = "blocks.{{l}}.query"
right = "model.layers.{{l}}.self_attn.q_proj"
kind = "linear"

[[carry]]
keys = ["{{*p}}.{{*q}}"]
why = "it is the same"
"""


def book(folder, name, left="own", right="transformers-v4"):
    path = folder / f"{name}.toml"
    path.write_text(OWN.format(name=name, left=left, right=right))
    return path


def tensors_of(folder):
    return open_tensors(folder / "adapter_model.safetensors")


def test_an_adapter_goes_over_several_layouts_and_back(tmp_path):
    rules = [book(tmp_path, "own"), "built-in"]
    v5, own, back = tmp_path / "v5", tmp_path / "made", tmp_path / "back"
    regraft.convert(CASE, v5, to="transformers-v5", model=BASE)
    report = regraft.convert(v5, own, to="own", model=BASE, rules=rules, verify=True)
    assert "the way is transformers-v5 -> transformers-v4 -> own" in report.adapters[0].evidence
    assert any(".blocks.0.query.lora_A" in name for name in tensors_of(own))
    report = regraft.convert(own, back, to="transformers-v5", model=BASE, rules=rules, verify=True)
    want, got = tensors_of(v5), tensors_of(back)
    assert want.keys() == got.keys()
    assert all(np.array_equal(want[name], got[name]) for name in want)


def test_a_family_goes_over_several_layouts(tmp_path):
    rules = [book(tmp_path, "own"), "built-in"]
    made = tmp_path / "made"
    report = regraft.convert(
        GOLDEN / "cases/mixtral__ia3_attn", made, to="own", model=BASE, rules=rules, verify=True
    )
    assert report.adapters[0].verified
    regraft.convert(
        made, tmp_path / "v5", to="transformers-v5", model=BASE, rules=rules, verify=True
    )


def test_every_answer_to_which_way_answers(tmp_path, capsys):
    one, other = book(tmp_path, "one", "own", "here"), book(tmp_path, "other", "own", "there")
    more = [book(tmp_path, name, name, "transformers-v4") for name in ("here", "there")]
    for path in more:
        text = path.read_text()
        start, end = text.index("[[module]]"), text.index("[[carry]]")
        path.write_text(text[:start] + text[end:])
    rules = [one, other, *more, "built-in"]
    with pytest.raises(AmbiguousError) as caught:
        regraft.convert(
            CASE, tmp_path / "out", to="own", model=BASE, rules=rules, source="transformers-v4"
        )
    choices = caught.value.findings[0].choices
    assert len(choices) == 2
    for number, choice in enumerate(choices):
        out = tmp_path / str(number)
        report = regraft.convert(CASE, out, to="own", model=BASE, rules=rules, source=choice.source)
        via = choice.source.split(",")[1]
        assert any(f"-> {via} ->" in each for each in report.adapters[0].evidence)


def test_every_answer_to_which_model_answers(tmp_path, capsys):
    folder = tmp_path / "adapter"
    folder.mkdir()
    ones = np.ones((2, 4), np.float32)
    start = "base_model.model.model.layers.0.mlp.gate"
    tensors = {f"{start}.lora_A.weight": ones, f"{start}.lora_B.weight": ones.T.copy()}
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["gate"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    args = ["convert", str(folder), str(out), "--to", "transformers-v4"]
    status = main([*args, "--json"])
    error = json.loads(capsys.readouterr().out).get("error")
    assert status == 1 and error["kind"] == "ambiguous"
    (finding,) = error["findings"]
    assert finding["code"] == "which-model" and len(finding["choices"]) > 1
    for choice in finding["choices"]:
        assert main([*args, "--from", choice["source"], "--overwrite"]) == 0, choice


def test_parts_may_be_of_two_layouts(tmp_path):
    """Each rule's keys are of one layout, and two rules' of two: each part moves by itself."""
    v5, mixed = tmp_path / "v5", tmp_path / "mixed"
    regraft.convert(BASE, v5, to="transformers-v5")
    old, new = (open_tensors(next(path.glob("*.safetensors"))) for path in (BASE, v5))
    router = {name: x for name, x in old.items() if name.endswith("block_sparse_moe.gate.weight")}
    assert router
    rest = {name: x for name, x in new.items() if not name.endswith("mlp.gate.weight")}
    mixed.mkdir()
    shutil.copy(v5 / "config.json", mixed)
    write_tensors(mixed / "model.safetensors", {**rest, **router}, {"format": "pt"})
    report = regraft.convert(mixed, tmp_path / "out", to="transformers-v5")
    assert "several layouts" in report.checkpoint.evidence[1]
    made = open_tensors(tmp_path / "out/model.safetensors")
    assert made.keys() == new.keys() and all(np.array_equal(made[n], new[n]) for n in new)
    regraft.convert(mixed, tmp_path / "old", to="transformers-v4")
    made = open_tensors(tmp_path / "old/model.safetensors")
    assert made.keys() == old.keys() and all(np.array_equal(made[n], old[n]) for n in old)


def test_every_answer_to_which_packing_answers(tmp_path, capsys):
    folder = tmp_path / "adapter"
    shutil.copytree(GOLDEN / "cases/granitemoe__params_attn", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["peft_version"] = None
    (folder / "adapter_config.json").write_text(json.dumps(config))
    args = ["convert", str(folder), str(tmp_path / "out"), "--to", "transformers-v4"]
    assert main([*args, "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    choices = error["findings"][0]["choices"]
    assert error["kind"] == "ambiguous" and len(choices) == 2
    made = []
    for choice in choices:
        assert main([*args, "--from", choice["source"], "--overwrite"]) == 0
        made.append({n: x.copy() for n, x in tensors_of(tmp_path / "out").items()})
    assert any(not np.array_equal(made[0][name], made[1][name]) for name in made[0])


def test_names_that_another_tools_layout_shares_tell_the_layout_of_adapters(tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    case = GOLDEN / "cases/mixtral__router"
    report = regraft.convert(case, there, to="transformers-v5", model=BASE, verify=True)
    assert "layout: transformers-v4 (found " in report.adapters[0].evidence[1]
    regraft.convert(there, back, to="transformers-v4", model=BASE, verify=True)
    assert tensors_of(back).keys() == tensors_of(case).keys()
