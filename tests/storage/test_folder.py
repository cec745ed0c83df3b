"""Folders that appear whole or not at all, and JSON files."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from regraft.errors import BadInputError
from regraft.storage import folder as module
from regraft.storage import json_files
from regraft.storage.folder import check_destination, copy_file, staged_folder
from regraft.storage.json_files import load_json
from regraft.storage.work import work_folder


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: the files' contents, and None for a folder."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
    }


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    return folder


def test_appears_whole(tmp_path: Path) -> None:
    dst = tmp_path / "deep" / "er" / "out"
    with staged_folder(dst, overwrite=False) as folder:
        assert folder.parent.parent == dst.parent
        assert folder.parent.name.startswith(".")
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not dst.exists()
    assert snapshot(tmp_path / "deep" / "er") == {
        "out": None,
        "out/sub": None,
        "out/sub/file": b"x",
    }


def test_obeys_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with staged_folder(tmp_path / "out", overwrite=False):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("overwrite", [True, False])
def test_error_inside_leaves_nothing(tmp_path: Path, error: BaseException, overwrite: bool) -> None:
    with (
        pytest.raises(type(error)),
        staged_folder(tmp_path / "a" / "b" / "out", overwrite=overwrite) as new,
    ):
        (new / "file").write_text("x")
        raise error
    assert snapshot(tmp_path) == {}


def test_error_inside_keeps_what_others_put_beside(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "a" / "out", overwrite=False):
        (tmp_path / "a" / "other").write_text("x")
        raise RuntimeError
    assert snapshot(tmp_path) == {"a": None, "a/other": b"x"}


def test_error_inside_preserves_the_old(tmp_path: Path, old: Path) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(RuntimeError), staged_folder(old, overwrite=True) as new:
        (new / "file").write_text("x")
        raise RuntimeError
    assert snapshot(tmp_path) == before


def test_overwrite_replaces_the_whole(tmp_path: Path, old: Path) -> None:
    with staged_folder(old, overwrite=True) as new:
        (new / "new.txt").write_text("new")
        assert (old / "old.txt").exists()
    assert snapshot(tmp_path) == {"out": None, "out/new.txt": b"new"}


def test_overwrite_follows_a_link(tmp_path: Path, old: Path) -> None:
    (tmp_path / "link").symlink_to(old)
    with staged_folder(tmp_path / "link", overwrite=True) as new:
        (new / "new.txt").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert snapshot(old) == {"new.txt": b"new"}


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["first", "second", "second done", "sync"])
def test_error_in_the_swap_preserves_a_whole_folder(
    tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, step: str
) -> None:
    calls = 0
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if step == "second done" and calls == 2:
            rename(self, target)
        if (calls == 1 and step == "first") or (calls == 2 and step.startswith("second")):
            raise error
        return rename(self, target)

    def fail_sync(path: Path) -> None:
        if step == "sync":
            raise error

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(module, "sync_path", fail_sync)
    expected = BadInputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), staged_folder(old, overwrite=True) as new:
        (new / "new.txt").write_text("new")
    whole = {"new.txt": b"new"} if step == "second done" else {"old.txt": b"old"}
    assert snapshot(old) == whole
    assert list(tmp_path.iterdir()) == [old]


def test_killed_process_leaves_the_old(tmp_path: Path, old: Path) -> None:
    code = """
        import os, signal, sys
        from regraft.storage.folder import staged_folder
        with staged_folder(sys.argv[1], overwrite=True) as new:
            (new / "file").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(old)], check=False)
    assert done.returncode == -9
    assert snapshot(old) == {"old.txt": b"old"}
    assert len(list(tmp_path.iterdir())) == 2
    with staged_folder(old, overwrite=True) as new:
        (new / "new.txt").write_text("new")
    assert snapshot(tmp_path) == {"out": None, "out/new.txt": b"new"}


def test_dying_between_the_two_renames(tmp_path: Path, old: Path) -> None:
    folder = work_folder(old)
    folder.mkdir()
    old.rename(folder / "old")
    with (
        pytest.raises(BadInputError, match="came into being"),
        staged_folder(old, overwrite=False),
    ):
        pass
    assert snapshot(tmp_path) == {"out": None, "out/old.txt": b"old"}


def test_dying_after_the_two_renames(tmp_path: Path, old: Path) -> None:
    left = work_folder(old) / "old"
    left.mkdir(parents=True)
    (left / "older.txt").write_text("older")
    with staged_folder(old, overwrite=True) as new:
        (new / "new.txt").write_text("new")
    assert snapshot(tmp_path) == {"out": None, "out/new.txt": b"new"}


