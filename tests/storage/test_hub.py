"""Models of the hub by their ids, in its local cache: no request is ever made."""

import json
from pathlib import Path

import pytest

import regraft
from regraft.cli.run import run
from regraft.errors import BadInputError
from regraft.sources.places import locate
from regraft.storage.hub import cache_folder, find_cached

GOLDEN = Path(__file__).parents[1] / "golden"
BASE = GOLDEN / "bases" / "mixtral"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with one repository, as huggingface_hub makes it: links to blobs, and the commit of a branch."""
    hub = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    monkeypatch.chdir(tmp_path)
    repository = hub / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "refs" / "evil").write_text("../../../../..")
    for number, path in enumerate(sorted(BASE.iterdir())):
        (repository / "blobs" / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_ids_lead_to_the_cache(cache, tmp_path):
    assert cache_folder() == tmp_path / "hub"
    for name in ("org/tiny", "hf://org/tiny", "hf://org/tiny@main", f"org/tiny@{COMMIT}"):
        assert find_cached(name) == cache
        assert locate(Path(name)) == cache
    for name in ("org/other", "org/tiny@v2", "org/tiny@evil", "org/tiny@../../x", "../tiny"):
        assert find_cached(name) is None
    regraft.convert("hf://org/tiny", tmp_path / "out", to="transformers-v5")
    assert regraft.verify("org/tiny", tmp_path / "out").equal


def test_a_path_that_exists_wins(cache, tmp_path):
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert locate("org/tiny") == Path("org/tiny")


def test_the_base_that_an_adapter_names(cache, tmp_path):
    adapter = tmp_path / "lora"
    adapter.mkdir()
    for path in (GOLDEN / "cases" / "mixtral__gud_attn").iterdir():
        if path.is_file():
            (adapter / path.name).write_bytes(path.read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/tiny"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    report = regraft.convert(adapter, tmp_path / "named", to="transformers-v5")
    given = regraft.convert(adapter, tmp_path / "given", to="transformers-v5", model="org/tiny")
    assert any(str(cache) in line for line in report.adapters[0].evidence)
    assert report.adapters[0].targets == given.adapters[0].targets


def test_what_is_not_there(cache, tmp_path, capsys):
    with pytest.raises(BadInputError) as error:
        locate("hf://org/other")
    assert error.value.findings[0].code == "offline"
    assert "hf download org/other" in error.value.findings[0].fix
    assert run(["inspect", "s3://bucket/model", "--offline"]) == 1
    assert "--offline" in capsys.readouterr().err
    assert (
        run(["convert", str(BASE), "out", "--to", "transformers-v5", "--model", "org/other"]) == 1
    )
    assert "hf download org/other config.json" in capsys.readouterr().err
