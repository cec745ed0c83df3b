"""The folder in which several processes, on one machine or many, make one result together.

STAGE/job-ID/job           what is being made, for people and messages; ID is its digest
STAGE/job-ID/new/          the result so far: files of their final size, renamed to OUT by the commit
STAGE/job-ID/placing-X/    the same, while a commit is at work
STAGE/job-ID/done/F-K      says that piece K of file F is on disk
STAGE/committed            the job that was committed here

There are no locks, which not every shared file system has: what is relied on is that a rename happens as a whole. The
folder of a job is made elsewhere and renamed, so nobody sees half of it; a mark is renamed into place when the bytes
that it speaks of are on disk; a commit takes the result by renaming it, so of two only one has it.

A process that was believed dead may still write. It holds the folders that it began with open and names files relative
to them: after a commit it can write the same bytes to the same places once more, and after ``abort`` to nothing that
anybody will see, whatever has been begun in the stage since.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import uuid
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from regraft.errors import BadInputError, Finding
from regraft.storage.safetensors import sync_path

_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_OWN = ("job-", "making-", "committed")
"""How the names begin of what regraft puts into a stage."""
_SHOWN = 5

Piece = tuple[int, int]
"""The number of a file, and of a piece in it."""


class Job(Struct, frozen=True):
    """What is being made. It is the same on every machine: there are no paths of one in it, and no numbers of files."""

    source: str
    """What the source is called, for messages alone."""
    files: tuple[tuple[str, int, str], ...]
    """Of every file of the source its name, its size in bytes, and its ETag or when it was written."""
    result: str
    """A digest of everything that decides what bytes come out: options, rules, names, the release of regraft."""
    piece: int
    """Bytes of a piece."""
    made: tuple[str, ...] = ()
    """The files of the result."""
    target: str = ""
    """The address that uploads go to; nothing where pieces are files, which a commit takes to any place."""

    @property
    def name(self) -> str:
        """The folder of the job."""
        where = (self.target, self.made) if self.target else ()
        text = msgspec.json.encode((self.files, self.result, self.piece, *where))
        return "job-" + hashlib.sha256(text).hexdigest()[:16]

    @property
    def place(self) -> str:
        """What the uploads go to, for messages."""
        return f"{self.target}/{self.made[0]}" if len(self.made) == 1 else self.target

    def against(self, other: Job, stage: str) -> BadInputError:
        """The error where a stage is another job's."""
        here = [row[0] for row in self.files]
        if (self.target, self.made) != (other.target, other.made) and self.result == other.result:
            what = f"it is that of a conversion to {other.place}, where its uploads go, and this one is to {self.place}"
            fix = f"give --stage a folder of its own for each result, or end that one with --abort to {other.place}"
            return BadInputError(Finding("stage-other", what, where=stage, fix=fix))
        if self.files == other.files:
            what = "it was begun with other options, rules or another release of regraft, and would have other bytes"
            fix = "give every part the same options; to change them, start over after --abort"
            return BadInputError(Finding("stage-options", what, where=stage, fix=fix))
        if self.source == other.source and here == [row[0] for row in other.files]:
            what = f"since it was begun, files of {self.source} changed: their sizes, or when they were written"
            fix = "see what wrote to it; then start over after --abort"
        else:
            what = f"it is that of another conversion, of {other.source}, and this one is of {self.source}"
            fix = "give each conversion a stage of its own, or end that one with --abort"
        return BadInputError(Finding("stage-other", what, where=stage, fix=fix))