def test_a_second_run_names_the_first(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", overwrite=False) as new:
        (new / "file").write_text("x")
        with (
            pytest.raises(BadInputError, match=f"process {os.getpid()}") as caught,
            staged_folder(tmp_path / "out", overwrite=False),
        ):
            pytest.fail("the block must not run")
        assert caught.value.findings[0].code == "in-use"
    assert snapshot(tmp_path) == {"out": None, "out/file": b"x"}


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("regraft.storage.work.fcntl.flock", fail)
    if code == errno.ENOLCK:
        with staged_folder(tmp_path / "out", overwrite=False):
            pass
        assert snapshot(tmp_path) == {"out": None}
    else:
        with (
            pytest.raises(BadInputError, match="Input/output error"),
            staged_folder(tmp_path / "out", overwrite=False),
        ):
            pytest.fail("the block must not run")


def test_long_names_have_places_of_their_own(tmp_path: Path) -> None:
    one, other = (tmp_path / ("é" * 125 + end) for end in "ab")
    assert work_folder(one) != work_folder(other)
    with staged_folder(one, overwrite=False), staged_folder(other, overwrite=False):
        pass
    assert sorted(tmp_path.iterdir()) == [one, other]


def test_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9e6, 0, 8e6))
    with (
        pytest.raises(BadInputError, match=r"9.26 MB more are needed, and 8 MB are free"),
        staged_folder(tmp_path / "a" / "out", overwrite=False, size=9_000_000),
    ):
        pytest.fail("the block must not run")
    assert snapshot(tmp_path) == {}


def test_a_full_disk_leaves_nothing(tmp_path: Path, old: Path) -> None:
    with (
        pytest.raises(BadInputError, match="No space left") as caught,
        staged_folder(old, overwrite=True) as new,
    ):
        (new / "file").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.findings[0].code == "cannot-write"
    assert snapshot(tmp_path) == {"out": None, "out/old.txt": b"old"}


def test_exists(old: Path) -> None:
    with (
        pytest.raises(BadInputError, match=r"exists already\. Fix: pass --overwrite"),
        staged_folder(old, overwrite=False),
    ):
        pytest.fail("the block must not run")


def test_comes_into_being_meanwhile(tmp_path: Path) -> None:
    with (
        pytest.raises(BadInputError, match="came into being meanwhile"),
        staged_folder(tmp_path / "out", overwrite=False),
    ):
        (tmp_path / "out").mkdir()
    assert snapshot(tmp_path) == {"out": None}


def test_file_in_the_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for dst in [tmp_path / "file", tmp_path / "file" / "out"]:
        with pytest.raises(BadInputError, match="a file"), staged_folder(dst, overwrite=True):
            pytest.fail("the block must not run")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes all")
