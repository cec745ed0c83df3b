"""Writing a folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec import Struct

from regraft.errors import BadInputError, Finding
from regraft.storage.beside import narrow
from regraft.storage.probe import open_regular
from regraft.storage.safetensors import sync_path
from regraft.storage.stamp import Stamp
from regraft.storage.stand_ins import remote_at
from regraft.storage.work import Work, cannot_write, open_work, write_file

_CHUNK = 1 << 20
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


@contextmanager
def staged_folder(dst: str | os.PathLike[str], *, overwrite: bool, size: int = 0) -> Iterator[Path]:
    """Fill a folder that appears at ``dst`` whole or not at all.

    Yields an empty folder in a hidden one beside ``dst``, on the same file system. When the block
    ends, its files are flushed to disk and it is renamed to ``dst``. When the block raises, it is
    removed and ``dst`` is as it was; so are the folders above it, if they had to be made. With
    ``overwrite`` a folder at ``dst`` is replaced as a whole: it is put aside, and deleted only once
    the new one is in its place. A link at ``dst`` is followed. What a run that was killed left is
    cleared by the next one.

    Args:
        dst: the folder to write.
        overwrite: whether it may be there already.
        size: how many bytes are going to be written, as far as that is known.

    Raises:
        BadInputError: ``dst`` is a file, or exists and ``overwrite`` is not set, or the folder it
            is in cannot be written to or has no room; or another run is at work on ``dst``.
    """
    with _staged(dst, overwrite=overwrite, size=size, file=False) as folder:
        yield folder


@contextmanager
def staged_file(dst: str | os.PathLike[str], *, overwrite: bool, size: int = 0) -> Iterator[Path]:
    """Fill a folder of which one file appears at ``dst``, whole or not at all.

    The folder must hold one file in the end, with the suffix of ``dst``, whatever its name. Everything else is as in
    `staged_folder`.

    Raises:
        BadInputError: as `staged_folder` does, and where there is more than the one file.
    """
    with _staged(dst, overwrite=overwrite, size=size, file=True) as folder:
        inner = folder / "parts"
        inner.mkdir()
        yield inner
        files = sorted(path for path in inner.rglob("*") if not path.is_dir())
        mine = [path for path in files if path.suffix == Path(dst).suffix]
        if len(files) != 1 or len(mine) != 1:
            names = ", ".join(str(path.relative_to(inner)) for path in files)
            message = f"the result has {len(files)} files ({names}), and the destination is one"
            fix = "name a folder to write"
            raise BadInputError(
                Finding("destination-is-file", message, where=os.fspath(dst), fix=fix)
            )
        mine[0].rename(folder / Path(os.path.realpath(dst)).name)
        shutil.rmtree(inner)


@contextmanager
def _staged(
    dst: str | os.PathLike[str], *, overwrite: bool, size: int, file: bool
) -> Iterator[Path]:
    dst = Path(os.path.realpath(dst))
    if findings := _check_place(dst, overwrite=overwrite, file=file):
        raise BadInputError(findings)
    with open_work(dst, file=file) as work:
        try:
            work.check_place(overwrite=overwrite)
            work.empty()
            work.check_space(size)
            yield work.new
            _sync_files(work.new)
            work.place(overwrite=overwrite)
        except OSError as error:
            raise cannot_write(dst, error) from error


class Beside(Struct, frozen=True):
    """What stands beside the weights of a result, by its path in the result's folder."""

    copied: Mapping[str, Path]
    """Files of the source, and of elsewhere, with their permissions and times."""
    written: Mapping[str, bytes]
    """Files that are made, in the order in which they are to be written."""
    like: Mapping[str, Path]
    """Those of them that get another file's permissions."""

    @property
    def size(self) -> int:
        """In bytes. Raises ``OSError`` where a file that is copied cannot be looked at."""
        copied = sum(path.stat().st_size for path in self.copied.values())
        return copied + sum(map(len, self.written.values()))

    def put(self, folder: Path) -> None:
        """Write everything, onto the disk. Raises ``BadInputError``, ``OSError``."""
        for path, origin in self.copied.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            copy_file(origin, target)
            sync_path(target)
        for path, text in self.written.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            write_file(folder / path, text)
        for path, origin in self.like.items():
            shutil.copymode(origin, folder / path)


def complete(
    work: Work, sources: Sequence[Stamp], beside: Beside | None, *, overwrite: bool
) -> None:
    """Write what stands beside the weights of a result, and put it in its place.

    It is no more open than the files that the weights were made of. ``beside`` is ``None`` for a result that is one
    file.

    Raises ``BadInputError`` where one of these changed meanwhile, ``OSError``.
    """
    for stamp in sources:
        stamp.check()
    kept: Iterable[str] = ()
    if beside is not None:
        beside.put(work.new)
        kept = (*beside.copied, *beside.like)
    narrow(work.new, [stamp.path for stamp in sources], kept=map(Path, kept))
    work.place(overwrite=overwrite)


