"""In a core install every message about a package that is missing names the extra that brings it."""

import subprocess
import sys
from pathlib import Path

import pytest

import regraft
from regraft.cli import main
from regraft.errors import extras

GOLDEN = Path(__file__).parents[1] / "golden"
LLAVA = GOLDEN / "cases/llava_mixtral__language_regex"
INSTALL = "pip install 'regraft[transformers]'"
WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(("torch", "transformers", "peft")))
import regraft
for name in regraft.__all__:
    try:
        getattr(regraft, name)
    except ModuleNotFoundError as error:
        print(error)
"""


@pytest.fixture
def core(monkeypatch):
    """As in an install of the core alone."""
    monkeypatch.setattr(extras, "is_installed", lambda name: False)
    monkeypatch.setattr("regraft.bridges.peft.trial.StockPeft.is_there", False)
    monkeypatch.setattr("regraft.bridges.transformers.files._ask", lambda question: None)


def test_a_public_name_says_what_it_needs():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    assert len(lines) > 5, done.stderr
    assert all(line.endswith(f"which is not installed: {INSTALL}") for line in lines)
    assert any(line.startswith("regraft.load_adapter needs torch") for line in lines)


def test_another_missing_module_is_no_package():
    error = ModuleNotFoundError("no", name="regraft.nowhere")
    assert extras.explained(error, "x") is error


def test_check_says_how_it_could_try(core, capsys):
    case, base = GOLDEN / "cases/mixtral__gud_attn", GOLDEN / "bases/mixtral"
    assert main(["check", str(case), "--model", str(base)]) == 4
    assert f"is not installed here: {INSTALL}" in capsys.readouterr().out


def test_an_unknown_model_is_one_that_transformers_could_know(core, tmp_path, capsys):
    with pytest.raises(regraft.UnmatchedKeysError, match="regraft\\[transformers\\]"):
        regraft.convert(LLAVA, tmp_path / "out", to="transformers-v5")
    base = str(GOLDEN / "bases/llava_mixtral")
    assert main(["convert", base, str(tmp_path / "out"), "--to", "transformers-v5"]) == 1
    assert INSTALL in capsys.readouterr().err
