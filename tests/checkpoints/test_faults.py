"""Whatever goes wrong, what stands at the destination is whole; and what was done can be continued."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from checkpoints.models import MIXTRAL, beside, mixtral, snapshot, write_folder

import regraft
from regraft.checkpoints import engine, tiles, units, workers
from regraft.checkpoints import result as result_module
from regraft.errors import BadInputError
from regraft.storage import work
from regraft.storage.work import Work

V4, V5 = "transformers-v4", "transformers-v5"


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """Units so small that a little checkpoint has many of them."""
    monkeypatch.setattr(units, "UNIT", 64)
    monkeypatch.setattr(engine, "_SYNC_BYTES", 128)


@pytest.fixture
def src(tmp_path):
    return write_folder(tmp_path / "src", mixtral(), shards=3)


@pytest.fixture
def wanted(src, tmp_path):
    regraft.convert(src, tmp_path / "wanted", to=V5)
    return snapshot(tmp_path / "wanted")


class Stopping:
    """Lets a number of operations pass, and then raises."""

    def __init__(self, monkeypatch, after, error):
        self.left, self.error, self.lock = after, error, threading.Lock()
        self.done = 0
        do = engine.Worker.do

        def counted(worker, op, out):
            with self.lock:
                if self.left is not None:
                    if not self.left:
                        raise self.error
                    self.left -= 1
                self.done += 1
            do(worker, op, out)

        monkeypatch.setattr(engine.Worker, "do", counted)


@pytest.mark.parametrize("after", [0, 1, 5, 20])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_full_disk_can_be_resumed(src, wanted, tmp_path, monkeypatch, after, jobs):
    stop = Stopping(monkeypatch, after, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    out = tmp_path / "out"
    with pytest.raises(BadInputError, match="No space left"):
        regraft.convert(src, out, to=V5, jobs=jobs)
    assert not out.exists()
    stop.left, stop.done = None, 0
    report = regraft.convert(src, out, to=V5, resume=True)
    assert snapshot(out) == wanted
    assert report.checkpoint.resumed == (after > 0)
    done, stop.done = stop.done, 0
    regraft.convert(src, out, to=V5, overwrite=True)
    assert done + after == stop.done
    assert beside(out) == ["out", "src", "wanted"]


def test_a_fresh_run_clears_what_a_dead_one_left(src, wanted, tmp_path, monkeypatch):
    stop = Stopping(monkeypatch, 20, OSError(errno.EIO, "broken"))
    with pytest.raises(BadInputError):
        regraft.convert(src, tmp_path / "out", to=V5)
    assert ".out.regraft" in beside(tmp_path / "out")
    stop.left = None
    report = regraft.convert(src, tmp_path / "out", to=V5)
    assert not report.checkpoint.resumed
    assert snapshot(tmp_path / "out") == wanted
    assert beside(tmp_path / "out") == ["out", "src", "wanted"]


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ({"shard_size": "400B"}, {}, "--shard-size is not given now, and was 400B"),
        ({}, {"dtype": "bfloat16"}, "--dtype is bfloat16 now, and was not given"),
        ({}, {"drop": ["lm_head.weight"]}, "--drop is lm_head.weight now, and was not given"),
    ],
)
def test_resuming_other_work_names_the_option(src, tmp_path, monkeypatch, then, now, said):
    stop = Stopping(monkeypatch, 20, OSError(errno.EIO, "broken"))
    with pytest.raises(BadInputError):
        regraft.convert(src, tmp_path / "out", to=V5, **then)
    stop.left = None
    with pytest.raises(BadInputError, match="other work") as caught:
        regraft.convert(src, tmp_path / "out", to=V5, resume=True, **now)
    assert caught.value.findings[0].code == "other-work"
    assert said in str(caught.value)
    # What was done stays until somebody decides.
    assert regraft.convert(src, tmp_path / "out", to=V5, resume=True, **then).checkpoint.resumed


def test_resuming_from_a_source_that_changed_names_it(src, tmp_path, monkeypatch):
    stop = Stopping(monkeypatch, 20, OSError(errno.EIO, "broken"))
    with pytest.raises(BadInputError):
        regraft.convert(src, tmp_path / "out", to=V5)
    stop.left = None
    [first, *_] = sorted(src.glob("*.safetensors"))
    os.utime(first, (1, 1))
    with pytest.raises(BadInputError, match=f"written to since: .*{first.name}"):
        regraft.convert(src, tmp_path / "out", to=V5, resume=True)


def test_the_same_work_in_other_words_is_resumed(src, wanted, tmp_path, monkeypatch):
    stop = Stopping(monkeypatch, 20, OSError(errno.EIO, "broken"))
    with pytest.raises(BadInputError):
        regraft.convert(src, tmp_path / "out", to=V5)
    stop.left = None
    report = regraft.convert(src, tmp_path / "out", to=V5, model=src, resume=True)
    assert report.checkpoint.resumed and snapshot(tmp_path / "out") == wanted


def test_resume_with_nothing_to_resume(src, wanted, tmp_path):
    report = regraft.convert(src, tmp_path / "out", to=V5, resume=True).checkpoint
    assert not report.resumed and any("--resume found nothing" in note for note in report.notes)
    assert snapshot(tmp_path / "out") == wanted


def test_resume_of_what_was_finished_says_so(src, wanted, tmp_path):
    regraft.convert(src, tmp_path / "out", to=V5)
    with pytest.raises(BadInputError, match=r"nothing is left to resume.*regraft verify"):
        regraft.convert(src, tmp_path / "out", to=V5, resume=True)
    assert snapshot(tmp_path / "out") == wanted


def test_overwrite_keeps_the_old_until_the_new_stands(src, wanted, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(BadInputError, match="exists already"):
        regraft.convert(src, out, to=V5)
    stop = Stopping(monkeypatch, 9, OSError(errno.EIO, "broken"))
    with pytest.raises(BadInputError):
        regraft.convert(src, out, to=V5, overwrite=True)
    assert snapshot(out) == {"old": b"old"}
    stop.left = None
    regraft.convert(src, out, to=V5, overwrite=True, resume=True)
    assert snapshot(out) == wanted
    assert beside(out) == ["out", "src", "wanted"]


def test_dying_between_the_two_renames(src, wanted, tmp_path):
    out = tmp_path / "out"
    (work.work_folder(out) / "old").mkdir(parents=True)
    (work.work_folder(out) / "old" / "file").write_text("old")
    with pytest.raises(BadInputError, match="came into being"):
        regraft.convert(src, out, to=V5)
    assert snapshot(out) == {"file": b"old"}
    regraft.convert(src, out, to=V5, overwrite=True, resume=True)
    assert snapshot(out) == wanted
    assert beside(out) == ["out", "src", "wanted"]


def test_a_second_run_names_the_first(src, tmp_path):
    with work.open_work(tmp_path / "out") as held:
        with pytest.raises(BadInputError, match=f"process {os.getpid()}") as caught:
            regraft.convert(src, tmp_path / "out", to=V5)
        assert caught.value.findings[0].code == "in-use"
        held.clear()
    regraft.convert(src, tmp_path / "out", to=V5)


def test_a_run_that_was_overtaken_does_not_begin(src, wanted, tmp_path, monkeypatch):
    """Another run came to its end between the first look at the destination and the lock."""
    out = tmp_path / "out"
    check = result_module.check_destination

    def overtaken(*args, **options):
        check(*args, **options)
        monkeypatch.setattr(result_module, "check_destination", check)
        regraft.convert(src, out, to=V5)

    monkeypatch.setattr(result_module, "check_destination", overtaken)
    with pytest.raises(BadInputError, match="came into being"):
        regraft.convert(src, out, to=V5)
    assert snapshot(out) == wanted
    assert beside(out) == ["out", "src", "wanted"]


def test_a_source_that_is_cut_while_it_is_read(src, tmp_path, monkeypatch):
    do = engine.Worker.do
    file = src / "model-00002-of-00003.safetensors"

    def cutting(worker, op, out):
        with file.open("r+b") as opened:
            opened.truncate(1000)
        do(worker, op, out)

    monkeypatch.setattr(engine.Worker, "do", cutting)
    with pytest.raises(BadInputError, match="changed while it was read"):
        regraft.convert(src, tmp_path / "out", to=V5)
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_written_to(src, tmp_path, monkeypatch):
    do = engine.Worker.do

    def touching(worker, op, out):
        do(worker, op, out)
        os.utime(src / "model-00001-of-00003.safetensors", ns=(1, 1))

    monkeypatch.setattr(engine.Worker, "do", touching)
    with pytest.raises(BadInputError, match="it was written to"):
        regraft.convert(src, tmp_path / "out", to=V5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS])
def test_where_the_kernel_does_not_copy(src, wanted, tmp_path, monkeypatch, code):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    regraft.convert(src, tmp_path / "out", to=V5)
    assert snapshot(tmp_path / "out") == wanted


def test_too_little_room_is_told_before_the_work(src, tmp_path, monkeypatch):
    full = shutil._ntuple_diskusage(10**9, 10**9, 1536)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(BadInputError, match="are free"):
        regraft.convert(src, tmp_path / "out", to=V5)
    assert beside(tmp_path / "out") == ["src"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_target_that_may_not_be_written(src, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(BadInputError, match="may not be written"):
        regraft.convert(src, tmp_path / "closed" / "out", to=V5)


_RUN = """
import sys, time
from regraft.checkpoints import engine, units
units.UNIT, engine._SYNC_BYTES = 64, 128
do = engine.Worker.do
def slow(worker, op, out):
    time.sleep(0.002)
    do(worker, op, out)
