"""Words on terminals of any width: nothing is cut, lines fit, what belongs together stands together."""

import io
import json
import re
import time
from pathlib import Path

import pytest

from regraft.cli import main
from regraft.cli.output import Output
from regraft.cli.words import break_name

CASES = Path(__file__).parents[1] / "golden/cases"


@pytest.fixture
def on_terminal(monkeypatch, capsys):
    """Runs a command as on a terminal of some width, without colours."""

    def run(width, *args):
        monkeypatch.setattr("regraft.cli.output._UNBOUNDED", width)
        assert main([*map(str, args)]) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("width", [40, 50, 60, 80])
def test_names_stay_whole_on_narrow_terminals(width, on_terminal):
    """Names are broken before dots alone, whatever stands beside them."""
    base = CASES.parent / "bases/mixtral"
    for command in (["inspect"], ["check", "--model", base, "--for", "transformers-v4"]):
        words = on_terminal(width, *command, CASES / "mixtral__patterns_projection")
        assert max(map(len, words.splitlines())) <= width
        assert re.search(r"\.block_sparse_moe\b", words)
        assert re.search(r"\.\{0\.\.3\}", words)


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("case", ["mixtral__patterns_projection", "gpt_oss__params_attn"])
def test_lines_fit_and_rules_stand_once(width, case, on_terminal, tmp_path):
    words = on_terminal(
        width, "convert", CASES / case, tmp_path / "o", "--to", "transformers-v5", "--dry-run"
    )
    assert max(map(len, words.splitlines())) <= width
    assert ".down_proj" in words
    if width >= 80:
        assert len(re.findall(r"(?m)^unchanged$", words)) == 1
    shown = on_terminal(width, "inspect", CASES / case)
    assert max(map(len, shown.splitlines())) <= width


def test_one_line_for_each_target_where_there_is_room(on_terminal, tmp_path):
    case = CASES / "mixtral__gud_attn"
    words = on_terminal(160, "convert", case, tmp_path / "o", "--to", "transformers-v5")
    assert words.count("  unchanged  ") == 4


def test_names_break_before_dots():
    name = "model.layers.{0..31}.mlp.experts.{0..127}.down_proj.weight"
    for width in (20, 30, 57, 58, 100):
        broken = break_name(name, width)
        assert broken.replace("\n  ", "") == name
        assert all(len(line) <= max(width, 20) for line in broken.split("\n"))
        assert ".\n" not in broken
        assert "{0\n" not in broken


def test_tour_and_completion(capsys, monkeypatch):
    assert main([]) == 0
    tour = capsys.readouterr().out
    assert "--html" in tour
    assert "regraft completion" in tour
    assert max(map(len, tour.splitlines())) <= 100
    monkeypatch.setenv("_REGRAFT_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "regraft convert a b --to ")
    monkeypatch.setenv("COMP_CWORD", "5")
    with pytest.raises(SystemExit):
        main([])
    offered = capsys.readouterr().out.split()
    assert {"plain,transformers-v4", "plain,transformers-v5"} <= set(offered)
    assert {"plain,diffusers", "plain,peft"} <= set(offered)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell, capsys):
    assert main(["completion", shell]) == 0
    assert "_REGRAFT_COMPLETE" in capsys.readouterr().out


def test_checkpoints_list_their_rules(capsys, tmp_path):
    base = CASES.parent / "bases/mixtral"
    assert main(["convert", str(base), str(tmp_path / "o"), "--to", "transformers-v5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["rule", "times"] for line in lines)
    assert any(line.startswith("mixtral/experts down") and line.endswith(" 2") for line in lines)
    assert main(["verify", str(base), str(tmp_path / "o"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"]


def test_progress_has_rate_and_time_left(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr("regraft.cli.progress._PATIENCE", 0)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    with Output().waiting("comparing", CASES.parent / "bases/mixtral") as tell:
        for done in range(5):
            tell("model", done * 1_000_000, 10_000_000)
            time.sleep(0.1)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "comparing model" in shown
    assert "/10.0 MB" in shown
    assert re.search(r"\d MB/s", shown)
    assert re.search(r"\d\d:\d\d", shown)


@pytest.mark.parametrize("out", [Output(progress="none"), Output(quiet=True)])
def test_no_progress_where_none_is_wanted(out, monkeypatch):
    with out.waiting("converting") as tell:
        assert tell is None


def test_a_problem_shows_its_code_and_where_there_is_more(tmp_path, capsys):
    args = ["convert", str(CASES / "mixtral__dora"), str(tmp_path / "out"), "--to", "transformers-v5"]  # fmt: skip
    assert main(args) == 3
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == "More: regraft errors no-image"
    assert sum(line.endswith("[no-image]") for line in told) == 2
    assert main(["inspect", str(tmp_path / "none")]) == 1
    told = capsys.readouterr().err
    assert "[not-found]" in told and told.endswith("More: regraft errors not-found\n")
    assert main(["errors", "not-found"]) == 0


def test_usage_needs_no_code(capsys):
    assert main(["convert", "--nonsense"]) == 2
    told = capsys.readouterr().err
    assert "[usage]" not in told and "More:" not in told


def test_check_shows_the_codes_of_its_problems(capsys):
    assert (
        main(
            [
                "check",
                str(CASES / "mixtral__gud_attn"),
                "--model",
                str(CASES.parent / "bases/gpt_oss"),
            ]
        )
        != 0
    )
    assert "[wrong-base]" in "".join(capsys.readouterr())


def test_reasons_are_whole_where_there_is_no_terminal(tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / "in" / name).mkdir(parents=True)
        config = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "x" * 150}
        (tmp_path / "in" / name / "adapter_config.json").write_text(json.dumps(config))
    main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "transformers-v5"])
    words = capsys.readouterr().out
    assert "one     failed" in words and "…" not in words


def test_a_merge_is_counted_in_bytes(tmp_path, capsys):
    base = str(CASES.parent / "bases/mixtral")
    args = ["--merge", "--progress", "json", "--model", base, "--to", "transformers-v5"]
    assert main(["convert", str(CASES / "mixtral__gud_attn"), str(tmp_path / "out"), *args]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line[:1] == "{"]
    assert {line["progress"]["unit"] for line in lines} == {"bytes"}


def test_diff_ends_with_a_verdict_and_how_many_differ(tmp_path, capsys):
    base = CASES.parent / "bases/mixtral"
    assert main(["diff", str(base), str(base)]) == 0
    assert capsys.readouterr().out.endswith("Equal: they hold the same, bit for bit\n")
    half = [str(tmp_path / "half"), "--to", "transformers-v4", "--drop", "lm_head.weight"]
    assert main(["convert", str(base), *half]) == 0
    capsys.readouterr()
    assert main(["diff", str(base), str(tmp_path / "half")]) == 4
    assert capsys.readouterr().out.endswith("Not equal: 1 only in A\n")
