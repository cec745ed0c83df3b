"""What tells of private files is as private as they are."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from regraft.cli import main

GOLDEN = Path(__file__).parents[1] / "golden"
CASE = GOLDEN / "cases" / "mixtral__only_gate"


@pytest.fixture
def private(tmp_path):
    folder = tmp_path / "private"
    shutil.copytree(CASE, folder)
    for file in folder.iterdir():
        file.chmod(0o600)
    return folder


@pytest.fixture(autouse=True)
def usual_mask():
    old = os.umask(0o022)
    yield
    os.umask(old)


def mode(file):
    return file.stat().st_mode & 0o777


@pytest.mark.parametrize("command", [["inspect"], ["explain", "KEY", "--to", "transformers-v5"]])
def test_a_page_has_no_permission_that_its_source_lacks(command, private, tmp_path):
    key = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    arguments = [key if word == "KEY" else word for word in command[1:]]
    for source, wanted in ((private, 0o600), (CASE, 0o644)):
        page = tmp_path / f"{source.name}.html"
        main([command[0], str(source), *arguments, "--html", str(page), "--quiet"])
        assert mode(page) == wanted


def test_a_page_of_what_failed_is_as_private(private, tmp_path):
    page = tmp_path / "page.html"
    (private / "adapter_config.json").write_text("{}")
    assert (
        main(["convert", str(private), "out", "--to", "transformers-v5", "--html", str(page)]) == 1
    )
    assert mode(page) == 0o600


def test_a_book_of_private_files_is_as_private(tmp_path):
    rng = np.random.default_rng(0)
    tensor = rng.normal(size=(4, 6)).astype(np.float32)
    save_file({"a.weight": tensor}, tmp_path / "a.safetensors")
    save_file({"b.weight": tensor}, tmp_path / "b.safetensors")
    (tmp_path / "a.safetensors").chmod(0o600)
    book = tmp_path / "book.toml"
    files = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert main(["diff", *files, "--book", str(book), "--quiet"]) in (0, 4)
    assert mode(book) == 0o600


def test_a_file_that_shrinks_while_it_is_compared_is_an_error(tmp_path, monkeypatch, capsys):
    from regraft.learning import content

    file = tmp_path / "a.safetensors"
    save_file({"a.weight": np.ones((64, 64), np.float32)}, file)
    opened = content.open_source

    def shrunk(one):
        number = opened(one)
        os.truncate(one.path, 200)
        return number

    monkeypatch.setattr(content, "open_source", shrunk)
    assert main(["diff", str(file), str(file), "--json"]) == 1
    assert "file-changed" in capsys.readouterr().out
