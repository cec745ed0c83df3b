"""The public names, the options that functions and the command line share, and results that print themselves."""

import inspect
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import regraft
from regraft.cli import main
from regraft.cli.app import app
from regraft.layouts.names import known_layouts
from regraft.layouts.spelled import LayoutName
from regraft.options import (
    CheckOptions,
    ConvertOptions,
    DiffOptions,
    ExplainOptions,
    ExtractOptions,
    InspectOptions,
    LearnOptions,
    MergeOptions,
    ProbeOptions,
    SlicesOptions,
    VerifyOptions,
    described,
)
from regraft.rules.book import library
from regraft.storage.safetensors import open_tensors, write_tensors

GOLDEN = Path(__file__).parent.parent / "golden"
CASE, BASE = GOLDEN / "cases/mixtral__gud_attn", GOLDEN / "bases/mixtral"


def test_every_public_name_is_listed_and_found():
    assert set(regraft.__all__) <= set(dir(regraft))
    assert set(regraft._LAZY) <= set(regraft.__all__)
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        regraft.convrt  # noqa: B018


@pytest.mark.parametrize(
    ("function", "options", "more"),
    [
        (regraft.convert, ConvertOptions, {"key", "tell", "progress"}),
        (regraft.check, CheckOptions, {"tool", "peft"}),
        (regraft.inspect, InspectOptions, set()),
        (regraft.verify, VerifyOptions, {"progress"}),
        (regraft.diff, DiffOptions, {"propose_book"}),
        (regraft.explain, ExplainOptions, set()),
        (regraft.merge, MergeOptions, {"progress"}),
        (regraft.extract, ExtractOptions, {"progress"}),
        (regraft.learn, LearnOptions, {"layouts", "name", "configs", "model_types", "model"}),
        (regraft.slices, SlicesOptions, {"names", "box"}),
    ],
)
def test_a_function_takes_what_its_options_say(function, options, more):
    taken = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in more
    }
    fields = {field.name: field for field in described(options)}
    assert taken.keys() == fields.keys()
    for name, parameter in taken.items():
        if parameter.default is not inspect.Parameter.empty:
            assert parameter.default == fields[name].default, name
        assert re.search(rf"\b{name}(:|``)", function.__doc__), name


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("convert", ConvertOptions),
        ("check", CheckOptions),
        ("inspect", InspectOptions),
        ("verify", VerifyOptions),
        ("diff", DiffOptions),
        ("explain", ExplainOptions),
        ("merge", MergeOptions),
        ("extract", ExtractOptions),
        ("learn", LearnOptions),
        ("learn", ProbeOptions),
        ("probe", ProbeOptions),
        ("slices", SlicesOptions),
    ],
)
def test_the_help_has_every_option(command, options):
    text = " ".join(CliRunner().invoke(app, [command, "--help"]).output.split())
    for field in described(options):
        assert f"{field.flag} " in text
        assert field.option.help.split()[-1] in text
    assert "None]" not in text, "a range without ends is none"


def test_layout_names_for_editors_are_those_there_are():
    from regraft.dialects.names import dialect_names

    assert set(LayoutName.__args__) == {*known_layouts(), *dialect_names()}


def test_options_that_are_not_for_the_source_are_refused(tmp_path):
    with pytest.raises(regraft.BadInputError, match=r"--drop and --keep: only for checkpoints"):
        regraft.convert(CASE, tmp_path / "out", to="transformers-v5", drop=["a"], keep=["b"])
    with pytest.raises(regraft.BadInputError, match=r"--verify and --via: only for adapters"):
        regraft.convert(BASE, tmp_path / "out", to="transformers-v5", via="dense", verify=True)


def test_a_report_prints_what_the_command_prints(tmp_path, capsys):
    assert main(["convert", str(CASE), str(tmp_path / "a"), "--to", "transformers-v5"]) == 0
    said = capsys.readouterr().out
    report = regraft.convert(CASE, tmp_path / "b", to="transformers-v5")
    assert str(report) == said.rstrip("\n").replace(str(tmp_path / "a"), str(tmp_path / "b"))
    assert repr(report) == "<Report: mixtral__gud_attn: LORA, transformers-v4 -> transformers-v5>"
    html = report._repr_html_()
    assert html.startswith("<pre") and "-&gt; transformers-v5" in html and "color: " in html


