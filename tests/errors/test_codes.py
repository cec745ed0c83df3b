"""The codes of findings: one list, which every finding, heading and page follows."""

import json

import pytest

from regraft.cli import main
from regraft.cli.run import headline
from regraft.errors import BadInputError, Finding, RefusedError, RegraftError, UnmatchedKeysError
from regraft.errors.codes import CODES, Code, Status


def test_only_known_codes():
    with pytest.raises(ValueError, match="'no-such-code' is no code of a finding"):
        Finding("no-such-code", "a finding that no program would know")


@pytest.mark.parametrize("code", Code, ids=lambda code: code.value)
def test_entries_are_whole(code):
    assert code.value == code.name.lower().replace("_", "-")
    assert code.fix and code.title
    assert not code.title.endswith(".")
    assert len(code.title) < 60
    assert CODES[code.value] is code


def test_every_error_has_a_status_of_its_own_kind():
    kinds = [error.kind for error in RegraftError.__subclasses__()]
    assert len(set(kinds)) == len(kinds)
    assert RegraftError.status is Status.BUG
    assert {error.status for error in RegraftError.__subclasses__()} == {
        Status.BAD_INPUT,
        Status.REFUSED,
        Status.NO,
    }


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RefusedError(Finding("no-image", "x")), "refused: no exact equivalent in transformers-v5"),
        (RefusedError(Finding("packed", "x")), "refused: packed bytes cannot be split or joined"),
        (RefusedError(Finding("not-in-place", "x")), "refused: not possible in place"),
        (
            RefusedError(Finding("mixed-dtypes", "x")),
            "refused: tensors of several dtypes would become one",
        ),
        (RefusedError([Finding("packed", "x"), Finding("mixed-dtypes", "x")]), "refused"),
        (BadInputError(Finding("dtype", "x")), "bad input"),
    ],
)
def test_a_refusals_title_follows_its_code(error, words):
    assert headline(error, "transformers-v5") == words


@pytest.mark.parametrize("option", [["--to", "transformers-v5"], ["--to=transformers-v5"]])
def test_the_command_says_so(option, tmp_path, capsys):
    case = "tests/golden/cases/mixtral__dora"
    assert main(["convert", case, str(tmp_path / "out"), *option, "--json"]) == Status.REFUSED
    told = capsys.readouterr()
    assert json.loads(told.out)["error"]["kind"] == "refused"
    assert told.err.startswith("regraft: refused: no exact equivalent in transformers-v5")


def test_keys_that_no_rule_matches_are_bad_input():
    """Who catches bad input, questions and refusals has caught all that is wrong with an adapter."""
    error = UnmatchedKeysError(Finding("unmatched", "x"))
    assert isinstance(error, BadInputError) and error.kind == "unmatched-keys"
