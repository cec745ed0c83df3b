"""One weights file in, one weights file out."""

import json
import os

import pytest
from checkpoints.models import beside, mixtral, snapshot, write_folder

import regraft
from regraft.checkpoints import engine, units
from regraft.checkpoints.verify import verify
from regraft.cli import main
from regraft.errors import BadInputError
from regraft.storage import work
from regraft.storage.safetensors import open_tensors, read_header

V4, V5 = "transformers-v4", "transformers-v5"


@pytest.fixture
def src(tmp_path):
    return write_folder(tmp_path / "src", mixtral()) / "model.safetensors"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "made" / "fused.safetensors"


def test_a_file_becomes_a_file(src, out, tmp_path):
    report = regraft.convert(src, out, to=V5)
    assert report.checkpoint.files == ["fused.safetensors"] and report.files == []
    assert beside(out) == ["fused.safetensors"]
    assert verify(src, out).equal
    regraft.convert(src, tmp_path / "folder", to=V5)
    assert out.read_bytes() == (tmp_path / "folder" / "model.safetensors").read_bytes()
    assert oct(out.stat().st_mode) == oct((tmp_path / "folder" / "config.json").stat().st_mode)
    assert read_header(out).metadata == {"format": "pt"}
    (out.parent / "config.json").write_bytes((src.parent / "config.json").read_bytes())
    regraft.convert(out, tmp_path / "back.safetensors", to=V4)
    back, first = open_tensors(tmp_path / "back.safetensors"), open_tensors(src)
    assert back.keys() == first.keys()
    assert all(back[name].tobytes() == first[name].tobytes() for name in first)


def test_the_config_beside_it_is_told_of_and_left(src, out, capsys):
    before = snapshot(src.parent)
    assert main(["convert", str(src), str(out), "--to", V5]) == 0
    shown = capsys.readouterr().out
    assert "Note: a file is written, and" in shown and "rope_parameters" in shown
    assert "config.json: " not in shown
    assert snapshot(src.parent) == before
    report = regraft.convert(src, out, to=V4, overwrite=True)
    assert report.notes == []


def test_beside_the_source(src):
    regraft.convert(src, src.with_name("new.safetensors"), to=V5)
    assert beside(src) == ["config.json", "model.safetensors", "new.safetensors"]


def test_overwrite_and_what_is_refused(src, out, tmp_path):
    out.parent.mkdir()
    out.write_text("old")
    with pytest.raises(BadInputError, match=r"the file to write exists already.*--overwrite"):
        regraft.convert(src, out, to=V5)
    assert out.read_text() == "old"
    regraft.convert(src, out, to=V5, overwrite=True)
    assert verify(src, out).equal
    for dst, match in (
        (src, "the one that is read"),
        (out / "x.safetensors", "which is a file"),
        (tmp_path / "x.bin", "never written"),
        (out.with_suffix(".pt"), "never written"),
    ):
        with pytest.raises(BadInputError, match=match):
            regraft.convert(src, dst, to=V5, overwrite=True)
    with pytest.raises(BadInputError, match="is a folder, with more than weights"):
        regraft.convert(src.parent, tmp_path / "x.safetensors", to=V5)
    with pytest.raises(BadInputError, match="a shard size is for folders"):
        regraft.convert(src, tmp_path / "x.safetensors", to=V5, shard_size="1GB")
    assert beside(src.parent) == ["made", "src"]


def test_a_folder_that_is_named_like_a_file(src, tmp_path):
    folder = tmp_path / "x.safetensors"
    folder.mkdir()
    with pytest.raises(BadInputError, match="the folder to write exists already"):
        regraft.convert(src, folder, to=V5)
    regraft.convert(src, folder, to=V5, overwrite=True)
    assert set(snapshot(folder)) == {"config.json", "model.safetensors"}


def test_resume_and_the_lock(src, out, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "UNIT", 64)
    monkeypatch.setattr(engine, "_SYNC_BYTES", 128)
    regraft.convert(src, tmp_path / "wanted.safetensors", to=V5)
    do, left = engine.Worker.do, [20]

    def stopping(worker, op, file):
        left[0] -= 1
        if not left[0]:
            raise OSError(5, "broken")
        do(worker, op, file)

    monkeypatch.setattr(engine.Worker, "do", stopping)
    out.parent.mkdir()
    out.write_text("old")
    with pytest.raises(BadInputError, match="broken"):
        regraft.convert(src, out, to=V5, overwrite=True)
    assert out.read_text() == "old"
    with (
        work.open_work(out, file=True),
        pytest.raises(BadInputError, match=f"process {os.getpid()}"),
    ):
        regraft.convert(src, out, to=V5, overwrite=True)
    report = regraft.convert(src, out, to=V5, overwrite=True, resume=True)
    assert report.checkpoint.resumed
    assert out.read_bytes() == (tmp_path / "wanted.safetensors").read_bytes()
    assert beside(out) == ["fused.safetensors"]


def test_torch_in_safetensors_out(tmp_path, out):
    torch = pytest.importorskip("torch")
    tensors = mixtral()
    folder = write_folder(tmp_path / "src", tensors)
    path = folder / "pytorch_model.bin"
    torch.save({name: torch.from_numpy(t.copy()) for name, t in tensors.items()}, path)
    regraft.convert(path, out, to=V5)
    assert verify(folder / "model.safetensors", out).equal
    assert open_tensors(out).keys() == read_header(out).tensors.keys()


def test_one_of_several_is_refused(tmp_path):
    folder = write_folder(tmp_path / "src", mixtral(), shards=2)
    file = folder / "model-00001-of-00002.safetensors"
    with pytest.raises(BadInputError, match="one of 2 files of a checkpoint"):
        regraft.convert(file, tmp_path / "out", to=V5)
    assert json.loads((folder / "config.json").read_text())