def test_in_jupyter_results_are_shown_once(capsys, monkeypatch):
    """There rich shows in the cell what it is told to write into a file, unless it is kept from that."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    inspection = regraft.inspect(CASE)
    assert repr(inspection) == "<Inspection: mixtral__gud_attn: LORA>"
    assert "transformers-v4" in inspection._repr_html_()
    assert capsys.readouterr().out == ""
    assert main(["inspect", str(CASE)]) == 0
    assert "transformers-v4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "make",
    [
        lambda: regraft.inspect(CASE),
        lambda: regraft.verify(CASE, CASE, model=BASE),
        lambda: regraft.verify(BASE, BASE),
        lambda: regraft.diff(CASE, CASE),
        lambda: regraft.check(CASE, tool="vllm"),
        lambda: regraft.convert(BASE, "nowhere", to="transformers-v5", dry_run=True),
        lambda: regraft.explain(
            BASE, "model.layers.0.self_attn.q_proj.weight", to="transformers-v5"
        ),
    ],
)
def test_results_print_and_show_themselves(make):
    result = make()
    assert len(str(result).splitlines()) >= 1 and len(repr(result)) < 300
    assert result._repr_html_().startswith("<pre")


def test_a_plan_says_where_everything_goes():
    plan = regraft.plan(BASE, to="transformers-v5")
    shapes = plan.result_shapes()
    assert shapes["model.layers.0.mlp.experts.down_proj"][0] == 4
    assert "mixtral/experts" in json.dumps(plan.to_dict()) and "experts down" in str(plan)
    assert (
        regraft.plan(CASE, to="transformers-v5").fired()["mixtral/experts down (mixtral.toml:31)"]
        == 2
    )


def test_rearrange_is_the_notation_on_arrays():
    one, other = regraft.rearrange("(a + b) i == a i, b i", np.arange(6).reshape(3, 2), a=1)
    assert one.tolist() == [[0, 1]] and other.shape == (2, 2)


OWN = """
name = "mine"
title = "experts by other names"
left = "transformers-v4"
right = "mine"
model_types = ["mixtral"]
source = "nowhere"

[[equation]]
name = "experts"
text = "{*p}.block_sparse_moe.experts.{e}.w2.weight : o i == {*p}.moe.{e}.down.weight : o i"
left_kind = "linear"
right_kind = "linear"

[[carry]]
keys = ["{*q} : ..."]
why = "the same in both"
kind = "any"
"""


def test_the_environment_names_rule_books_and_the_report_says_so(tmp_path, monkeypatch, capsys):
    book = tmp_path / "mine.toml"
    book.write_text(OWN)
    monkeypatch.setenv("REGRAFT_RULES", f"{book}:built-in")
    assert "mine" in {each.name for each in library()}
    report = regraft.convert(BASE, tmp_path / "out", to="mine")
    assert report.own_rules == [f"{book} (REGRAFT_RULES)"]
    assert main(["convert", str(BASE), str(tmp_path / "two"), "--to", "mine"]) == 0
    assert f"Rule books: {book} (REGRAFT_RULES)" in capsys.readouterr().out

    given = regraft.convert(BASE, tmp_path / "three", to="mine", rules=[book])
    assert given.own_rules == [str(book)]
    none = regraft.convert(BASE, tmp_path / "four", to="transformers-v5", rules=["built-in"])
    assert none.own_rules == []

    monkeypatch.setenv("REGRAFT_RULES", "nowhere.toml")
    with pytest.raises(regraft.BadInputError, match=r"named by REGRAFT_RULES"):
        regraft.convert(BASE, tmp_path / "five", to="transformers-v5")


def test_unknown_names_show_the_command_that_writes_a_book_from_a_good_twin(tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(BASE, bad)
    kept = {n.replace("lm_head", "lmhead"): np.array(t) for n, t in _tensors(BASE).items()}
    for file in [*bad.glob("*.safetensors"), *bad.glob("*.index.json")]:
        file.unlink()
    write_tensors(bad / "model.safetensors", kept, {"format": "pt"})
    with pytest.raises(regraft.UnmatchedKeysError) as caught:
        regraft.convert(bad, tmp_path / "out", to="transformers-v5", model=BASE)
    assert f"regraft diff {bad} {BASE} -o fix.toml" in (caught.value.findings[0].fix or "")


def test_a_refusal_names_the_size_and_the_error_of_each_option(tmp_path):
    with pytest.raises(regraft.RefusedError) as caught:
        regraft.convert(
            GOLDEN / "cases/mixtral__dora", tmp_path / "out", to="transformers-v5", model=BASE
        )
    fix = caught.value.findings[0].fix or ""
    assert "--via dense: a LoRA of full rank, exact, " in fix
    assert " numbers; --via svd:16: a LoRA of rank 16, approximate, " in fix


def _tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found.update(open_tensors(file))
    return found
