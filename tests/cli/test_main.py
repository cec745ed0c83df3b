"""The program as a whole: its start, its help, and how it behaves in a pipe."""

import json
import math
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import regraft
from regraft.cli import main
from regraft.cli.output import Output, visible

GOLDEN = Path(__file__).parents[1] / "golden"
MIXTRAL = GOLDEN / "cases/mixtral__gud_attn"

PROBE = """
import json, sys
from regraft.cli import main
status = main(["--help"])
print(json.dumps([status, sorted(sys.modules)]))
"""


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "regraft", *args],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
        timeout=60,
    )


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, timeout=60
    )
    status, modules = json.loads(done.stdout.splitlines()[-1])
    assert status == 0
    assert {"torch", "transformers", "peft", "numpy"}.isdisjoint(modules)


def test_alone_gives_a_tour(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    words = capsys.readouterr().out
    assert "regraft inspect" in words
    assert "regraft convert" in words


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"regraft {regraft.__version__}\n"


@pytest.mark.parametrize("args", [["covnert"], ["convert"], ["inspect", "x", "--nonsense"]])
def test_usage(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    words, messages = capsys.readouterr()
    assert words == ""
    assert "--help" in messages
    assert main([*args, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "usage"


@pytest.mark.slow
def test_as_a_module_and_plain_in_a_pipe() -> None:
    done = run("inspect", str(MIXTRAL), NO_COLOR="", FORCE_COLOR="", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert run("inspect", str(MIXTRAL / "nothing")).returncode == 1


@pytest.mark.slow
def test_colors_where_they_are_wanted() -> None:
    assert "\x1b[" in run("inspect", str(MIXTRAL), FORCE_COLOR="1", NO_COLOR="").stdout
    assert "\x1b" not in run("inspect", str(MIXTRAL), FORCE_COLOR="1", NO_COLOR="1").stdout


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="pipes of another kind")
def test_a_reader_that_left_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "regraft", "inspect", str(MIXTRAL)],
            stdout=pipe,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
    assert done.returncode == 0
    assert done.stderr == b""


def test_visible() -> None:
    assert visible("a.b[0]") == "a.b[0]"
    assert visible("a\x1b\u202e\udc80\n") == "a\\x1b\\u202e\\udc80\\n"


def _commands():
    """One call of every command that ends with 0."""
    base = GOLDEN / "bases/mixtral"
    given = ("--to", "transformers-v5", "--model", base)
    key = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    quick = [("inspect", MIXTRAL, "--json"), ("--version",)]
    rest = [
        ("--help",),
        ("convert", MIXTRAL, "out", *given, "--dry-run"),
        ("explain", MIXTRAL, key, *given),
        ("verify", MIXTRAL, MIXTRAL, "--model", base),
        ("diff", MIXTRAL, MIXTRAL, "--model", base),
        ("slices", base, "--to", "transformers-v5"),
        ("rules", "list"),
        ("rules", "show", "mixtral"),
        ("rules", "lint", "mixtral"),
        ("completion", "bash"),
    ]
    # With one of the streams alone, since it imports transformers in a process of its own.
    once = [("1", ("check", base, "--progress", "none"))]
    return [
        *((stream, args) for stream in "12" for args in quick),
        *(pytest.param(s, args, marks=pytest.mark.slow) for s in "12" for args in rest),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in once),
    ]


@pytest.mark.parametrize(("stream", "args"), _commands())
def test_a_closed_stream_is_no_error(stream, args):
    command = shlex.join([sys.executable, "-m", "regraft", *map(str, args)])
    done = subprocess.run(
        ["sh", "-c", f"{command} {stream}>&-"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_json_has_no_numbers_that_json_has_not(capsys):
    Output(json=True).data({"error": [math.inf, -math.inf, math.nan, 1.5]})
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert told.pop("seconds") >= 0
    assert told == {
        "schema_version": 1,
        "regraft": regraft.__version__,
        "error": ["Infinity", "-Infinity", "NaN", 1.5],
    }


def test_warnings_of_libraries_are_not_shown(monkeypatch, capsys):
    def warned():
        warnings.warn("overflow encountered in cast", RuntimeWarning, stacklevel=1)
        return 0

    monkeypatch.setattr("regraft.cli.run.app.main", lambda **_: warned)
    assert main(["inspect"]) == 0
    assert capsys.readouterr().err == ""
