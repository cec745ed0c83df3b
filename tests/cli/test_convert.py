"""`regraft convert` as a user sees it: words, JSON and exit statuses."""

import json
import shutil
from pathlib import Path

import pytest

from regraft.cli import main
from regraft.layouts.names import known_layouts
from regraft.report import AdapterReport, Report
from regraft.storage.safetensors import open_tensors, write_tensors
from regraft.views.loading import how_to_load

GOLDEN = Path(__file__).parents[1] / "golden"
MIXTRAL = GOLDEN / "cases" / "mixtral__gud_attn"
DORA = GOLDEN / "cases" / "mixtral__dora"
BASE = GOLDEN / "bases" / "mixtral"

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    folder = tmp_path / "lora"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(MIXTRAL / name, folder)
    return folder


def rename(folder: Path, old: str, new: str) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = {k.replace(old, new): v.copy() for k, v in open_tensors(file).items()}
    write_tensors(file, tensors, {})


def names_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("to", "last"),
    [
        ("unsloth", "Load with Unsloth: FastModel.from_pretrained, with "),
        ("transformers-v5:peft", "Load with transformers 5: PeftModel.from_pretrained("),
        ("vllm", "Serve with vLLM: "),
    ],
)
def test_the_last_line_names_the_tool(
    lora: Path, tmp_path: Path, capsys: Capture, to: str, last: str
) -> None:
    assert main(["convert", str(lora), str(tmp_path / "out"), "--to", to]) == 0
    line = capsys.readouterr()[0].splitlines()[-1]
    assert line.startswith(last)
    assert str(tmp_path / "out") in line


def test_a_tool_that_takes_one_file_is_given_the_file_in_the_folder(
    lora: Path, tmp_path: Path, capsys: Capture
) -> None:
    """llama.cpp opens what --lora names; a folder is no file, whatever else was copied into it."""
    (lora / "README.md").write_text("mine")
    out = tmp_path / "out"
    asked = ["convert", str(lora), str(out), "--to", "gguf", "--model", str(BASE)]
    assert main(asked) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith(f"--lora {out / 'adapter.gguf'}")
    assert (out / "README.md").is_file()


def test_converts_and_says_how_to_load(lora: Path, tmp_path: Path, capsys: Capture) -> None:
    (lora / "README.md").write_text("mine")
    out = tmp_path / "out"
    assert main(["convert", str(lora), str(out), "--to", "transformers-v5"]) == 0
    words, messages = capsys.readouterr()
    assert messages == ""
    lines = words.splitlines()
    assert lines[0] == "lora: LORA, transformers-v4 -> transformers-v5"
    row = next(line for line in lines if "gate_up_proj" in line)
    assert row.split()[:4] == ["model.layers.{0,1}.mlp.experts.gate_up_proj", "2", "8", "2"]
    assert "mixtral/experts gate and up" in row
    assert row.endswith("exact")
    attention = next(line for line in lines if "q_proj" in line)
    assert "unchanged" in attention
    assert "Also copied: README.md" in lines
    quoted = json.dumps(str(out))
    assert lines[-1] == f"Load with transformers 5: PeftModel.from_pretrained(model, {quoted})"
    assert (out / "README.md").read_text() == "mine"
    assert all(line == line.rstrip() for line in lines)
    assert "\x1b" not in words
    assert words.isascii()


def test_tells_what_was_rescaled(tmp_path: Path, capsys: Capture) -> None:
    case = GOLDEN / "cases" / "mixtral__patterns_projection"
    assert main(["convert", str(case), str(tmp_path / "o"), "--to", "transformers-v5"]) == 0
    words = capsys.readouterr().out
    row = next(line for line in words.splitlines() if "gate_up_proj" in line)
    assert row.endswith("rescaled")
    assert "2 of 12 targets rescaled" in words


def test_json_is_one_document(lora: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(lora), str(out), "--to", "transformers-v5", "--json"]) == 0
    words, messages = capsys.readouterr()
    report = json.loads(words)
    assert messages == ""
    assert report["written"] is True
    assert report["adapters"][0]["target_layout"] == "transformers-v5"
    assert len(report["adapters"][0]["targets"]) == 12


