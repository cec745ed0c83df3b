"""Renaming tensors in the files they are in: headers are rewritten, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from regraft.checkpoints.prepare import Prepared, prepare
from regraft.checkpoints.sharding import make_head, make_index, rename_aliases
from regraft.checkpoints.source import CONFIG, INDEX, File
from regraft.checkpoints.work import cannot_write, write_file
from regraft.errors import BadInputError, Finding, RefusedError
from regraft.files.safetensors import sync_path
from regraft.plan.model import Foreign
from regraft.report import CheckpointReport

_SUFFIX = ".regraft-header"


def convert_in_place(
    src: Path,
    dst: Path,
    *,
    to: str,
    model: Path | None = None,
    source: str | None = None,
    foreign: Foreign | None = None,
    dry_run: bool = False,
) -> CheckpointReport:
    """Give the tensors of a checkpoint their new names, in the very files.

    The old headers stay beside the files until the new ones are on disk; a run that finds some left
    by a run that died puts them back first.

    Raises ``RefusedError`` where more than names changes, or a header does not fit.
    """
    if src.resolve() != dst.resolve():
        message = "in place, the checkpoint to write is the one that is read"
        raise BadInputError(Finding("option", message, where=str(dst), fix=f"give {src} for both"))
    folder = src if src.is_dir() else src.parent
    if not dry_run:
        restore(folder)
    ready = prepare(src, to, model=model, source_layout=source, foreign=foreign)
    heads = _make_heads(ready)
    if dry_run:
        return ready.report
    changed = [(file, head) for file, head in zip(ready.source.files, heads, strict=True) if head]
    kept: list[Path] = []
    try:
        for file, _ in changed:
            with file.path.open("rb") as opened:
                old = opened.read(file.data_start)
            path = file.path.with_name(file.name + _SUFFIX)
            kept.append(path)
            partial = path.with_name(path.name + ".tmp")
            write_file(partial, old)
            partial.replace(path)
        sync_path(folder)
        for file, head in changed:
            _write_head(file.path, head)
        if ready.source.index is not None:
            index = make_index(ready.source, ready.moves, ready.layout.files)
            _replace(folder / INDEX, index)
        if ready.config is not None and ready.report.config:
            _replace(folder / CONFIG, ready.config)
        sync_path(folder)
    except OSError as error:
        with suppress(OSError):
            restore(folder)
        raise cannot_write(folder, error) from error
    for path in kept:
        path.unlink()
    sync_path(folder)
    return ready.report


def restore(folder: Path) -> None:
    """Put back the headers that a run which died left beside their files."""
    found = sorted(folder.glob(f"*{_SUFFIX}"))
    for path in found:
        _write_head(path.with_name(path.name.removesuffix(_SUFFIX)), path.read_bytes())
    for path in (*found, *folder.glob(f"*{_SUFFIX}.tmp")):
        path.unlink()


def _make_heads(ready: Prepared) -> list[bytes]:
    """The new header of every file, as long as the old one; empty where nothing changes."""
    findings = list(_check_files(ready))
    moves, tensors = ready.moves, ready.source.tensors
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
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), head, 0)
        os.fsync(file.fileno())


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.tmp")
    write_file(partial, data)
    partial.replace(path)
