"""Models of the hub over the network, and results pushed there: by huggingface_hub, against a server here."""

import json
import os
import subprocess
import sys
from importlib import import_module

import pytest
from checkpoints.models import MIXTRAL, mixtral, snapshot, write_folder
from hub_server import TOKEN, serving

import regraft
from regraft.cli.run import run
from regraft.converting.push import extended
from regraft.errors import BadInputError
from regraft.report import CheckpointReport, Report
from regraft.storage import objects

hub_library = pytest.importorskip("huggingface_hub")
V5 = "transformers-v5"
CARD = "---\nlicense: mit\n---\n# Tiny\n\nA model.\n"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one model, which huggingface_hub believes to be the one."""
    monkeypatch.setattr(objects, "PAUSE", 0.0)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    constants = import_module("huggingface_hub.constants")
    with serving() as running:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        hub_library.close_session()
        folder = write_folder(tmp_path / "src", mixtral(), shards=2)
        (folder / "README.md").write_text(CARD)
        (folder / "empty.txt").write_bytes(b"")
        running.repositories["org/tiny"] = [{p.name: p.read_bytes() for p in folder.iterdir()}]
        yield running
    hub_library.close_session()


@pytest.fixture
def wanted(hub, tmp_path):
    regraft.convert(tmp_path / "src", tmp_path / "wanted", to=V5)
    return snapshot(tmp_path / "wanted")


def codes(caught):
    return {finding.code for finding in caught.value.findings}


def test_reads_headers_and_ranges(hub, wanted, tmp_path, capsys):
    for name in ("org/tiny", f"hf://org/tiny@{hub.sha('org/tiny')}"):
        hub.requests.clear()
        assert run(["inspect", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["model_types"] == ["mixtral"]
        # One for the commit, one for the list, and of each weights file two, since they are behind a redirect.
        assert len(hub.requests) <= len(hub.files("org/tiny")) + 4
        regraft.convert(name, tmp_path / "out", to=V5, overwrite=True)
        assert snapshot(tmp_path / "out") == wanted
    assert regraft.verify("org/tiny", tmp_path / "out").equal
    assert not (tmp_path / "cache").exists()


def test_of_one_commit(hub, wanted, tmp_path, monkeypatch):
    """What is pushed meanwhile is not read: the server has it under another commit."""
    before = hub.sha("org/tiny")
    regraft.convert("org/tiny", tmp_path / "out", to=V5)
    assert {path.split("/")[4] for _, path in hub.requests if "/resolve/" in path} == {before}


def test_a_model_that_is_named(hub, tmp_path):
    (tmp_path / "src/config.json").unlink()
    regraft.convert(tmp_path / "src", tmp_path / "out", to=V5, model="org/tiny")
    assert (tmp_path / "out/model.safetensors.index.json").exists()


def test_what_is_not_given(hub, tmp_path, monkeypatch):
    def fails(code, name="org/tiny", **options):
        with pytest.raises(BadInputError) as caught:
            regraft.convert(name, tmp_path / "out", to=V5, **options)
        assert codes(caught) == {code}, caught.value
        assert not (tmp_path / "out").exists()

    fails("missing-file", "org/nothing")
    fails("missing-file", "org/tiny@v7")
    hub.gated.add("org/tiny")
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    fails("store-denied")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refuses = 50
    fails("store-failed")
    hub.refuses = 2
    regraft.convert("org/tiny", tmp_path / "after", to=V5)
    (tmp_path / "org").mkdir()
    hub.requests.clear()
    fails("not-found", "org/typo")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fails("offline", "hf://org/tiny")
    assert not hub.requests


def test_pushes_a_result(hub, wanted, tmp_path, capsys):
    hub.repositories["me/new"] = [{"model.safetensors": b"old", "notes.txt": b"mine"}]
    line = ["convert", "org/tiny", "out", "--to", V5, "--push", "me/new"]
    assert run(line) == 0
    assert f"pushed: {hub.url}/me/new/commit/" in capsys.readouterr().out
    made = dict(hub.files("me/new"))
    assert len(hub.repositories["me/new"]) == 2, "one commit"
    card = made.pop("README.md").decode()
    assert made.pop("notes.txt") == b"mine"
    assert made == {name: data for name, data in wanted.items() if name != "README.md"}
    assert card.startswith("---\nlicense: mit\nbase_model: org/tiny\n---\n# Tiny\n\nA model.\n")
    assert f"layout {V5}, rearranged from transformers-v4 by regraft" in card
    assert (tmp_path / "out/README.md").read_text() == CARD
    assert regraft.verify("org/tiny", "me/new").equal


def test_what_cannot_be_pushed(hub, tmp_path, monkeypatch):
    def fails(code, push="me/new", dst=tmp_path / "out", **options):
        with pytest.raises(BadInputError) as caught:
            regraft.convert(tmp_path / "src", dst, to=V5, push=push, **options)
        assert codes(caught) == {code}, caught.value
        return caught.value

    fails("bad-address", push="new")
    fails("option", dst="s3://b/out")
    fails("option", stage=tmp_path / "stage", part="0/2")
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    fails("store-denied")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fails("offline")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert not (tmp_path / "out").exists() and "me/new" not in hub.repositories
    regraft.convert(tmp_path / "src", tmp_path / "dry", to=V5, push="me/new", dry_run=True)
    assert "me/new" not in hub.repositories

    def denied(*_, **__):
        raise PermissionError("not yours")

    monkeypatch.setattr(hub_library.HfApi, "create_commit", denied)
    error = fails("store-failed")
    assert "hf upload me/new" in error.__notes__[0]
    assert (tmp_path / "out/config.json").exists()


def test_cards():
    made = Report("/models/tiny", "out")
    made.checkpoint = CheckpointReport("a", "b", [], notes=["left out: x"])
    card = extended("", made)
    assert card.startswith("<!-- regraft -->\n## Weight layout\n\nThese are the weights of tiny")
    assert "- left out: x\n" in card and "base_model" not in card
    assert extended(card, made) == card
    named = Report("org/base", "out", checkpoint=made.checkpoint)
    assert extended("---\nbase_model: other\n---\nText\n", named).count("base_model") == 1


def test_as_a_command_of_its_own(hub, wanted, tmp_path):
    """With nothing set but what a user sets: HF_ENDPOINT and HF_TOKEN."""
    environment = {
        "PATH": os.environ["PATH"],
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, "-m", "regraft", "convert", "hf://org/tiny", "out", "--to", V5]
    done = subprocess.run([*command, "--push", "me/new", "-q"], env=environment, cwd=tmp_path)
    assert done.returncode == 0
    assert snapshot(tmp_path / "out") == wanted
    assert hub.files("me/new")["config.json"] == wanted["config.json"]
    assert MIXTRAL["model_type"] == "mixtral"
