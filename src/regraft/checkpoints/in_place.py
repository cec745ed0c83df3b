"""Renaming tensors in the files they are in: headers are rewritten, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regraft.checkpoints.prepare import Prepared, prepare
from regraft.checkpoints.sharding import make_head, make_index, rename_aliases
from regraft.checkpoints.source import CONFIG, INDEX, UNFINISHED
from regraft.checkpoints.spelling import with_note
from regraft.errors import BadInputError, Finding, RefusedError
from regraft.planning.model import Foreign
from regraft.report import CheckpointReport, count_in_words
from regraft.storage.beside import check_files
from regraft.storage.safetensors import sync_path
from regraft.storage.weights import File
from regraft.storage.work import cannot_write, try_lock, write_file

_PARTIAL = UNFINISHED + ".tmp"


def convert_in_place(
    src: Path,
    dst: Path,
    *,
    to: str,
    model: Path | None = None,
    source: str | None = None,
    foreign: Foreign | None = None,
    dry_run: bool = False,
    untie: bool = False,
) -> CheckpointReport:
    """Give the tensors of a checkpoint their new names, in the very files.

    The old headers, the index and the config stay in a hidden folder beside the files until the new
    ones are on disk. Where a run ends before that, they are put back: at once, or by the next run.

    Raises ``RefusedError`` where more than names changes, or a header does not fit.
    """
    if src.resolve() != dst.resolve():
        message = "in place, the checkpoint to write is the one that is read"
        raise BadInputError(Finding("option", message, where=str(dst), fix=f"give {src} for both"))
    folder = src if src.is_dir() else src.parent
    options: dict[str, Any] = {"model": model, "source_layout": source, "foreign": foreign}
    options["untie"] = untie
    if dry_run or not folder.is_dir():
        return _prepare(src, to, **options)[0].report
    try:
        with _locked(folder):
            restore(folder)
            ready, changed = _prepare(src, to, **options)
            _rewrite(folder, ready, changed)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return ready.report


def _prepare(src: Path, to: str, **options: Any) -> tuple[Prepared, list[tuple[File, bytes]]]:
    ready = prepare(src, to, **options)
    heads = _make_heads(ready)
    return ready, [pair for pair in zip(ready.source.files, heads, strict=True) if pair[1]]


def _rewrite(folder: Path, ready: Prepared, changed: list[tuple[File, bytes]]) -> None:
    texts: dict[str, bytes] = {}
    if ready.source.index is not None:
        texts[INDEX] = make_index(ready.source, ready.moves, ready.layout.files)
    if ready.config is not None and ready.report.config:
        texts[CONFIG] = ready.config
    kept = folder / _PARTIAL
    try:
        kept.mkdir()
        for file, _ in changed:
            with file.path.open("rb") as opened:
                write_file(kept / file.name, opened.read(file.data_start))
        for name in texts:
            write_file(kept / name, (folder / name).read_bytes())
        sync_path(kept)
        kept.rename(folder / UNFINISHED)
        sync_path(folder)
        for file, head in changed:
            _write_head(file.path, head)
        for name, text in texts.items():
            _replace(folder / name, text)
        sync_path(folder)
    except BaseException:
        restore(folder)
        raise
    _forget(folder)


def restore(folder: Path) -> None:
    """Put back what a run kept that did not come to its end."""
    kept = folder / UNFINISHED
    if strange := [*check_files(folder, [kept]), *check_files(kept, kept.glob("*"))]:
        raise BadInputError(strange)
    for path in sorted(kept.iterdir()) if kept.is_dir() else ():
        if path.suffix == ".json":
            _replace(folder / path.name, path.read_bytes())
        else:
            _write_head(folder / path.name, path.read_bytes())
    sync_path(folder)
    _forget(folder)


def _forget(folder: Path) -> None:
    """Remove what was kept; the rename says that it is no longer needed."""
    partial = folder / _PARTIAL
    if (folder / UNFINISHED).exists():
        (folder / UNFINISHED).rename(partial)
        sync_path(folder)
    if partial.exists():
        shutil.rmtree(partial)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    file = os.open(folder, os.O_RDONLY)
    try:
        if not try_lock(file):
            message = "another run renames its tensors in place"
            raise BadInputError(
                Finding("in-use", message, where=str(folder), fix="wait for it, or stop it")
            )
        yield
    finally:
        os.close(file)


def _make_heads(ready: Prepared) -> list[bytes]:
    """The new header of every file, as long as the old one; empty where nothing changes."""
    findings = list(_check_files(ready))
    moves, tensors = ready.moves, ready.source.tensors
    if ready.plan is not None and ready.plan.dropped:
        message = f"{count_in_words(sum(len(d.group) for d in ready.plan.dropped), 'tensor')} would be dropped"
        fix = "convert to another folder"
        raise RefusedError([*findings, Finding("not-in-place", message, fix=fix)])
    if not moves.whole:
        rules = ", ".join(name for name, times in ready.report.rules.items() if times)
        message = f"more than names changes ({rules})"
        fix = "convert to another folder"
        raise RefusedError([*findings, Finding("not-in-place", message, fix=fix)])
    renamed = dict(zip(moves.first.tolist(), moves.names, strict=True))
    heads = []
    for number, file in enumerate(ready.source.files):
        mine = [i for i in range(len(tensors)) if tensors.files[i] == number]
        metadata = rename_aliases(file.metadata, moves)
        if metadata == dict(file.metadata) and all(renamed[i] == tensors.names[i] for i in mine):
            heads.append(b"")
            continue
        metadata = with_note(metadata, None if number else ready.note)
        head = make_head(_rows(mine, renamed, ready, file), metadata, file.name, pad=False)
        if len(head) > file.data_start and ready.note is not None:
            metadata = with_note(metadata, None)
            head = make_head(_rows(mine, renamed, ready, file), metadata, file.name, pad=False)
        if len(head) > file.data_start:
            findings.append(
                Finding(
                    "not-in-place",
                    f"the new header takes {len(head)} bytes, and the old one {file.data_start}",
                    where=str(file.path),
                    fix="convert to another folder",
                )
            )
            continue
        room = file.data_start - 8
        heads.append(room.to_bytes(8, "little") + head[8:].ljust(room))
    if findings:
        raise RefusedError(findings)
    return heads


def _rows(
    mine: list[int], renamed: dict[int, str], ready: Prepared, file: File
) -> Iterator[tuple[str, str, tuple[int, ...], int, int]]:
    tensors = ready.source.tensors
    for i in mine:
        start = int(tensors.starts[i]) - file.data_start
        shape = tensors.shapes[i]
        yield renamed[i], tensors.dtypes[i], shape, start, start + int(tensors.sizes[i])


def _check_files(ready: Prepared) -> Iterator[Finding]:
    if ready.source.is_bin:
        yield Finding("not-in-place", "torch wrote it, and its names are part of a pickle")
        return
    for file in ready.source.files:
        if file.path.is_symlink() or file.path.stat().st_nlink > 1:
            yield Finding(
                "not-in-place",
                "the file has other names, and what reads it there would find it changed",
                where=str(file.path),
                fix="convert to another folder",
            )


def _write_head(path: Path, head: bytes) -> None:
    file = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        os.pwrite(file, head, 0)
        os.fsync(file)
    finally:
        os.close(file)


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.tmp")
    write_file(partial, data)
    if path.exists():
        shutil.copymode(path, partial)
    partial.replace(path)