def test_quiet_says_nothing(lora: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["convert", str(lora), str(tmp_path / "o"), "--to", "transformers-v5", "-q"]) == 0
    assert capsys.readouterr() == ("", "")


def test_dry_run_writes_nothing(lora: Path, tmp_path: Path, capsys: Capture) -> None:
    before = names_below(tmp_path)
    out = str(tmp_path / "out")
    assert main(["convert", str(lora), out, "--to", "transformers-v5", "--dry-run"]) == 0
    assert names_below(tmp_path) == before
    words = capsys.readouterr().out
    assert words.splitlines()[-1] == "Nothing was written: this was a dry run."
    assert "Load with" not in words


def test_overwrite(lora: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    command = ["convert", str(lora), str(out), "--to", "transformers-v5"]
    assert main(command) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert names_below(out) == {"old"}
    assert main([*command, "--overwrite"]) == 0
    assert names_below(out) == {"adapter_config.json", "adapter_model.safetensors"}


def test_several_adapters(lora: Path, tmp_path: Path, capsys: Capture) -> None:
    both = tmp_path / "both"
    shutil.copytree(lora, both / "one")
    shutil.copytree(lora, both / "two")
    out = tmp_path / "out"
    command = ["convert", str(both), str(out), "--to", "transformers-v5", "--fail-fast"]
    assert main(command) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"from_pretrained(model, {json.dumps(str(out / 'one'))})" in last
    assert f'load_adapter({json.dumps(str(out / "two"))}, "two")' in last
    assert (out / "two" / "adapter_model.safetensors").is_file()


def test_model_and_source_are_passed_on(lora: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["convert", str(lora), str(tmp_path / "out"), "--to", "transformers-v5"]
    command += ["--model", str(BASE)]
    assert main([*command, "--from", "transformers-v5"]) == 1
    assert main([*command, "--from", "transformers-v4"]) == 0
    assert str(BASE / "config.json") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("transformers5", "transformers-v5"),
        ("transformer-v5", "transformers-v5"),
        ("comfy", "comfyui"),
        ("llama.cpp", "gguf"),
        ("llama-cpp", "gguf"),
        ("SGLang", "sglang"),
    ],
)
def test_a_layout_that_is_misspelt_or_called_by_its_tool_is_suggested(
    said: str, meant: str, lora: Path, capsys: Capture
) -> None:
    assert main(["convert", str(lora), "out", "--to", said]) == 2
    messages = capsys.readouterr().err
    assert f"there is no {said!r}. Did you mean {meant!r}?" in messages
    assert "known:" not in messages


def test_a_wrong_book_in_the_environment_is_not_the_layouts_fault(
    lora: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("REGRAFT_RULES", "mixtrall")
    assert main(["convert", str(lora), "out", "--to", "transformers-v5"]) == 1
    messages = capsys.readouterr().err
    assert "REGRAFT_RULES" in messages and "did you mean mixtral?" in messages
    assert "--to" not in messages


def test_a_base_that_is_not_there_is_said_to_be_missing(lora: Path, capsys: Capture) -> None:
    assert (
        main(["convert", str(lora), "out", "--to", "transformers-v5", "--model", "no-where"]) == 1
    )
    assert "there is no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--to", "--from"])
def test_unknown_layout_lists_the_known(option: str, lora: Path, capsys: Capture) -> None:
    command = ["convert", str(lora), "out", "--to", "transformers-v5", option, "nobodys"]
    assert main(command) == 2
    words, messages = capsys.readouterr()
    assert words == ""
    assert option in messages
    assert all(layout in messages for layout in known_layouts())


def test_help_says_where_every_layout_is_listed(capsys: Capture) -> None:
    assert main(["convert", "--help"]) == 0
    assert "regraft layouts" in " ".join(capsys.readouterr().out.split())
    assert main(["layouts"]) == 0
    words = capsys.readouterr().out
    assert all(layout in words for layout in known_layouts())


