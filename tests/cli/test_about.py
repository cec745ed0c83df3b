"""`regraft errors` and `regraft env`: what helps with a message or a bug report."""

import json
import sys

import pytest

import regraft
from regraft.cli import main
from regraft.errors.codes import CODES


def test_a_code_is_explained(capsys):
    assert main(["errors", "no-image"]) == 0
    words = capsys.readouterr().out
    code = CODES["no-image"]
    assert code.title in words and code.fix in words and code.details in words
    assert "Exit status: 3" in words


def test_every_code_is_listed_and_has_a_title(capsys):
    assert main(["errors"]) == 0
    words = capsys.readouterr().out
    assert all(f"  {name} " in words for name in CODES)
    assert main(["errors", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["codes"]
    assert {each["code"]: each["status"] for each in listed} == {
        name: int(code.status) for name, code in CODES.items()
    }


def test_an_unknown_code_is_usage_with_the_nearest(capsys):
    assert main(["errors", "noimage"]) == 2
    assert "Did you mean 'no-image'?" in capsys.readouterr().err


def test_env_names_versions_and_shows_no_values(capsys, monkeypatch):
    monkeypatch.setenv("REGRAFT_RULES", "/home/somebody/secret.toml")
    assert main(["env", "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert found["regraft"] == regraft.__version__
    assert found["python"].endswith(sys.version.split()[0])
    assert found["packages"]["numpy"] and "REGRAFT_RULES" in found["variables"]
    assert "secret" not in text
    assert main(["env"]) == 0
    assert "secret" not in capsys.readouterr().out


def test_the_surface_is_listed_and_a_wrong_name_is_refused():
    assert set(regraft.__all__) <= set(dir(regraft))
    with pytest.raises(AttributeError, match="convrt"):
        _ = regraft.convrt