engine.Worker.do = slow
import regraft
print("ready", flush=True)
regraft.convert(sys.argv[1], sys.argv[2], to="transformers-v5", resume=sys.argv[3] == "1")
"""


@pytest.mark.slow
def test_killed_at_random(src, wanted, tmp_path):
    out = tmp_path / "out"
    chance = random.Random(0)
    command = [sys.executable, "-c", _RUN, str(src), str(out)]
    for round_number in range(12):
        resume = "1" if round_number % 4 else "0"
        process = subprocess.Popen([*command, resume], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.12))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if out.exists():
            assert snapshot(out) == wanted
            break
    if not out.exists():  # with units of the same size: others are other work
        subprocess.run([*command, "1"], check=True, stdout=subprocess.DEVNULL)
    else:
        regraft.convert(src, out, to=V5, overwrite=True)
    assert snapshot(out) == wanted
    assert beside(out) == ["out", "src", "wanted"]


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if not hasattr(os, "geteuid") or os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        config = {**MIXTRAL, "hidden_size": 64, "intermediate_size": 128}
        src = write_folder(tmp_path / "src", mixtral(64, 128), config)
        regraft.convert(src, tmp_path / "wanted", to=V5)
        (disk / "filler").write_bytes(bytes(1_600_000))
        with pytest.raises(BadInputError, match="free"):
            regraft.convert(src, disk / "out", to=V5)
        before, Work.check_space = Work.check_space, lambda *args: None
        try:
            with pytest.raises(BadInputError, match="No space left"):
                regraft.convert(src, disk / "out", to=V5)
        finally:
            Work.check_space = before
        assert not (disk / "out").exists()
        (disk / "filler").unlink()
        regraft.convert(src, disk / "out", to=V5, resume=True)
        assert snapshot(disk / "out") == snapshot(tmp_path / "wanted")
        assert beside(disk / "out") == ["out"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_tiles_have_a_budget():
    assert tiles.Mover(workers.buffer_size(64)).size >= 1 << 18
