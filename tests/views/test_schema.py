"""What `--json` prints is what `regraft schema` says."""

import json
import shutil
from pathlib import Path

import pytest

from regraft import __version__
from regraft.cli import main
from regraft.cli.app import app
from regraft.cli.rules import rules
from regraft.report import SCHEMA_VERSION
from regraft.storage.safetensors import open_tensors, write_tensors
from regraft.views.schema import DOCUMENTS, schema_of

jsonschema = pytest.importorskip("jsonschema")
GOLDEN = Path(__file__).parents[1] / "golden"
CASES = GOLDEN / "cases"
BASE = GOLDEN / "bases/mixtral"


def check(document, data):
    jsonschema.Draft202012Validator(schema_of(document)).validate(data)


@pytest.fixture
def run(capsys):
    def run_command(*args):
        status = main([*map(str, args), "--json"])
        return status, json.loads(capsys.readouterr().out)

    return run_command


def test_every_command_that_prints_json_has_one():
    groups = [("", app), ("rules ", rules)]
    commands = {
        lead + name
        for lead, group in groups
        for name in group.list_commands(None)
        if any(option.name == "json" for option in group.get_command(None, name).params)
    }
    assert commands - {"schema"} == set(DOCUMENTS) - {"error"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_schemas_are_schemas(document, run):
    jsonschema.Draft202012Validator.check_schema(schema_of(document))
    status, told = run("schema", document)
    made = {"schema_version": SCHEMA_VERSION, "regraft": __version__}
    assert status == 0
    assert told == made | {"seconds": told["seconds"]} | schema_of(document)
    assert run("schema")[1][document] == schema_of(document)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_schemas_reject_what_is_something_else(document):
    with pytest.raises(jsonschema.ValidationError):
        check(document, {"something": "else"})


@pytest.mark.parametrize(
    "case", ["mixtral__gud_attn", "mixtral__patterns_projection", "gpt_oss__params_attn"]
)
def test_adapters(case, run, tmp_path):
    base = GOLDEN / "bases" / case.partition("__")[0]
    status, data = run("inspect", CASES / case)
    assert status == 0
    check("inspect", data)
    status, data = run(
        "convert", CASES / case, tmp_path / "o", "--to", "transformers-v5", "--model", base
    )
    assert status == 0
    check("convert", data)


def test_checkpoints(run, tmp_path):
    out = tmp_path / "out"
    status, data = run("convert", BASE, out, "--to", "transformers-v5")
    assert status == 0
    check("convert", data)
    status, data = run("verify", BASE, out)
    assert status == 0
    check("verify", data)

    file = out / "model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in open_tensors(file).items()}
    tensors["model.norm.weight"][0] += 1
    del tensors["lm_head.weight"]
    write_tensors(file, tensors, {"format": "pt"})
    status, data = run("verify", BASE, out)
    assert status == 4
    check("verify", data)
    assert {found["code"] for found in data["differences"]} == {"differs", "missing"}


def test_failures(run, tmp_path):
    refused = run("convert", CASES / "mixtral__dora", tmp_path / "o", "--to", "transformers-v5")
    assert refused[0] == 3
    usage = run("convert")
    assert usage[0] == 2
    missing = run("inspect", tmp_path)
    assert missing[0] == 1
    for _, data in (refused, usage, missing):
        check("error", data)

    broken = tmp_path / "broken"
    shutil.copytree(CASES / "mixtral__gud_attn", broken)
    file = broken / "adapter_model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in open_tensors(file).items()}
    del tensors[next(name for name in tensors if "q_proj.lora_B" in name)]
    write_tensors(file, tensors, {})
    status, data = run("inspect", broken)
    assert status == 1
    check("inspect", data)


def test_explain_diff_and_rules(run, tmp_path):
    out = tmp_path / "out"
    assert main(["convert", str(BASE), str(out), "--to", "transformers-v5", "-q"]) == 0
    key = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    lora = CASES / "mixtral__gud_attn"
    book = "mixtral"
    for document, command in (
        ("explain", ["explain", BASE, key, "--to", "transformers-v5"]),
        ("explain", ["explain", BASE, "no.such.key", "--to", "transformers-v5"]),
        ("explain", ["explain", lora, key, "--to", "transformers-v5"]),
        ("diff", ["diff", BASE, out]),
        ("diff", ["diff", BASE, GOLDEN / "bases/phimoe"]),
        ("rules list", ["rules", "list"]),
        ("rules show", ["rules", "show", book]),
        ("rules lint", ["rules", "lint", book]),
        ("rules lint", ["rules", "lint", book, "--keys", BASE]),
    ):
        status, data = run(*command)
        assert status in (0, 4), command
        check(document, data)


def test_no_such_document(run):
    status, data = run("schema", "nonsense")
    assert status == 2
    assert "convert, inspect, verify" in data["error"]["findings"][0]["message"]
