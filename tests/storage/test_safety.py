"""What lies beside an input, or in the way of an output, cannot do harm."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import regraft
from regraft.errors import BadInputError
from regraft.storage import work
from regraft.storage.folder import copy_file, staged_folder
from regraft.storage.safetensors import open_tensors, read_header, write_tensors
from regraft.storage.stamp import Stamp

GOLDEN = Path(__file__).parents[1] / "golden"
BASE = GOLDEN / "bases" / "mixtral"
ADAPTER = next(p.parent for p in sorted(GOLDEN.rglob("mixtral__gate_up/**/adapter_config.json")))

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links and modes of POSIX")


@pytest.fixture(params=["adapter", "checkpoint"])
def source(request, tmp_path):
    """A folder that converts."""
    folder = tmp_path / "in" / "src"
    shutil.copytree(ADAPTER if request.param == "adapter" else BASE, folder)
    return folder


def convert(source, dst, **options):
    return regraft.convert(source, dst, to="transformers-v5", model=BASE, **options)


def codes(caught):
    return {finding.code for finding in caught.value.findings}


def weights_of(folder):
    return next(iter(sorted(folder.glob("*.safetensors"))))


@pytest.mark.parametrize("kind", ["file", "folder", "nowhere"])
def test_a_link_beside_the_weights_is_not_followed(source, tmp_path, kind):
    secret = tmp_path / "secret"
    if kind == "folder":
        secret.mkdir()
        (secret / "key").write_text("private")
    elif kind == "file":
        secret.write_text("private")
    (source / "notes").symlink_to(secret)
    if kind == "folder" and not (source / "adapter_config.json").exists():
        report = convert(source, tmp_path / "out")
        assert "notes" in str(report.notes)
    else:
        with pytest.raises(BadInputError) as caught:
            convert(source, tmp_path / "out")
        assert codes(caught) == {"link-outside"}
    assert not (tmp_path / "out" / "notes").exists()


def test_weights_and_config_that_are_links_are_not_followed(source, tmp_path):
    for name in (weights_of(source).name, next(source.glob("*config.json")).name):
        (source / name).rename(tmp_path / name)
        (source / name).symlink_to(tmp_path / name)
        with pytest.raises(BadInputError) as caught:
            convert(source, tmp_path / "out")
        assert codes(caught) == {"link-outside"}
        (source / name).unlink()
        (tmp_path / name).rename(source / name)


def test_links_of_a_cache_are_followed(source, tmp_path):
    snapshot = tmp_path / "cache" / "snapshots" / "abc" / "sub"
    blobs = tmp_path / "cache" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../../blobs") / path.name)
    convert(snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_pipe_beside_the_weights(source, tmp_path):
    os.mkfifo(source / "pipe")
    with pytest.raises(BadInputError, match="not a regular file") as caught:
        convert(source, tmp_path / "out")
    assert codes(caught) == {"not-a-file"}


def test_a_planted_work_folder_is_left_alone(source, tmp_path):
    victim = tmp_path / "victim"
    (victim / "new").mkdir(parents=True)
    (victim / "new" / "precious").write_text("keep")
    planted = tmp_path / ".out.regraft"
    planted.symlink_to(victim)
    with pytest.raises(BadInputError, match="it is a link") as caught:
        convert(source, tmp_path / "out")
    assert codes(caught) == {"work-folder"}
    assert planted.is_symlink()
    planted.unlink()

    for name in ("precious", "new", "old", "lock", "journal"):
        planted.mkdir()
        (planted / name).symlink_to(victim)
        with pytest.raises(BadInputError, match=name) as caught:
            convert(source, tmp_path / "out")
        assert codes(caught) == {"work-folder"}
        shutil.rmtree(planted)
    planted.mkdir()
    (planted / "thesis.txt").write_text("mine")
    with pytest.raises(BadInputError, match=r"thesis\.txt"):
        convert(source, tmp_path / "out")
    assert (planted / "thesis.txt").read_text() == "mine"
    assert (victim / "new" / "precious").read_text() == "keep"


def test_files_that_a_dead_run_left_as_links_are_not_followed(tmp_path):
    source = tmp_path / "src"
    shutil.copytree(BASE, source)
    victim = tmp_path / "victim"
    victim.write_text("keep")
    path = tmp_path / ".out.regraft"
    path.mkdir()
    (path / "lock").symlink_to(victim)
    with pytest.raises(BadInputError):
        convert(source, tmp_path / "out")
    assert victim.read_text() == "keep"
    with pytest.raises(OSError):
        work.write_file(path / "lock", b"x")
    with pytest.raises(BadInputError):
        copy_file(victim, path / "lock")
    assert victim.read_text() == "keep"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_private_stays_private(source, tmp_path, mode):
    old = os.umask(0o022)
    try:
        for path in source.iterdir():
            path.chmod(mode)
        source.chmod(0o750)
        convert(source, tmp_path / "out")
    finally:
        os.umask(old)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {mode}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


def test_the_work_folder_is_private(tmp_path):
    with staged_folder(tmp_path / "out", overwrite=False):
        assert stat.S_IMODE((tmp_path / ".out.regraft").stat().st_mode) == 0o700


def test_what_cannot_be_cleaned_up_is_no_failure(source, tmp_path, monkeypatch):
    """The result is in its place; an error while the rest is removed changes nothing of that."""

    def fail(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(work.Work, "clear", fail)
    convert(source, tmp_path / "out")
    assert weights_of(tmp_path / "out").exists()


_ENDED = """
import os, signal, sys
from regraft.cli.run import run
from regraft.storage import work
lock = work.try_lock
def ended(file):
    os.kill(os.getpid(), signal.SIGTERM)
    return lock(file)
