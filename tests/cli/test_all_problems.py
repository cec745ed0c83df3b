"""Everything that is wrong with one call is told at once, on the command line and in Python."""

import json
from pathlib import Path

import pytest

import regraft
from regraft.cli import main

GOLDEN = Path(__file__).parents[1] / "golden"
LORA, BASE = str(GOLDEN / "cases/mixtral__gud_attn"), str(GOLDEN / "bases/mixtral")
TO = ("--to", "transformers-v5")


def usage(capsys, *args):
    """The problems of a command line that is wrong."""
    given = args if args[0] == "rules" else (*args, "--json")
    assert main(given) == 2
    if args[0] == "rules":
        lines = capsys.readouterr().err.splitlines()
        return [line for line in lines if line[2:3].isdigit()]
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "usage"
    assert error["findings"][-1]["fix"].startswith(f"see 'regraft {args[0]}")
    return [finding["message"] for finding in error["findings"]]


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["rules", "new"], ["'FILE'", "'--right'", "'--model-type'"]),
        (["rules", "new", "x", "--rihgt", "a"], ["'--rihgt'. Did you mean '--right'?", "'--right'", "'--model-type'"]),
        (["convert"], ["'SRC... DST'", "'--to'"]),
        (["convert", "a", "--too", "v5", "--shard-size", "abc", "--via", "x"],
         ["Did you mean '--to'?", "Missing option '--to'", "'--shard-size'", "'--via'"]),
        (["convert", "a", "b", "--to", "transformer-v5", "--from", "kohia", "--jobs", "0"],
         ["'--jobs'", "Did you mean 'transformers-v5'?", "Did you mean 'kohya'?"]),
        (["convert", "a", "b", "c", *TO, "--in-place", "--part", "1/2", "--commit"],
         ["--in-place takes one SRC", "give one of them", "needs --stage"]),
        (["check", "a", "--for", "vlm", "--jobs", "x"], ["'--jobs'", "Did you mean 'vllm'?"]),
        (["extract", "a", "b", "--to", "diffuser"], ["'--output'", "'diffusers'", "--rank and --error"]),
        (["learn", "--config", "x", "--set", "y"], ["'--book'", "belong together", "NAME=VALUE"]),
        (["merge"], ["'BASE'", "'LORA[=WEIGHT]...'", "'--output'"]),
        (["slices", "a", *TO, "--tp", "2", "--bogus"], ["'--bogus'", "--json lists the bytes of one rank"]),
        (["env", "--foo", "--bar"], ["'--foo'", "'--bar'"]),
        (["verify", "a", "b", "c", "d", "--tolerance", "-1"], ["'--tolerance'", "extra arguments (c d)"]),
        (["diff", "--bogus=1", "-z"], ["'--bogus'", "'-z'"]),
    ],
)  # fmt: skip
def test_a_command_line(args, wanted, capsys):
    told = usage(capsys, *args)
    assert len(told) == len(wanted)
    for part, message in zip(wanted, told, strict=True):
        assert part in message


def test_help_is_shown_beside_mistakes(capsys):
    assert main(["convert", "--bogus", "--help"]) == 0
    assert capsys.readouterr().out.startswith("Usage: regraft convert")


def test_own_layouts_are_checked_when_their_books_are_read(tmp_path, capsys):
    args = ["convert", LORA, str(tmp_path / "out"), "--to", "mine", "--rules"]
    assert main([*args, str(tmp_path / "none.toml")]) == 1
    told = capsys.readouterr().err
    assert "none.toml" in told and "'mine'" not in told


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["convert", "no1", "out", *TO, "--model", "no2", "--rules", "no3"], 3),
        (["check", "no1", "--model", "no2"], 2),
        (["inspect", "no1", "--model", "no2"], 2),
        (["verify", "no1", "no2", "--model", "no3"], 3),
        (["diff", "no1", "no2", "--model", "no3"], 3),
        (["explain", "no1", "key", *TO, "--model", "no2"], 2),
        (["merge", "no1", "no2", "no3=0.5", "-o", "out"], 3),
        (["extract", "no1", "no2", "-o", "out", "--rank", "2"], 2),
    ],
)
def test_paths_that_lead_nowhere(args, names, capsys):
    assert main([*args, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["error"]["findings"]
    told = {
        name
        for name in ("no1", "no2", "no3")
        for f in found
        if name in (f.get("where"), f["message"][:3])
    }
    assert len(told) == len(found) == names


def test_python_tells_all_of_it_too(tmp_path):
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.convert("no1", tmp_path, to="transformers-v6", source="mixtrl", model="no2")
    messages = list(map(str, caught.value.findings))
    assert len(messages) == 4
    assert "did you mean 'mixtral'" in messages[-1]


def test_a_book_of_the_environment_that_is_not_there_is_bad_input(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REGRAFT_RULES", str(tmp_path / "none.toml"))
    assert main(["convert", LORA, str(tmp_path / "out"), *TO]) == 1
    told = capsys.readouterr().err
    assert "none.toml" in told and "REGRAFT_RULES" in told and "--to" not in told
