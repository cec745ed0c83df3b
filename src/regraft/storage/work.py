"""The folder in which a result is made, beside the place where it will stand.

.OUT.regraft/lock          held while a run is at work; names the process
.OUT.regraft/job           what is being made, so that only the same work is resumed
.OUT.regraft/journal       the units whose bytes are on disk, one a line
.OUT.regraft/new/          the result so far; renamed to OUT when it is complete
.OUT.regraft/old/          what stood at OUT, while the new one takes its place

Adapters are made here, too, without a job and a journal: they are converted in memory. Where OUT is
a file, it is made in ``new`` and takes the place of an older one in a single step.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from regraft.errors import BadInputError, Finding
from regraft.report import show_size
from regraft.storage.job import LocalJob
from regraft.storage.safetensors import sync_path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]


_LONG = 240
_OWN = {"lock", "job", "journal", "new", "old"}
"""All that may be in such a folder."""
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_SPARE = 1 << 18
"""Bytes that folders, the journal and the like may take."""


class Work:
    """The folder of one result; see `open_work`."""

    def __init__(self, dst: Path, *, file: bool = False) -> None:
        self.dst, self.file = dst, file
        self.folder = work_folder(dst)
        self.new = self.folder / "new"
        self.done: set[tuple[int, int]] = set()
        self._journal = -1

    @property
    def resumed(self) -> bool:
        """Whether there is something that need not be done again."""
        return bool(self.done)

    def begin(self, job: LocalJob, *, resume: bool) -> None:
        """Continue the same work where ``resume`` says so, or start afresh.

        Raises ``BadInputError`` where there is other work to continue, and says what differs.
        """
        file, journal = self.folder / "job", self.folder / "journal"
        same = False
        if resume:
            with suppress(OSError):
                before = LocalJob.decode(file.read_bytes())
                left = self.new.is_dir() and _is_plain(self.new)
                same = left and before is not None and job.is_same(before)
                if left and not same and before is not None and self.worth_keeping:
                    fix = "give the same options as then, or leave out --resume to start afresh"
                    raise job.other_work(before, str(self.folder), fix)
        if same:
            with suppress(OSError):
                self.done = _read_journal(journal.read_bytes())
        else:
            self.empty()
            write_file(journal, b"")
            write_file(file, job.encode())
            sync_path(self.folder)
        self._journal = os.open(journal, os.O_WRONLY | os.O_APPEND | _NO_LINK)
        if same:
            # What a dead run wrote last may be half a line.
            os.write(self._journal, b"\n")

    def empty(self) -> None:
        """Start afresh: what a dead run left is removed."""
        for name in ("job", "journal"):
            (self.folder / name).unlink(missing_ok=True)
        if self.new.exists():
            shutil.rmtree(self.new)
        self.new.mkdir()  # nobody else gets into the folder above until it is in its place

    def check_space(self, size: int) -> None:
        """Check that there is room for a result of so many bytes and what the file system keeps of them.

        What is there of it already takes no more room. Raises ``BadInputError``.
        """
        there = sum(path.stat().st_blocks * 512 for path in self.new.rglob("*") if path.is_file())
        check_room(self.folder, size - there, self.dst)

    def check_place(self, *, overwrite: bool) -> None:
        """Check that nothing is in the result's place, unless it may be replaced.

        Raises ``BadInputError``.
        """
        if self.dst.exists() and not overwrite:
            message = f"the {'file' if self.file else 'folder'} to write came into being meanwhile"
            fix = "pass --overwrite; for a checkpoint --resume with it goes on from here"
            raise BadInputError(
                Finding("destination-exists", message, where=str(self.dst), fix=fix)
            )

    def note(self, units: list[tuple[int, int]]) -> None:
        """Note that the bytes of some units are on disk."""
        if units:
            os.write(self._journal, "".join(f"u {f} {n}\n" for f, n in units).encode())
            os.fdatasync(self._journal)

    def forget(self) -> None:
        """Note that nothing is done: what is written will change, so no later run may go on from it."""
        os.ftruncate(self._journal, 0)

    def close(self) -> None:
        """Close the journal."""
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1

    def place(self, *, overwrite: bool) -> None:
        """Put the finished result in its place and remove everything else."""
        self.close()
        _sync_folders(self.new)
        self.check_place(overwrite=overwrite)
        if self.file:
            (self.new / self.dst.name).replace(self.dst)
        elif self.dst.exists():
            self.dst.rename(self.folder / "old")
            try:
                self.new.rename(self.dst)
            except BaseException:
                self.restore()
                raise
        else:
            self.new.rename(self.dst)
        # It is in its place; that its name may not be on disk yet undoes nothing, nor does what cannot be removed.
        with suppress(OSError):
            sync_path(self.dst.parent)
        with suppress(OSError):
            self.clear()

    def restore(self) -> None:
        """Put back what was put aside; where the new one stands already, the old one goes."""
        old = self.folder / "old"
        if old.exists() and not self.dst.exists():
            old.rename(self.dst)
        elif old.exists():
            shutil.rmtree(old, ignore_errors=True)

    def clear(self) -> None:
        """Remove the folder and what regraft put there; the lock goes last.

        What was put aside is never removed unless something is in its place. Raises ``OSError``.
        """
        self.close()
        self.restore()
        for name in sorted(_OWN - {"lock", "old"}):
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        (self.folder / "lock").unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    @property
    def worth_keeping(self) -> bool:
        """Whether ``--resume`` would find something that is done."""
        try:
            return (self.folder / "journal").stat().st_size > 1
        except OSError:
            return False


def check_room(folder: Path, size: int, dst: Path) -> None:
    """Check that there is room in a folder for so many bytes of ``dst`` and what the file system keeps of them.

    Raises ``BadInputError``.
    """
    needed, free = size + _SPARE, shutil.disk_usage(folder).free
    if needed > free:
        message = f"{show_size(needed)} more are needed, and {show_size(free)} are free"
        fix = "make room, or write elsewhere"
        raise BadInputError(Finding("no-space", message, where=str(dst), fix=fix))


def work_folder(dst: Path) -> Path:
    """The folder in which a result is made."""
    name = os.fsencode(dst.name)
    if len(name) > _LONG:
        # A name may have 255 bytes; two long ones may differ at their ends only.
        name = hashlib.sha256(name).hexdigest().encode()
    return dst.with_name(f".{os.fsdecode(name)}.regraft")


@contextmanager
def open_work(dst: Path, *, file: bool = False) -> Iterator[Work]:
    """Make or open the work folder of a result, a folder or a ``file``, and hold its lock.

    A folder that a dead run put aside goes back to its place first.

    Raises ``BadInputError`` where another run is at work on the same result, or the folder cannot be made.
    """
    work = Work(dst, file=file)
    made: list[Path] = []
    lock = -1
    try:
        # A signal that came between locking and noting it down would leave the lock behind.
        with _signals_later():
            lock = _take(work, made)
        work.restore()
        yield work
    except BaseException as error:
        if lock >= 0 and not work.worth_keeping:
            with suppress(OSError):
                work.clear()
        elif lock >= 0:
            error.add_note(
                f"what is done so far stays in {work.folder} ({show_size(_size_of(work.new))} on disk); the same "
                "command with --resume goes on from it, and removing the folder gives it up"
            )
        raise
    finally:
        work.close()
        if lock >= 0:
            os.close(lock)
        if not work.folder.exists():
            _remove(made)


def _size_of(folder: Path) -> int:
    """The bytes that its files take on disk, where a hole in one takes none."""
    total = 0
    with suppress(OSError):
        for path in folder.rglob("*"):
            status = path.lstat()
            total += getattr(status, "st_blocks", 0) * 512 or status.st_size
    return total


def _take(work: Work, made: list[Path]) -> int:
    """Make the work folder and lock it; folders that had to be made above it are noted in ``made``."""
    dst = work.dst
    try:
        above = dst.parent
        while not above.exists():
            made.append(above)
            above = above.parent
        dst.parent.mkdir(parents=True, exist_ok=True)
        return _lock(work.folder, dst)
    except OSError as error:
        raise cannot_write(dst, error) from error


@contextmanager
def _signals_later() -> Iterator[None]:
    """Let requests to end the process wait for the end of the block.

    Their handlers are replaced, since a blocked signal may be taken by another thread and is handled in this one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    wanted = [s for s in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(s) is not None]
    before = {number: signal.signal(number, lambda n, _: came.append(n)) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for first in came[:1]:
            signal.raise_signal(first)


def check_own(folder: Path) -> None:
    """Check that a work folder that is there already is regraft's: a folder of this user's, with nothing else in it.

    Raises ``BadInputError``, or ``OSError`` where it cannot be looked at.
    """
    status = folder.lstat()
    if stat.S_ISLNK(status.st_mode):
        wrong = "it is a link"
    elif not stat.S_ISDIR(status.st_mode):
        wrong = "it is no folder"
    elif hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        wrong = "it belongs to another user"
    else:
        strange = sorted(entry.name for entry in folder.iterdir() if not _is_own(entry))
        if not strange:
            return
        wrong = f"it holds {', '.join(map(repr, strange[:3]))}"
    raise BadInputError(
        Finding(
            "work-folder",
            f"regraft works in a folder of this name, and this one is not regraft's: {wrong}",
            where=str(folder),
            fix="look at it, and remove it",
        )
    )


def _is_own(entry: Path) -> bool:
    return entry.name in _OWN and _is_plain(entry)


def _is_plain(path: Path) -> bool:
    """Whether a path is a file or a folder and neither a link nor anything special."""
    mode = path.lstat().st_mode
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def _remove(folders: list[Path]) -> None:
    """Remove folders that are empty, the innermost first."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def cannot_write(dst: Path, error: OSError) -> BadInputError:
    """The error for a system's refusal to write."""
    return BadInputError(
        Finding(
            "cannot-write",
            f"it cannot be written: {error.strerror or error}",
            where=str(dst),
            fix=f"check that {dst.parent} may be written to and has room",
        )
    )


def _lock(folder: Path, dst: Path) -> int:
    path = folder / "lock"
    while True:
        with suppress(FileExistsError):
            folder.mkdir(0o700)
        try:
            check_own(folder)
            file = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o600)
        except FileNotFoundError:
            continue
        try:
            locked = try_lock(file)
        except OSError:
            os.close(file)
            raise
        if not locked:
            owner = os.read(file, 100).decode(errors="replace").strip()
            os.close(file)
            raise BadInputError(
                Finding(
                    "in-use",
                    f"another run is at work on it: process {owner or '(just starting)'}",
                    where=str(dst),
                    fix="wait for it, or stop it",
                )
            )
        # The run before may have removed the file between opening and locking it.
        with suppress(OSError):
            if os.fstat(file).st_ino == path.stat().st_ino:
                os.ftruncate(file, 0)
                os.write(file, f"{os.getpid()}\n".encode())
                return file
        os.close(file)


def try_lock(file: int) -> bool:
    """Lock an open file or folder until it is closed; whether nobody else holds it.

    Where the system or the file system has no locks, nobody does.

    Raises ``OSError``.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and wait until it is on disk; a link in its place is not followed.

    Raises ``OSError``.
    """
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _NO_LINK, 0o666)
    with os.fdopen(opened, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read_journal(data: bytes) -> set[tuple[int, int]]:
    done = set()
    for line in data.split(b"\n")[:-1]:
        parts = line.split()
        if len(parts) == 3 and parts[0] == b"u" and parts[1].isdigit() and parts[2].isdigit():
            done.add((int(parts[1]), int(parts[2])))
    return done


def _sync_folders(folder: Path) -> None:
    for root, _, _ in os.walk(folder):
        sync_path(Path(root))
