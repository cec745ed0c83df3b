"""What other people's CI runs: the action, the hook, the workflows. check-jsonschema brings the schemas along."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from regraft.cli import main

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
CASES = ROOT / "tests/golden/cases"
FILES = {
    "vendor.github-actions": ["action.yml"],
    "vendor.github-workflows": sorted(str(p) for p in (ROOT / ".github/workflows").iterdir()),
    "vendor.dependabot": [".github/dependabot.yml"],
    "vendor.github-issue-forms": [
        str(p) for p in (ROOT / ".github/ISSUE_TEMPLATE").iterdir() if p.name != "config.yml"
    ],
    "vendor.github-issue-config": [".github/ISSUE_TEMPLATE/config.yml"],
    "vendor.citation-file-format": ["CITATION.cff"],
}


@pytest.mark.slow
def test_files_are_of_their_schemas():
    pytest.importorskip("check_jsonschema")
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for schema, files in FILES.items()
    ]
    said = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * len(runs), said


def test_hook(tmp_path, monkeypatch, capsys):
    """pre-commit takes the manifest; what the hook runs finds the adapter by either file that it is given."""
    clientlib = pytest.importorskip("pre_commit.clientlib")
    (hook,) = clientlib.load_manifest(str(ROOT / ".pre-commit-hooks.yaml"))
    shutil.copytree(CASES / "mixtral__gud_attn", tmp_path / "lora")
    monkeypatch.chdir(tmp_path)
    found = [
        str(path.relative_to(tmp_path))
        for path in sorted(tmp_path.rglob("*"))
        if re.search(hook["files"], str(path.relative_to(tmp_path)))
    ]
    assert found == ["lora/adapter_config.json", "lora/adapter_model.safetensors"]
    program, *args = hook["entry"].split()
    assert program == "regraft"
    for given in (found, found[:1], found[1:]):
        assert main([*args, *given]) == 4
        told = capsys.readouterr().out
        assert "regraft convert" in told
        assert len(given) == 1 or "1 source: " in told
    # Nothing can be tried without the base: what fits passes there, alone and among others.
    for name in ("new", "newer"):
        assert main(["convert", "lora", name, "--to", "transformers-v5"]) == 0
    assert main([*args, "new"]) == main([*args, "new", "newer"]) == 0
    assert main([*args, "new", "lora"]) == main(["check", "new"]) == 4
    assert main(["check", "new", "newer"]) == 4


@pytest.mark.parametrize(
    ("adapters", "layout", "status"),
    [
        (["qwen3_moe__mts_router"], "transformers-v4", 0),
        (["mixtral__gud_attn", "mixtral__only_up"], "vllm", 4),
        ([], "transformers-v5", 1),
    ],
)
@pytest.mark.slow
def test_action(adapters, layout, status, tmp_path):
    """The script of the action, with the inputs that action.yml hands on; a path with a space is one path."""
    steps = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))["runs"]["steps"]
    assert set(steps[-1]["env"]) == {"ROOM", "CHECK_PATH", "CHECK_FOR", "CHECK_MODEL"}
    program = tmp_path / "room/bin/regraft"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m regraft "$@"\n')
    program.chmod(0o755)
    folder = tmp_path / "two words"
    for name in adapters:
        shutil.copytree(CASES / name, folder / name)
    outputs, summary = tmp_path / "outputs", tmp_path / "summary"
    known = {
        "ROOM": str(tmp_path / "room"),
        "CHECK_PATH": "\n".join(str(folder / name) for name in adapters or ["absent"]) + "\n",
        "CHECK_FOR": layout,
        "CHECK_MODEL": "",
        "GITHUB_OUTPUT": str(outputs),
        "GITHUB_STEP_SUMMARY": str(summary),
    }
    done = subprocess.run(
        [str(ROOT / "scripts/check_action.sh")],
        env=os.environ | known,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout.strip() in summary.read_text(encoding="utf-8")
    # An error is said once, and in the summary, too.
    assert not done.stderr
    assert done.stdout.count("no such file") == (not adapters)
    report = Path(outputs.read_text(encoding="utf-8").strip().removeprefix("report="))
    lines = report.read_text(encoding="utf-8").splitlines()
    read = (
        [json.loads(line) for line in lines] if len(adapters) > 1 else [json.loads("".join(lines))]
    )
    assert len(read) == max(len(adapters), 1)
    assert ("regraft convert" in done.stdout) == (status == 4)


def test_steps_hand_inputs_on_by_the_environment():
    """An input inside a script would be run as a part of it."""
    steps = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))["runs"]["steps"]
    assert all("inputs." not in step["run"] for step in steps)


def test_what_changed_is_of_a_known_kind():
    """towncrier leaves out a file with another name without a word."""
    kinds = {each["directory"] for each in tomllib.loads(PROJECT)["tool"]["towncrier"]["type"]}
    for path in (ROOT / "changes").iterdir():
        named = re.fullmatch(r"(\d+|\+[a-z0-9-]+)\.([a-z]+)\.md", path.name)
        assert path.name == "README.md" or (named and named[2] in kinds), path.name
    start = tomllib.loads(PROJECT)["tool"]["towncrier"]["start_string"]
    assert start in (ROOT / "CHANGELOG.md").read_text("utf-8")
