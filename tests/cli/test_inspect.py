"""`regraft inspect`, and what it stands on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from regraft.cli import main
from regraft.explaining.inspect import inspect
from regraft.storage.safetensors import open_tensors, write_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
INDEX = json.loads((GOLDEN / "index.json").read_text())
MIXTRAL = GOLDEN / "cases" / "mixtral__gud_attn"
PACKED = GOLDEN / "cases" / "gpt_oss__params_attn"

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("case", INDEX)
@pytest.mark.parametrize("with_model", [True, False])
def test_every_golden_adapter(case: str, with_model: bool) -> None:
    base = GOLDEN / "bases" / INDEX[case]["base"]
    inspection = inspect(GOLDEN / "cases" / case, model=base if with_model else None)
    (adapter,) = inspection.adapters
    assert not inspection.problems
    assert adapter.layouts[:1] == ["transformers-v4"]
    assert adapter.peft_type == INDEX[case]["peft_type"]
    factors = sum(target.count for target in adapter.targets) * 2
    others = sum(other.count for other in adapter.others)
    assert factors + others == adapter.tensors
    assert all(target.shape is not None for target in adapter.targets)
    json.dumps(inspection.to_dict())


def test_words(capsys: Capture) -> None:
    assert main(["inspect", str(MIXTRAL)]) == 0
    words, messages = capsys.readouterr()
    assert messages == ""
    assert words.splitlines()[:2] == ["mixtral__gud_attn: LORA", "layout    transformers-v4"]
    assert "base model: mixtral" in words
    pattern = "model.layers.{0,1}.block_sparse_moe.experts.{0..3}.w1.weight"
    row = next(line for line in words.splitlines() if pattern in line)
    assert row.split()[1:] == ["8", "24", "x", "16", "4", "8", "2", "float32"]


def test_json(capsys: Capture) -> None:
    assert main(["inspect", str(PACKED), "--json"]) == 0
    (adapter,) = json.loads(capsys.readouterr().out)["adapters"]
    assert adapter["layout"] == "transformers-v4"
    assert adapter["packing"] == "peft-0.18"
    assert adapter["ranks"] == [4]
    assert any(target["parameter"] for target in adapter["targets"])


def without_model(case: Path, folder: Path) -> Path:
    shutil.copytree(case, folder)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "auto_mapping": None}))
    return folder


def test_model_that_no_rule_book_knows(tmp_path: Path, capsys: Capture) -> None:
    folder = without_model(MIXTRAL, tmp_path / "lora")
    (tmp_path / "config.json").write_text('{"model_type": "novel"}')
    model = str(tmp_path / "config.json")
    (adapter,) = inspect(folder, model=model).adapters
    assert adapter.layout is None
    assert adapter.ranks == [4]
    assert main(["inspect", str(folder), "--model", model]) == 0
    assert "layout    not known" in capsys.readouterr().out
    packed = without_model(PACKED, tmp_path / "packed")
    assert main(["inspect", str(packed), "--model", model]) == 0
    assert "cannot be told" in capsys.readouterr().out


def test_what_is_wrong_is_listed_beside_the_rest(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "lora"
    shutil.copytree(MIXTRAL, folder)
    file = folder / "adapter_model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in open_tensors(file).items()}
    lost = next(name for name in tensors if "q_proj.lora_B" in name)
    del tensors[lost]
    write_tensors(file, tensors, {})
    assert main(["inspect", str(folder)]) == 1
    words, messages = capsys.readouterr()
    assert "k_proj" in words
    assert "no lora_B beside it" in messages
    assert main(["inspect", str(folder), "--json"]) == 1
    (adapter,) = json.loads(capsys.readouterr().out)["adapters"]
    assert len(adapter["problems"]) == 1


def test_untrained(tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    shutil.copytree(MIXTRAL, folder)
    file = folder / "adapter_model.safetensors"
    tensors = {
        name: np.zeros_like(tensor) if "lora_B" in name else tensor.copy()
        for name, tensor in open_tensors(file).items()
    }
    write_tensors(file, tensors, {})
    assert any("B is zero in every pair" in note for note in inspect(folder).adapters[0].notes)


def test_what_regraft_wrote(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(MIXTRAL), str(out), "--to", "transformers-v5", "-q"]) == 0
    (adapter,) = inspect(out).adapters
    assert adapter.layout == "transformers-v5"
    assert adapter.packing == "peft-0.19"
    assert "regraft wrote it, from transformers-v4" in adapter.notes


def test_nothing_there(tmp_path: Path, capsys: Capture) -> None:
    assert main(["inspect", str(tmp_path), "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "bad-input"
    assert error["findings"][0]["code"] == "no-config"


def test_folders_that_are_too_deep_are_named(tmp_path: Path, capsys: Capture) -> None:
    source = Path(__file__).parents[1] / "golden/cases/mixtral__gud_attn"
    shutil.copytree(source, tmp_path / "one")
    shutil.copytree(source, tmp_path / "a/b/c/d/e/f/g")
    assert main(["inspect", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "Not looked into, because they are over 5 folders deep: a/b/c/d/e/f/g" in told
    assert told.count("layout    ") == 1
