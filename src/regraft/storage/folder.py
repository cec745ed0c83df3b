"""Writing a folder that appears whole or not at all, and reading the JSON files of one."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from regraft.errors import BadInputError, Finding
from regraft.storage.probe import PROBE_SIZE, open_regular, recognize_content
from regraft.storage.safetensors import sync_path
from regraft.storage.stamp import Stamp
from regraft.storage.stand_ins import remote_at
from regraft.storage.work import cannot_write, open_work

_MAX_JSON_BYTES = 100_000_000
_CHUNK = 1 << 20
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
_MAX_JSON_DEPTH = 64
"""Configs are nested a handful of levels; whatever walks or writes one recursively stays far below Python's limit."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


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


def load_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    ``NaN`` and the infinities are read as Python's json module reads them, since it writes them.

    Raises:
        BadInputError: the file cannot be read, is not UTF-8 or JSON, holds something other than an
            object, or has an object with the same key twice.
    """
    path = Path(path)
    return parse_json(_read_text(path), str(path))


def parse_json(text: str, where: str, key: str | None = None) -> dict[str, Any]:
    """The JSON object that some text is, of a file or of one entry of it (``key``).

    Raises ``BadInputError`` as `load_json` does.
    """
    duplicates: Counter[str] = Counter()

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            duplicates.update({name: count for name, count in counts.items() if count > 1})
        return fields

    try:
        value = json.loads(text, object_pairs_hook=build)
    except json.JSONDecodeError as error:
        place = where if key is not None else f"{where}:{error.lineno}"
        message = f"not JSON: {error.msg}, at line {error.lineno}, column {error.colno}"
        raise BadInputError(
            Finding("not-json", message, where=place, key=key, fix="correct the file")
        ) from error
    except ValueError as error:
        message = "not JSON that can be read: it holds a number with thousands of digits"
        raise BadInputError(Finding("not-json", message, where=where, key=key)) from error
    except RecursionError as error:
        message = "not JSON that can be read: it is nested too deep"
        raise BadInputError(Finding("not-json", message, where=where, key=key)) from error
    if _depth_exceeds(value, text, _MAX_JSON_DEPTH):
        message = f"not JSON that can be read: it is nested more than {_MAX_JSON_DEPTH} deep"
        raise BadInputError(
            Finding("not-json", message, where=where, key=key, fix="correct the file")
        )
    if _SURROGATE.search(text) and not _is_text(value):
        message = "a string holds half of a surrogate pair (such as \\ud800), which is not text"
        raise BadInputError(
            Finding("not-json", message, where=where, key=key, fix="correct the file")
        )
    if not isinstance(value, dict):
        what = "the file" if key is None else "it"
        message = f"expected a JSON object, and {what} holds {_name_json(value)}"
        raise BadInputError(Finding("not-an-object", message, where=where, key=key))
    if duplicates:
        raise BadInputError(
            Finding(
                "duplicate-key",
                f"the key stands {count} times in one object, and which is meant is unclear",
                where=where,
                key=name[:300],
                fix="keep one of them",
            )
            for name, count in duplicates.items()
        )
    return value


def folder_with_config(named: object) -> Path | None:
    """The folder that a file names as its base, where it is one and has a ``config.json``; a name may be anything.

    >>> folder_with_config("a" * 5000), folder_with_config(["x"]), folder_with_config("org/model")
    (None, None, None)
    """
    if not isinstance(named, str) or not named:
        return None
    try:
        return Path(named) if (Path(named) / "config.json").is_file() else None
    except (OSError, ValueError):
        return None  # too long a name, or one with a zero byte


def told_in_json(text: str | bytes) -> Any:
    """What some JSON says that tells something besides; ``None`` where it is none, or none that can be read.

    >>> told_in_json('{"a": [1]}'), told_in_json("[" * 100000)
    ({'a': [1]}, None)
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _depth_exceeds(value: object, text: str, most: int) -> bool:
    """Whether JSON is nested deeper than ``most``; one with few brackets cannot be."""
    if text.count("[") + text.count("{") <= most:
        return False
    level: list[Any] = [value]
    for _ in range(most + 1):
        level = [
            item
            for container in level
            if isinstance(container, (dict, list))
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return False
    return True


def _is_text(value: object) -> bool:
    """Whether all strings of a JSON value can be encoded."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_text(path: Path) -> str:
    where = str(path)
    file, size = open_regular(path)
    with file:
        if size > _MAX_JSON_BYTES:
            message = f"the file has {size} bytes, and at most {_MAX_JSON_BYTES} are read as JSON"
            raise BadInputError(Finding("file-too-large", message, where=where))
        try:
            content = file.read(min(size + 1, _MAX_JSON_BYTES))  # it makes room for so much
        except OSError as error:
            message = f"the file cannot be read: {error.strerror}"
            raise BadInputError(Finding("unreadable-file", message, where=where)) from error
    if known := recognize_content(content[:PROBE_SIZE], where):
        raise BadInputError(known)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"not UTF-8 text (byte {error.start}, on line {line})"
        raise BadInputError(
            Finding("not-utf8", message, where=where, fix="save the file again as UTF-8")
        ) from error
    if text.startswith("\ufeff"):
        message = "the file begins with a byte order mark, which JSON does not allow"
        raise BadInputError(
            Finding("not-json", message, where=where, fix="save the file as UTF-8 without it")
        )
    return text


def _name_json(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return "a list"
    return "text" if isinstance(value, str) else "a number"


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
    try:
        return one.samefile(other)
    except OSError:
        return one == other


def _is_inside(inner: Path, outer: Path) -> bool:
    return any(_is_same(parent, outer) for parent in inner.parents)


def _resolve_entries(folder: Path) -> Iterator[Path]:
    with suppress(OSError):
        for entry in folder.iterdir():
            if entry.is_symlink():
                yield Path(os.path.realpath(entry))


def _sync_files(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            sync_path(Path(root, name))
