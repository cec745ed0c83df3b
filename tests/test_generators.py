"""What the generators for contributors write passes the public conformance kit at once."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from regraft.cli import main

SCRIPTS = Path(__file__).parents[1] / "scripts"


def run_tests(path, monkeypatch, *given):
    """Every test of a file that was written, in this process."""
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = [test for name, test in vars(module).items() if name.startswith("test_")]
    for test in tests:
        test(*given)
    return len(tests)


@pytest.mark.parametrize(("kind", "given"), [("dialect", True), ("family", False)])
def test_scripts(kind, given, tmp_path, monkeypatch):
    command = [sys.executable, SCRIPTS / f"new_{kind}.py", f"my_{kind}", "--out", tmp_path]
    assert subprocess.run(command, check=False).returncode == 0
    scratch = tmp_path / "scratch"
    assert run_tests(tmp_path / f"test_my_{kind}.py", monkeypatch, *[scratch] * given) == 1
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 1 and "exists already" in again.stderr


def test_a_rule_book(tmp_path, monkeypatch, capsys):
    book = tmp_path / "mine.toml"
    command = ["rules", "new", str(book), "--right", "mine", "--model-type", "mine"]
    assert main(command) == 0
    assert run_tests(tmp_path / "test_mine.py", monkeypatch) == 1
    capsys.readouterr()
    assert main(["rules", "lint", str(book)]) == 0
    assert "nothing to say against it" in capsys.readouterr().out
    assert main(command) == 1
    assert "2 problems" in capsys.readouterr().err