class Stage:
    """A stage that a process takes part in; use it as a context manager.

    Raises ``BadInputError`` where it is another job's, or cannot be written.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder, self.job = folder, job
        self.path = folder / job.name
        self.committed = _committed(folder)
        """The job that was committed here; its result is in its place, and nothing is left to do."""
        self._new = self._done = -1

    def __enter__(self) -> Stage:
        try:
            self._check()
            if self.committed is None:
                self._join()
        except OSError as error:
            raise self._failed(error) from error
        return self

    def __exit__(self, *error: object) -> None:
        for opened in (self._new, self._done):
            if opened >= 0:
                os.close(opened)
        self._new = self._done = -1

    def _check(self) -> None:
        check_stage(self.folder)
        if self.committed is not None and self.committed.name != self.job.name:
            raise self.job.against(self.committed, str(self.folder))
        for path in sorted(self.folder.glob("job-*")):
            if path.name != self.path.name and (other := _read(path / "job")) is not None:
                raise self.job.against(other, str(self.folder))

    def _join(self) -> None:
        if not self.path.is_dir():
            making = self.folder / f"making-{uuid.uuid4().hex}"
            for name in ("new", "done"):
                (making / name).mkdir(parents=True)
            (making / "job").write_bytes(msgspec.json.format(msgspec.json.encode(self.job)))
            try:
                making.rename(self.path)
                sync_path(self.folder)
            except OSError as error:
                shutil.rmtree(making, ignore_errors=True)
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
        self._done = os.open(self.path / "done", os.O_RDONLY)
        with suppress(FileNotFoundError):  # a commit has it
            self._new = os.open(self.path / "new", os.O_RDONLY)
        self.committed = _committed(self.folder)
        if (
            self.committed is not None
        ):  # since the folder was looked at: what was begun here is of no use
            shutil.rmtree(self.path, ignore_errors=True)

    def done(self) -> set[Piece]:
        """The pieces whose bytes are on disk."""
        if self._done < 0:
            return set()
        names = os.listdir(self._done)  # noqa: PTH208 - a folder that is open has no path
        pairs = (name.split("-") for name in names if not name.startswith("."))
        return {(int(file), int(piece)) for file, piece in pairs}

    def make(self, name: str, size: int) -> None:
        """Make a file of the result of its final size, if nobody has.

        Raises ``BadInputError``.
        """
        try:
            for above in list(Path(name).parents)[-2::-1]:
                with suppress(FileExistsError):
                    os.mkdir(above, dir_fd=self._held())
            flags = os.O_RDWR | os.O_CREAT | _NO_LINK
            opened = os.open(name, flags, 0o666, dir_fd=self._held())
            try:
                if os.fstat(opened).st_size != size:
                    os.ftruncate(opened, size)
            finally:
                os.close(opened)
        except OSError as error:
            raise self._failed(error) from error

    def open(self, name: str) -> int:
        """A file of the result, open to be written.

        Raises ``BadInputError``.
        """
        try:
            return os.open(name, os.O_RDWR | _NO_LINK, dir_fd=self._held())
        except OSError as error:
            raise self._failed(error) from error

    def mark(self, pieces: list[Piece]) -> None:
        """Say that some pieces are on disk, which they must be.

        Raises ``BadInputError``.
        """
        text = f"{socket.gethostname()} {os.getpid()}\n".encode()
        try:
            for file, piece in pieces:
                unique = f".{uuid.uuid4().hex}"
                opened = os.open(unique, os.O_WRONLY | os.O_CREAT, 0o666, dir_fd=self._done)
                try:
                    os.write(opened, text)
                finally:
                    os.close(opened)
                os.rename(unique, f"{file}-{piece}", src_dir_fd=self._done, dst_dir_fd=self._done)
        except OSError as error:
            raise self._failed(error) from error

    def claim(self) -> Path | None:
        """Take the result, to put it in its place; ``None`` where that has been done already.

        One that a dead commit took is taken from it; if that is not dead, it fails. Raises ``BadInputError``.
        """
        mine = self.path / f"placing-{uuid.uuid4().hex}"
        try:
            for path in [self.path / "new", *self.path.glob("placing-*")]:
                with suppress(FileNotFoundError):
                    path.rename(mine)
                    return mine
        except OSError as error:
            raise self._failed(error) from error
        return None

    def give_up(self, claimed: Path) -> None:
        """Put back what was claimed, so that parts can go on."""
        with suppress(OSError):
            claimed.rename(self.path / "new")

    def finish(self) -> None:
        """Note that the result is in its place, and remove everything else."""
        try:
            making = self.folder / f"making-{uuid.uuid4().hex}"
            making.write_bytes(msgspec.json.encode(self.job))
            making.replace(self.folder / "committed")
            sync_path(self.folder)
        except OSError as error:
            raise self._failed(error) from error
        shutil.rmtree(self.path, ignore_errors=True)

    def _held(self) -> int:
        if self._new >= 0:
            return self._new
        message = "a commit has taken the result, and there is something left to do"
        fix = "wait for it, and run the part again"
        raise BadInputError(Finding("in-use", message, where=str(self.folder), fix=fix))

    def _failed(self, error: OSError) -> BadInputError:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            message = (
                "what was begun there is gone: it was ended by --abort, or committed, meanwhile"
            )
            fix = "start over, if it is still wanted"
            return BadInputError(Finding("stage-gone", message, where=str(self.folder), fix=fix))
        message = f"it cannot be written: {error.strerror or error}"
        fix = "give a folder that every machine may write to and that has room"
        return BadInputError(Finding("cannot-write", message, where=str(self.folder), fix=fix))


def abort(folder: Path) -> bool:
    """End whatever is staged in a folder and remove it; whether there was anything.

    Raises ``BadInputError`` where something else than a stage is in the folder, ``OSError`` where it cannot be removed.
    """
    if not folder.exists():
        return False
    check_stage(folder)
    found = sorted(folder.iterdir())
    for path in found:
        # Somebody who is still at work may put a mark into a folder that is being emptied.
        for attempt in range(10):
            try:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == 9:
                    raise
                continue
            break
    with suppress(OSError):
        folder.rmdir()
    return bool(found)


def is_placed(folder: Path) -> bool:
    """Whether the result of a stage is in its place, whether or not the commit came to its end."""
    if _committed(folder) is not None:
        return True
    jobs = [path for path in folder.glob("job-*") if path.is_dir()]
    return bool(jobs) and not any(
        (path / "new").exists() or any(path.glob("placing-*")) for path in jobs
    )


def check_stage(folder: Path) -> None:
    """Check that a folder, if it exists, holds nothing but what regraft stages.

    Raises ``BadInputError``.
    """
    if not folder.exists():
        return
    strange = [] if folder.is_dir() else [folder.name]
    if not strange:
        strange = sorted(p.name for p in folder.iterdir() if not p.name.startswith(_OWN))
    if strange:
        message = (
            f"it is to hold what is staged and nothing else, and has {', '.join(strange[:_SHOWN])}"
        )
        fix = "give --stage a folder of its own"
        raise BadInputError(Finding("stage-place", message, where=str(folder), fix=fix))


def check_beside(folder: Path, dst: Path, src: Path) -> None:
    """Check that what is in a stage can be renamed to a place: it is beside it, on its file system, not in the source.

    Raises ``BadInputError``.
    """
    stage, place = Path(os.path.realpath(folder)), Path(os.path.realpath(dst))
    if stage.is_relative_to(os.path.realpath(src)):
        message = f"it is inside {src}, which is read"
        fix = f"give a folder beside the result, such as {dst.with_name(dst.name + '.stage')}"
        raise BadInputError(Finding("stage-place", message, where=str(folder), fix=fix))
    if stage.is_relative_to(place) or place.is_relative_to(stage):
        is_same = stage == place
        message = (
            f"it is {'the place of the result' if is_same else f'inside {dst}, or holds that'}"
        )
        fix = f"give a folder beside it, such as {dst.with_name(dst.name + '.stage')}"
        raise BadInputError(Finding("stage-place", message, where=str(folder), fix=fix))
    if _existing(folder).stat().st_dev != _existing(dst.parent).stat().st_dev:
        message = f"it is on another file system than {dst}, and the result could not be renamed to its place"
        fix = f"give a folder beside it, such as {dst.with_name(dst.name + '.stage')}"
        raise BadInputError(Finding("stage-place", message, where=str(folder), fix=fix))


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _committed(folder: Path) -> Job | None:
    return _read(folder / "committed")


def _read(path: Path) -> Job | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Job)
    except (OSError, msgspec.DecodeError):
        return None
