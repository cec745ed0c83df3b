"""What is no matter of the tool is answered alike, whatever an adapter is checked for."""

import json
import shutil
from pathlib import Path

import pytest

import regraft
from regraft.bridges.peft.trial import StockPeft
from regraft.checking.check import check
from regraft.cli import main
from regraft.dialects.judging import tool_readers
from regraft.errors import BadInputError

GOLDEN = Path(__file__).parents[1] / "golden"
LORA, BASE = GOLDEN / "cases/mixtral__gud_attn", GOLDEN / "bases/mixtral"
TARGETS = ["transformers-v5", "transformers-v4", *tool_readers()]


@pytest.fixture
def lora(tmp_path):
    return Path(shutil.copytree(LORA, tmp_path / "lora"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_that_cannot_be_read_is_bad_input(lora, target, file, capsys):
    (lora / file).write_bytes(b"{")
    assert main(["check", str(lora), "--for", target]) == 1
    assert file in capsys.readouterr().err


def test_so_is_a_checkpoint_that_cannot_be_read(tmp_path, capsys):
    base = Path(shutil.copytree(BASE, tmp_path / "base"))
    (base / "model.safetensors").write_bytes(b"{")
    assert main(["check", str(base)]) == 1
    assert "model.safetensors" in capsys.readouterr().err


def test_one_of_several_that_cannot_be_read_is_told_with_the_others(lora, capsys):
    shutil.copytree(LORA, lora / "second")
    (lora / "second/adapter_config.json").write_text("{")
    assert main(["check", str(lora), "--for", "transformers-v4", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [v["unreadable"] for v in found["verdicts"]] == [False, True]


@pytest.mark.parametrize("tool", ["vllm", "diffusers"])
def test_a_checkpoint_is_not_taken_for_an_adapter(tool, tmp_path, lora, capsys):
    with pytest.raises(BadInputError, match="it is a checkpoint") as caught:
        regraft.check(BASE, tool=tool)
    assert caught.value.findings[0].code == "not-an-adapter"
    shutil.copytree(BASE, tmp_path / "base")
    page = tmp_path / "page.html"
    main(["check", str(tmp_path), "--for", tool, "--html", str(page), "--model", str(BASE)])
    words = capsys.readouterr().out
    assert "base: skipped, it is a checkpoint" in words and "1 skipped" in words
    assert page.is_file()


class NoPeft(StockPeft):
    """As where torch is not installed."""

    @property
    def is_there(self):
        return False


def test_what_does_not_change_is_not_said_to_have_another_name():
    [verdict] = check(LORA, model=BASE, peft=NoPeft()).verdicts
    outcomes = {"".join(row.pattern.split(".")[-2:]): row.outcome for row in verdict.rows}
    assert outcomes["q_projweight"] == outcomes["o_projweight"] == "lands"
    assert outcomes["expertsdown_proj"] == outcomes["expertsgate_up_proj"] == "elsewhere"
    assert verdict.healthy is False
