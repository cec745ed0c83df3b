"""`regraft inspect` on a checkpoint, and notes on what lies beside one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import regraft
from regraft.checkpoints.convert import convert_checkpoint
from regraft.checkpoints.inspect import inspect_checkpoint
from regraft.cli import main
from regraft.storage.safetensors import write_tensors
from regraft.views.schema import schema_of

BASE = Path(__file__).parents[1] / "golden/bases/mixtral"


def test_tells_layout_model_files_and_tensors():
    found = inspect_checkpoint(BASE)
    assert (found.layout, found.model_types, found.classes) == (
        "transformers-v4",
        ["mixtral"],
        ["MixtralForCausalLM"],
    )
    assert (found.tensors, found.elements, found.bytes) == (41, 11984, 4 * 11984)
    assert found.dtypes == {"F32": 41}
    assert [(f.name, f.bytes, f.tensors) for f in found.weights] == [
        ("model.safetensors", (BASE / "model.safetensors").stat().st_size, 41)
    ]
    assert sum(alike.count for alike in found.patterns) == 41
    assert found.problems == []


def test_shards_and_ties_after_a_conversion(tmp_path):
    convert_checkpoint(BASE, tmp_path / "v5", to="transformers-v5", shard_size=8000)
    found = inspect_checkpoint(tmp_path / "v5")
    assert found.layout == "transformers-v5"
    assert len(found.weights) > 1
    assert sum(f.tensors for f in found.weights) == found.tensors == 21


def test_names_that_stand_for_others(tmp_path):
    shutil.copy(BASE / "config.json", tmp_path)
    tensors = {"model.embed_tokens.weight": np.zeros((32, 16), np.float16)}
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    write_tensors(tmp_path / "model.safetensors", tensors, tied)
    found = inspect_checkpoint(tmp_path)
    assert (found.ties, found.dtypes, found.elements) == (tied, {"F16": 1}, 512)
    assert found.layouts == ["transformers-v4", "transformers-v5"]


def test_a_layout_that_is_not_known_is_a_problem_and_the_rest_is_told(tmp_path, capsys):
    write_tensors(tmp_path / "model.safetensors", {"a.weight": np.zeros(3, np.float32)}, {})
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    found = inspect_checkpoint(tmp_path)
    assert [problem.code for problem in found.problems] == ["unknown-model"]
    assert (found.layouts, found.tensors) == ([], 1)
    assert main(["inspect", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "a.weight" in said.out
    assert "no_such_model" in said.err


def test_json_is_as_its_schema_says(capsys):
    jsonschema = pytest.importorskip("jsonschema")
    assert main(["inspect", str(BASE), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(schema_of("inspect")).validate(data)
    assert data["layout"] == "transformers-v4"


def test_there_is_no_page_of_it(tmp_path, capsys):
    assert main(["inspect", str(BASE), "--html", str(tmp_path / "a.html")]) == 2
    assert "--dry-run --html" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "a.html").exists()


def test_an_adapter_inside_is_named(tmp_path):
    shutil.copytree(BASE, tmp_path / "src")
    (tmp_path / "src/lora").mkdir()
    (tmp_path / "src/lora/adapter_config.json").write_text("{}")
    report = convert_checkpoint(tmp_path / "src", tmp_path / "out", to="transformers-v5")
    (note,) = [n for n in report.notes if "adapters beside" in n]
    assert note.endswith(": lora")


def test_python_tells_what_the_command_does(capsys):
    found = regraft.inspect(BASE)
    assert isinstance(found, regraft.CheckpointInspection)
    main(["inspect", str(BASE)])
    assert capsys.readouterr().out.split() == str(found).split()
