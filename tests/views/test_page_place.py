"""A page takes the place of nothing but an older page."""

import os
from pathlib import Path

import pytest

from regraft.cli.run import run
from regraft.errors import BadInputError
from regraft.views.html import check_page_place

GOLDEN = Path(__file__).parents[1] / "golden"
ADAPTER = next(p.parent for p in sorted(GOLDEN.rglob("mixtral__gate_up/**/adapter_config.json")))


def write(file):
    return run(["inspect", str(ADAPTER), "--html", str(file)])


def test_pages_are_replaced(tmp_path, capsys):
    page = tmp_path / "page.html"
    assert write(page) == 0
    first = page.read_bytes()
    page.write_bytes(first + b"<!-- older -->")
    assert write(page) == 0
    assert page.read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_anything_else_is_not(tmp_path, capsys):
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"weights")
    link = tmp_path / "link.html"
    link.symlink_to(other)
    dead = tmp_path / "dead.html"
    dead.symlink_to(tmp_path / "nothing")
    pipe = tmp_path / "pipe.html"
    os.mkfifo(pipe)
    for file in (other, link, dead, pipe, Path(os.devnull)):
        assert write(file) == 1
        assert "page of regraft's" in capsys.readouterr().err
        with pytest.raises(BadInputError) as caught:
            check_page_place(file)
        assert caught.value.findings[0].code == "page-exists"
    assert other.read_bytes() == b"weights"
    assert not (tmp_path / "nothing").exists()


def test_a_planted_partial_page_is_not_followed(tmp_path, capsys):
    victim = tmp_path / "victim"
    victim.write_text("keep")
    (tmp_path / ".page.html.part").symlink_to(victim)
    assert write(tmp_path / "page.html") == 0
    assert victim.read_text() == "keep"
