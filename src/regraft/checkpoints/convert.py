"""Converting a checkpoint, file to file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.checkpoints.casting import parse_casts
from regraft.checkpoints.memory import peak, resident
from regraft.checkpoints.prepare import prepare
from regraft.checkpoints.sharding import parse_size
from regraft.checkpoints.source import PIPELINE
from regraft.checkpoints.units import Cutter
from regraft.checkpoints.workers import buffers, count_jobs
from regraft.errors import BadInputError, Finding
from regraft.planning.model import Foreign
from regraft.report import CheckpointReport, show_size
from regraft.storage.scheduler import Share
from regraft.values import Struct

if TYPE_CHECKING:
    from regraft.storage.objects import Client

Tell = Callable[[str], None]
Progress = Callable[[str, int, int], None]

_TORCH = (".bin", ".pt", ".pth", ".ckpt")
_SLACK = 2 << 20
_WRITERS = 5 << 20
"""Bytes of the modules that write, which are imported later: a dry run announces the same and never needs them."""
_STREAMS = 8
"""Workers where the source or the result is in a store: more than cores, since they wait for the network."""


class Staged(Struct, frozen=True):
    """A conversion that is done in parts."""

    folder: Path | Client
    """The stage: a folder that all machines see (`regraft.storage.stage`), or one in a store, where the result goes to
    a store (`regraft.checkpoints.staged_uploads`)."""
    share: Share | None
    """The part to do; ``None``: commit them."""


def convert_checkpoint(
    src: Path,
    dst: Path,
    *,
    to: str,
    model: Path | None = None,
    source: str | None = None,
    foreign: Foreign | None = None,
    shard_size: str | int | None = None,
    dtype: str | Sequence[str] | None = None,
    jobs: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    untie: bool = False,
    drop: Sequence[str] = (),
    keep: Sequence[str] = (),
    tell: Tell | None = None,
    progress: Progress | None = None,
    store: Client | None = None,
    staged: Staged | None = None,
    options: Mapping[str, str] | None = None,
) -> CheckpointReport:
    """Convert a checkpoint to another layout; ``dst`` appears whole or not at all.

    One weights file becomes one file, where ``dst`` is named like one, and else a folder. With a ``store`` the result
    is sent there, see `regraft.checkpoints.upload`; of ``dst`` only the name counts then. What is ``staged`` is one
    part of the work, or putting the result of all in its place. ``options`` are words for what was asked for, so that
    a run that is to ``resume`` other work can say what differs.

    Raises what `regraft.convert` raises.
    """
    if store is None:
        dst = Path(os.path.realpath(dst))
    elif resume:
        message = "--resume goes on with a folder of this machine, and the result goes to a store"
        raise BadInputError(Finding("option", message, where=store.store.url, fix="leave it out"))
    casts = parse_casts(dtype)
    limit = parse_size(shard_size) if isinstance(shard_size, str) else shard_size
    name = file_name(src, dst, limit, store.where(dst.name) if store is not None else None)
    folder = staged.folder if staged is not None and isinstance(staged.folder, Path) else None
    if staged is not None and (folder is None) != (store is not None):
        message = (
            "the stage is to be where the result goes: both in a store, or both on a file system"
        )
        raise BadInputError(Finding("stage-place", message, fix="give --stage beside DST"))
    placed = False
    if folder is not None:
        from regraft.storage.stage import check_beside, is_placed

        check_beside(folder, dst, src)
        placed = is_placed(folder)
    if not dry_run and store is None and not placed:
        from regraft.checkpoints.result import check_place

        check_place(src, dst, resume=resume, overwrite=overwrite, file=name is not None)
    elif store is not None and staged is None:
        from regraft.checkpoints.upload import check_free

        check_free(store, overwrite=overwrite, name=name)
    ready = prepare(
        src,
        to,
        model=model,
        source_layout=source,
        foreign=foreign,
        shard_size=limit,
        casts=casts,
        name=name,
        untie=untie,
        drop=drop,
        keep=keep,
    )
    if store is not None:
        from regraft.checkpoints.upload import check_apart

        check_apart(ready.source, store, name)
    waits = store is not None or ready.source.is_remote
    jobs = _STREAMS if jobs is None and waits else count_jobs(jobs)
    streams = waits or staged is not None
    cutter = None if streams else Cutter(ready.moves, ready.dtypes, ready.source.tensors)
    report = ready.report
    beyond = buffers(jobs, streams=streams) + _WRITERS + _SLACK
    report.memory = max(resident() + beyond, peak())
    if tell is not None:
        count = len(ready.layout.files)
        tell(
            f"{show_size(ready.layout.size)} in {count} {'file' if count == 1 else 'files'}, "
            f"{jobs} {'worker' if jobs == 1 else 'workers'}, peak memory {report.memory / 1e6:.0f} MB"
        )
    if dry_run:
        return report
    from regraft.checkpoints import result  # a dry run need not wait for what writes

    if ready.plan is not None and ready.demanding:
        from regraft.checkpoints.reads import check_reads

        check_reads(ready.plan, ready.source)
    if staged is not None:
        result.stage(
            ready,
            staged,
            dst,
            name,
            overwrite=overwrite,
            jobs=jobs,
            progress=progress,
            store=store,
        )
    elif store is not None:
        from regraft.checkpoints.upload import upload

        advance = result.advancing(dst.name, ready, progress)
        upload(ready, store, jobs, overwrite=overwrite, advance=advance, name=name)
    else:
        result.write(
            ready,
            dst,
            name,
            cutter,
            jobs,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
            options=options,
        )
    return report


def file_name(src: Path, dst: Path, shard_size: int | None, where: str | None = None) -> str | None:
    """The name of the one file to write; ``None`` where that is a folder. Errors say ``where``, or ``dst``."""
    where = where or str(dst)
    if dst.suffix in _TORCH and src.is_file() and not dst.is_dir():
        message = "torch's files are read, and never written"
        fix = "end the name in .safetensors, or name a folder"
        raise BadInputError(Finding("destination-is-file", message, where=where, fix=fix))
    if dst.suffix != ".safetensors" or dst.is_dir():
        return None
    if not src.is_file() and not (src / PIPELINE).is_file():
        message = f"{src} is a folder, with more than weights in it, and this is a file's name"
        fix = "name a folder to write, or give the weights file that is to be converted"
        raise BadInputError(Finding("destination-is-file", message, where=where, fix=fix))
    if shard_size is not None:
        message = f"a shard size is for folders, and {dst} is one file"
        raise BadInputError(Finding("option", message))
    return dst.name