def test_missing_source_is_bad_input(tmp_path: Path, capsys: Capture) -> None:
    missing = tmp_path / "missing"
    assert main(["convert", str(missing), str(tmp_path / "o"), "--to", "transformers-v5"]) == 1
    words, messages = capsys.readouterr()
    assert words == ""
    assert messages.startswith(f"regraft: bad input in {missing}")


def test_refused_lists_every_finding(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    command = ["convert", str(DORA), str(out), "--to", "transformers-v5"]
    assert main(command) == 3
    messages = capsys.readouterr().err
    assert messages.startswith("regraft: refused")
    assert str(DORA) in messages
    for projection in ("w1", "w2", "w3"):
        assert f"experts.0.{projection}.weight" in messages
    assert "DoRA" in messages
    assert "rule: mixtral/experts down" in messages
    assert "Fix: " in messages
    assert main([*command, "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "refused"
    assert len(error["findings"]) == 3
    assert not out.exists()


def test_brackets_and_control_characters_in_keys(
    lora: Path, tmp_path: Path, capsys: Capture
) -> None:
    rename(lora, "experts.0.w1.lora_A", "[bold]x[/bold]\x1b[31m\n.lora_A")
    assert main(["convert", str(lora), str(tmp_path / "out"), "--to", "transformers-v5"]) == 1
    messages = capsys.readouterr().err
    assert "[bold]x[/bold]\\x1b[31m\\n.lora_A" in messages
    assert "\x1b" not in messages
    assert main(["inspect", str(lora)]) == 1
    words, messages = capsys.readouterr()
    assert "\x1b" not in words + messages


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (ValueError, 70)])
def test_stopping_half_way_leaves_nothing(
    error: type[BaseException],
    status: int,
    lora: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object) -> None:
        raise error("[red]half way")

    (lora / "README.md").touch()
    before = names_below(tmp_path)
    monkeypatch.setattr("regraft.converting.adapters.copy_file", stop)
    monkeypatch.delenv("REGRAFT_DEBUG", raising=False)
    command = ["convert", str(lora), str(tmp_path / "a" / "out"), "--to", "transformers-v5"]
    assert main(command) == status
    assert names_below(tmp_path) == before
    messages = capsys.readouterr().err
    assert "Traceback" not in messages
    if error is ValueError:
        assert "ValueError: [red]half way" in messages
        assert "report" in messages
        monkeypatch.setenv("REGRAFT_DEBUG", "1")
        assert main([*command, "--json"]) == 70
        words, messages = capsys.readouterr()
        assert json.loads(words)["error"]["kind"] == "internal"
        assert "Traceback" in messages


def test_an_option_by_another_tools_word_is_suggested(lora: Path, capsys: Capture) -> None:
    assert main(["convert", str(lora), "out", "--to", "transformers-v5", "--force"]) == 2
    assert "No such option '--force'. Did you mean '--overwrite'?" in capsys.readouterr().err


def test_a_books_own_layout_is_not_called_a_release_of_transformers() -> None:
    adapter = AdapterReport("", "LORA", "published", "mine", [])
    words = how_to_load(Report("in", "out", [adapter]))
    assert (
        words
        == 'Load with PEFT, into a model in the layout mine: PeftModel.from_pretrained(model, "out")'
    )


def test_a_rank_that_is_meant_as_a_lower_one(lora: Path, tmp_path: Path, capsys: Capture) -> None:
    status = main(
        ["convert", str(lora), str(tmp_path / "o"), "--to", "transformers-v5", "--rank", "8"]
    )
    assert status == 1 and "--via svd:RANK" in capsys.readouterr().err


@pytest.mark.parametrize(("layout", "own"), [("gguf", "a .gguf file"), ("litgpt", "lit_model.pth")])
def test_a_checkpoint_in_a_tools_layout_says_that_it_is_not_the_tools_file(
    tmp_path: Path, capsys: Capture, layout: str, own: str
) -> None:
    assert main(["convert", str(BASE), str(tmp_path / "o"), "--to", layout, "--dry-run"]) == 0
    assert own in " ".join(capsys.readouterr().out.split())