def test_no_permission(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(BadInputError, match="locked: the folder may not be written to"):
        check_destination(tmp_path / "src", locked / "deep" / "out", overwrite=False)


def test_failing_mkdir_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def fail(self: Path, *args: Any, **options: Any) -> None:
        if self.name.startswith("."):
            raise PermissionError(13, "Permission denied")
        mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", fail)
    with (
        pytest.raises(BadInputError, match="out: it cannot be written: Permission"),
        staged_folder(tmp_path / "a" / "out", overwrite=False),
    ):
        pytest.fail("the block must not run")
    assert snapshot(tmp_path) == {}


def codes(src: Path, dst: Path, overwrite: bool = False) -> list[str]:
    try:
        check_destination(src, dst, overwrite=overwrite)
    except BadInputError as error:
        return [finding.code for finding in error.findings]
    return []


def test_check_destination(tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = tmp_path / "src"
    (src / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(src)
    (tmp_path / "file").write_text("x")
    assert codes(src, tmp_path / "new") == []
    assert codes(src, tmp_path / "src-2") == []
    assert codes(src, old) == ["destination-exists"]
    assert codes(src, old, True) == []
    assert codes(src, src, True) == ["destination-is-source"]
    assert codes(src, src) == ["destination-is-source"]
    assert codes(src, tmp_path / "link", True) == ["destination-is-source"]
    assert codes(src, tmp_path / "link" / "out") == ["destination-in-source"]
    assert codes(src, src / "sub" / ".." / "out") == ["destination-in-source"]
    assert codes(src / "sub", src, True) == ["source-in-destination"]
    assert codes(tmp_path / "link" / "sub", src, True) == ["source-in-destination"]
    assert codes(src, tmp_path / "file", True) == ["destination-is-file"]
    assert codes(src, tmp_path / "file" / "out", True) == ["destination-is-file"]
    (src / "weights").symlink_to(old / "old.txt")
    assert codes(src, old, True) == ["source-in-destination"]
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert codes(src, Path(), True) == ["destination-in-use"]


def test_check_destination_of_a_file(tmp_path: Path) -> None:
    src, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    src.write_text("x")
    (tmp_path / "link.safetensors").symlink_to(src)
    (tmp_path / "folder").mkdir()

    def found(dst: Path, overwrite: bool = False) -> list[str]:
        try:
            check_destination(src, dst, overwrite=overwrite, file=True)
        except BadInputError as error:
            return [finding.code for finding in error.findings]
        return []

    assert found(other) == []
    other.write_text("y")
    assert found(other) == ["destination-exists"]
    assert found(other, True) == []
    assert found(src, True) == ["destination-is-source"]
    assert found(tmp_path / "link.safetensors", True) == ["destination-is-source"]
    assert found(tmp_path / "folder", True) == ["destination-is-file"]
    assert found(other / "x", True) == ["destination-is-file"]


def test_copies_what_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "4d7a").write_text("x")
    (tmp_path / "blobs" / "4d7a").chmod(0o640)
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "config.json").symlink_to(Path("..", "blobs", "4d7a"))
    copy_file(tmp_path / "snapshots" / "config.json", tmp_path / "copy")
    assert not (tmp_path / "copy").is_symlink()
    assert (tmp_path / "copy").read_text() == "x"
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o640


def test_copies_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").symlink_to(tmp_path)
    with pytest.raises(BadInputError, match="target does not exist"):
        copy_file(tmp_path / "gone", tmp_path / "copy")
    with pytest.raises(BadInputError, match="this is a folder"):
        copy_file(tmp_path / "folder", tmp_path / "copy")
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInputError, match="cannot be copied to"):
        copy_file(tmp_path / "file", tmp_path / "no" / "copy")
    assert not (tmp_path / "copy").exists()


def test_loads_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"r": 8, "a": {"x": NaN, "é": [1.5]}}', encoding="utf-8")
    loaded = load_json(path)
    assert loaded["r"] == 8
    assert loaded["a"]["é"] == [1.5]


@pytest.mark.parametrize(
    ("content", "code", "text"),
    [
        (b"", "not-json", "line 1, column 1"),
        (b'{"a": 1,\n "b": }', "not-json", "config.json:2: not JSON: Expecting value, at line 2"),
        (b"[1]", "not-an-object", "holds a list"),
        (b'"x"', "not-an-object", "holds text"),
        (b"null", "not-an-object", "holds null"),
        (b"5", "not-an-object", "holds a number"),
        (b'{\n"a": "\xff"}', "not-utf8", "on line 2"),
        (b"\xef\xbb\xbf{}", "not-json", "byte order mark"),
        (b'{"a": 1, "r": 8, "r": 16}', "duplicate-key", "config.json: r: the key stands 2 times"),
        (b'{"a": [{"b": 1, "b": 1}]}', "duplicate-key", "b: the key stands 2 times"),
        (b"[" * 200_000, "not-json", "nested too deep"),
        (b"9" * 9000, "not-json", "thousands of digits"),
        (b"version https://git-lfs.github.com/spec/v1\n", "lfs-pointer", "git lfs pull"),
        (b"<!doctype html>", "html-page", "HTML"),
    ],
)
def test_refuses_json(tmp_path: Path, content: bytes, code: str, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(BadInputError) as caught:
        load_json(path)
    (finding,) = caught.value.findings
    assert finding.code == code
    assert text in str(finding)


def test_refuses_json_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInputError, match="does not exist"):
        load_json(tmp_path / "config.json")
    with pytest.raises(BadInputError, match="this is a folder"):
        load_json(tmp_path)
    (tmp_path / "config.json").write_text("{}   ")
    monkeypatch.setattr(json_files, "_MAX_JSON_BYTES", 4)
    with pytest.raises(BadInputError, match="at most 4 are read"):
        load_json(tmp_path / "config.json")


def test_swap_deletes_the_old_last(
    old: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    removed: list[Path] = []

    def remove(path: Path, ignore_errors: bool) -> None:
        assert snapshot(old) == {"new.txt": b"new"}
        removed.append(path)

    monkeypatch.setattr(shutil, "rmtree", remove)
    with staged_folder(old, overwrite=True) as new:
        (new / "new.txt").write_text("new")
    assert {path.name for path in removed} == {"old"}