def check_destination(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    overwrite: bool,
    file: bool = False,
) -> None:
    """Check that a folder, or a ``file``, can be written to ``dst`` without touching ``src``.

    Links are resolved, in both paths and in the entries of ``src``, since overwriting ``dst`` would
    also delete what they lead to.

    Args:
        src: the file or folder that is read.
        dst: what to write, which need not exist.
        overwrite: whether it may be replaced.
        file: whether it is a file.

    Raises:
        BadInputError: ``dst`` is ``src``, or one is inside the other; ``dst`` is a file and not a
            folder, or the other way round, or exists and ``overwrite`` is not set, or holds the home
            folder or the current one, or the folder it is in cannot be written to.
    """
    src, dst = Path(os.path.realpath(src)), Path(os.path.realpath(dst))
    kind = _kind(file=file)
    findings: list[Finding] = []

    def report(code: str, message: str) -> None:
        fix = f"choose another {kind} to write to"
        findings.append(Finding(code, message, where=str(dst), fix=fix))

    if _is_same(src, dst):  # then it is there, of course, and what else is wrong does not matter
        report("destination-is-source", f"the {kind} to write is the one that is read")
    elif _is_inside(dst, src):
        report("destination-in-source", f"the {kind} to write is inside {src}, which is read")
    elif _is_inside(src, dst) or any(_is_inside(path, dst) for path in _resolve_entries(src)):
        report("source-in-destination", f"{src}, which is read, lies inside the {kind} to write")
    if not findings or findings[0].code != "destination-is-source":
        findings += _check_place(dst, overwrite=overwrite, file=file)
    if findings:
        raise BadInputError(findings)


def copy_file(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
    """Copy a file with its permissions and times, to a place where nothing is yet.

    A link to a regular file is followed, since the folders of a Hugging Face cache consist of them; `check_files`
    says which links may be.

    Raises:
        BadInputError: ``src`` is not a regular file or a link to one, it cannot be copied, or it changed meanwhile.
    """
    src = Path(src)
    file, _ = open_regular(src)
    try:
        with file:
            stamp = Stamp.of(src, file)
            status = src.stat() if remote_at(src) is not None else os.fstat(file.fileno())
            mode = status.st_mode & 0o777
            with os.fdopen(os.open(dst, _NEW, 0o600), "wb") as out:
                shutil.copyfileobj(file, out, _CHUNK)
            shutil.copystat(src, dst)
            Path(dst).chmod(mode)
            stamp.check(file)
    except OSError as error:
        message = f"the file cannot be copied to {os.fspath(dst)}: {error.strerror or error}"
        raise BadInputError(Finding("cannot-copy", message, where=str(src))) from error


def _kind(*, file: bool) -> str:
    return "file" if file else "folder"


def _check_place(dst: Path, *, overwrite: bool, file: bool = False) -> list[Finding]:
    """What keeps a folder or a file from being put at ``dst``, a resolved path."""
    where = str(dst)
    elsewhere = f"choose another {_kind(file=file)} to write to"
    try:
        if dst.exists() and dst.is_dir() == file:
            message = (
                f"expected a {_kind(file=file)} to write, and this is a {_kind(file=not file)}"
            )
            return [Finding("destination-is-file", message, where=where, fix=elsewhere)]
        if dst.exists():
            for kept, name in ((Path.home(), "home"), (Path.cwd(), "current")):
                if _is_same(dst, kept) or _is_inside(kept, dst):
                    message = f"the folder holds the {name} folder, and would be replaced whole"
                    return [Finding("destination-in-use", message, where=where, fix=elsewhere)]
            if not overwrite:
                message = f"the {_kind(file=file)} to write exists already"
                return [Finding("destination-exists", message, where=where, fix="pass --overwrite")]
        above = dst.parent
        while not above.exists():
            above = above.parent
    except OSError as error:
        return list(cannot_write(dst, error).findings)
    if not above.is_dir():
        message = f"the {_kind(file=file)} to write would be inside this, which is a file"
        return [Finding("destination-is-file", message, where=str(above), fix=elsewhere)]
    if not os.access(above, os.W_OK | os.X_OK):
        message = "the folder may not be written to"
        fix = "give yourself permission to write there, or " + elsewhere
        return [Finding("cannot-write", message, where=str(above), fix=fix)]
    return []


def _is_same(one: Path, other: Path) -> bool:
    # By identity on disk, which sees through bind mounts and file systems that ignore case.
    return _same_as(other)(one)


def _is_inside(inner: Path, outer: Path) -> bool:
    return any(map(_same_as(outer), inner.parents))


def _same_as(other: Path) -> Callable[[Path], bool]:
    """Whether paths are one that is looked up once; what is not there is the same by its name alone."""
    found = _status(other)

    def is_same(one: Path) -> bool:
        status = _status(one) if found is not None else None
        if found is None or status is None:
            return one == other
        return os.path.samestat(status, found)

    return is_same


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _resolve_entries(folder: Path) -> Iterator[Path]:
    with suppress(OSError):
        for entry in folder.iterdir():
            if entry.is_symlink():
                yield Path(os.path.realpath(entry))


def _sync_files(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            sync_path(Path(root, name))