work.try_lock = ended
sys.exit(run(["convert", sys.argv[1], sys.argv[2], "--to", "transformers-v5", "--model", sys.argv[3]]))
"""


@pytest.mark.slow
def test_a_termination_in_the_first_calls_leaves_no_lock(source, tmp_path):
    command = [sys.executable, "-c", _ENDED, str(source), str(tmp_path / "out"), str(BASE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_file_that_was_rewritten_with_its_old_time(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12")
    stamp, times = Stamp.of(path), path.stat()
    path.write_bytes(b"34")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(BadInputError, match="it was written to") as caught:
        stamp.check()
    assert codes(caught) == {"file-changed"}


def test_another_file_in_its_place(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12")
    stamp = Stamp.of(path)
    (tmp_path / "y").write_bytes(b"34")
    (tmp_path / "y").replace(path)
    with pytest.raises(BadInputError, match="another file"):
        stamp.check()


def test_a_file_that_becomes_shorter_while_it_is_used(tmp_path):
    """Nothing that was read looks at the file again: a mapped one would end the process."""
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": np.ones(100_000)}, {})
    header = read_header(path)
    tensors = open_tensors(path, header)
    os.truncate(path, 1000)
    assert tensors["a"].sum() == 100_000
    with pytest.raises(BadInputError) as caught:
        open_tensors(path, header)
    assert codes(caught) == {"file-changed"}


def test_an_adapter_that_becomes_shorter_meanwhile(tmp_path, monkeypatch):
    from regraft.converting import adapters as api

    folder = tmp_path / "src"
    shutil.copytree(ADAPTER, folder)
    convert_adapter = api.convert_adapter

    def convert_late(*arguments, **options):
        os.truncate(weights_of(folder), 4096)
        return convert_adapter(*arguments, **options)

    monkeypatch.setattr(api, "convert_adapter", convert_late)
    with pytest.raises(BadInputError) as caught:
        convert(folder, tmp_path / "out")
    assert codes(caught) == {"file-changed"}
    assert not (tmp_path / "out").exists()


def test_signals_wait_only_while_the_lock_is_taken(tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    with staged_folder(tmp_path / "out", overwrite=False):
        assert signal.getsignal(signal.SIGTERM) is handler


def test_in_place_keeps_permissions(tmp_path):
    folder = tmp_path / "src"
    shutil.copytree(GOLDEN / "bases" / "mixtral", folder)
    (folder / "config.json").chmod(0o600)
    from regraft.checkpoints.in_place import _replace

    _replace(folder / "config.json", json.dumps({}).encode())
    assert stat.S_IMODE((folder / "config.json").stat().st_mode) == 0o600
