"""Adapters are written like checkpoints: whole or not at all, by one run at a time."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from killing import run_killed

import regraft
from regraft.converting import adapters as adapting
from regraft.dialects.peft import saving
from regraft.errors import BadInputError
from regraft.storage.work import open_work, work_folder

CASE = Path(__file__).parents[1] / "golden" / "cases" / "mixtral__gud_attn"
V5 = "transformers-v5"


def snapshot(folder):
    """Every file below a folder and its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def lora(tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(CASE / name, folder)
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "deep" / "out"


@pytest.fixture
def wanted(lora, tmp_path):
    regraft.convert(lora, tmp_path / "wanted", to=V5)
    return snapshot(tmp_path / "wanted")


def fail_after(monkeypatch, after, error):
    """Let a number of files be written, and then fail."""
    left = [after]

    def counted(function):
        def run(*args):
            if not left[0]:
                raise error
            left[0] -= 1
            return function(*args)

        return run

    for module, name in ((saving, "write_tensors"), (adapting, "copy_file")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_nothing(lora, tmp_path, out, monkeypatch, after, overwrite):
    (lora / "README.md").write_text("mine")
    if overwrite:
        out.mkdir(parents=True)
        (out / "old").write_text("old")
    before = snapshot(tmp_path)
    fail_after(monkeypatch, after, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(BadInputError, match="No space left") as caught:
        regraft.convert(lora, out, to=V5, overwrite=overwrite)
    assert caught.value.findings[0].code == "cannot-write"
    assert snapshot(tmp_path) == before
    assert out.parent.exists() == overwrite


@pytest.mark.slow
def test_a_disk_that_is_really_full(lora, wanted, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not hasattr(os, "geteuid") or os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        filler = disk / "filler"
        filler.write_bytes(bytes((1 << 20) - 8192))
        with pytest.raises(BadInputError, match="are free") as caught:
            regraft.convert(lora, disk / "out", to=V5)
        assert caught.value.findings[0].code == "no-space"
        before, adapting.staged_folder = (
            adapting.staged_folder,
            lambda dst, *, overwrite, size: before(dst, overwrite=overwrite, size=-(1 << 20)),
        )
        try:
            with pytest.raises(BadInputError, match="No space left"):
                regraft.convert(lora, disk / "out", to=V5)
        finally:
            adapting.staged_folder = before
        assert [*disk.iterdir()] == [filler]
        filler.unlink()
        regraft.convert(lora, disk / "out", to=V5)
        assert snapshot(disk / "out") == wanted
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_room_is_checked_with_all_that_is_written(lora, out, monkeypatch):
    (lora / "notes.txt").write_bytes(bytes(3_000_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9e6, 0, 2e6))
    with pytest.raises(BadInputError, match=r"3\.\d+ MB more are needed, and 2 MB are free"):
        regraft.convert(lora, out, to=V5)
    assert not out.parent.exists()


def test_a_second_run_names_the_first(lora, out, wanted):
    with open_work(out) as held:
        with pytest.raises(BadInputError, match=f"process {os.getpid()}") as caught:
            regraft.convert(lora, out, to=V5)
        assert caught.value.findings[0].code == "in-use"
        held.clear()
    regraft.convert(lora, out, to=V5)
    assert snapshot(out) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("there", [False, True])
def test_killed_at_every_step(lora, out, wanted, there):
    """What stands at the destination is the old or the new, or is put back by the next run."""
    seen = set()
    for step in range(30):
        shutil.rmtree(out.parent, ignore_errors=True)
        if there:
            out.mkdir(parents=True)
            (out / "old").write_text("old")
        counted = [(saving, "write_tensors"), (os, "fsync"), (os, "rename")]
        done = run_killed(step, counted, regraft.convert, lora, out, to=V5, overwrite=True)
        left = snapshot(out) if out.exists() else None
        assert left in ([{"old": b"old"}, wanted] if there else [None, wanted]) or (
            left is None and (work_folder(out) / "old" / "old").exists()
        )
        seen.add((left is None, left == wanted))
        regraft.convert(lora, out, to=V5, overwrite=True)
        assert snapshot(out) == wanted
        assert [*out.parent.iterdir()] == [out]
        if done:
            break
    else:
        pytest.fail("it never came to its end")
    assert (False, True) in seen and len(seen) > 1


def test_a_source_that_is_written_to(lora, out, monkeypatch):
    write = saving.write_tensors

    def touching(*args):
        write(*args)
        os.utime(lora / "adapter_model.safetensors", ns=(1, 1))

    monkeypatch.setattr(saving, "write_tensors", touching)
    with pytest.raises(BadInputError, match="it was written to"):
        regraft.convert(lora, out, to=V5)
    assert not out.parent.exists()


def test_a_name_of_a_file_is_refused(lora, tmp_path):
    with pytest.raises(BadInputError, match="an adapter is a folder"):
        regraft.convert(lora, tmp_path / "out.safetensors", to=V5)


def test_a_source_that_is_none_is_said_before_the_destination(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(regraft.BadInputError, match="neither an adapter here"):
        regraft.convert(tmp_path / "empty", tmp_path / "x.safetensors", to="transformers-v5")
