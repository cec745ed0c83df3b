"""How far a command is: lines where there is no terminal, JSON for programs, nothing where nothing is wanted."""

import json
import time

import pytest

from regraft.cli import progress
from regraft.cli.output import Output


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(progress, "_EVERY", {"plain": 0.02, "json": 0.02})


def wait(output, told, **options):
    with output.waiting("converting") as tell:
        tell("model\x1b[2J", 3, 12)
        deadline = time.monotonic() + 5
        while not told() and time.monotonic() < deadline:
            time.sleep(0.01)


@pytest.mark.parametrize(
    "output", [Output(), Output(json=True), Output(quiet=True, progress="plain")]
)
def test_lines_without_a_terminal(output, quick, capsys):
    shown = []

    def told():
        shown.append(capsys.readouterr().err)
        return "25 %" in "".join(shown)

    wait(output, told)
    line = "".join(shown).splitlines()[-1]
    assert line.startswith("converting model\\x1b[2J: 3 of 12 (25 %), ")


def test_lines_of_json_and_a_last_one(quick, capsys):
    wait(Output(progress="json"), lambda: True)
    last = json.loads(capsys.readouterr().err.splitlines()[-1])["progress"]
    assert last.pop("seconds") >= 0
    assert last == {
        "verb": "converting",
        "name": "model\x1b[2J",
        "done": 3,
        "total": 12,
        "unit": "pieces",
    }


@pytest.mark.parametrize("output", [Output(quiet=True), Output(progress="none")])
def test_nothing(output, quick, capsys):
    with output.waiting("converting") as tell:
        assert tell is None
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_what_is_worked_on_is_named_before_anything_is_told(quick, capsys, tmp_path):
    with Output(progress="json").waiting("converting", tmp_path / "my-lora"):
        pass
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["progress"]["name"] == "my-lora"
