"""Converting a checkpoint, file to file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.checkpoints.casting import parse_casts
from regraft.checkpoints.engine import Engine, buffer_size
from regraft.checkpoints.memory import peak, resident
from regraft.checkpoints.prepare import Prepared, prepare
from regraft.checkpoints.reads import check_reads
from regraft.checkpoints.sharding import parse_size
from regraft.checkpoints.source import CONFIG, INDEX, PIPELINE
from regraft.checkpoints.units import Cutter
from regraft.errors import BadInputError, Finding
from regraft.planning.model import Foreign
from regraft.report import CheckpointReport, show_size
from regraft.storage.beside import narrow
from regraft.storage.folder import check_destination, copy_file
from regraft.storage.safetensors import sync_path
from regraft.storage.scheduler import Share
from regraft.storage.work import Work, cannot_write, open_work, work_folder, write_file
from regraft.values import Struct

if TYPE_CHECKING:
    from regraft.storage.objects import Client

Tell = Callable[[str], None]
Progress = Callable[[str, int, int], None]
Advance = Callable[[int], None]
Finish = Callable[[Path], None]
"""Called with the folder of the weights files when they are written."""

_TORCH = (".bin", ".pt", ".pth")
_SLACK = 2 << 20
_STREAMS = 8
"""Workers where the source or the result is in a store: more than cores, since they wait for the network."""
_MOST_JOBS = 256
"""What the threads' stacks, the units in flight and the report take."""


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
) -> CheckpointReport:
    """Convert a checkpoint to another layout; ``dst`` appears whole or not at all.

    One weights file becomes one file, where ``dst`` is named like one, and else a folder. With a ``store`` the result
    is sent there, see `regraft.checkpoints.upload`; of ``dst`` only the name counts then. What is ``staged`` is one
    part of the work, or putting the result of all in its place.

    Raises what `regraft.convert` raises.
    """
    if store is None:
        dst = Path(os.path.realpath(dst))
    elif resume:
        message = "--resume goes on with a folder of this machine, and the result goes to a store"
        raise BadInputError(Finding("option", message, where=store.store.url, fix="leave it out"))
    casts = parse_casts(dtype)
    limit = parse_size(shard_size) if isinstance(shard_size, str) else shard_size
    name = file_name(src, dst, limit)
    folder = staged.folder if staged is not None and isinstance(staged.folder, Path) else None
    if staged is not None and (folder is None) != (store is not None):
        message = (
            "the stage is to be where the result goes: both in a store, or both on a file system"
        )
        raise BadInputError(Finding("stage-place", message, fix="give --stage beside DST"))
    placed = False
    if folder is not None:
        from regraft.storage.stage import check_beside, is_placed

        check_beside(folder, dst)
        placed = is_placed(folder)
    if not dry_run and store is None and not placed:
        if resume and not overwrite and dst.exists() and not work_folder(dst).exists():
            message = "nothing is left to resume: a result stands here already"
            fix = "compare it with `regraft verify SRC DST`, or pass --overwrite to convert again"
            raise BadInputError(Finding("destination-exists", message, where=str(dst), fix=fix))
        check_destination(src, dst, overwrite=overwrite, file=name is not None)
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
    waits = store is not None or ready.source.is_remote
    jobs = _STREAMS if jobs is None and waits else _count_jobs(jobs)
    streams = waits or staged is not None
    cutter = None if streams else Cutter(ready.moves, ready.dtypes, ready.source.tensors)
    report = ready.report
    report.memory = max(resident() + _buffers(jobs, streams=streams) + _SLACK, peak())
    if tell is not None:
        count = len(ready.layout.files)
        tell(
            f"{show_size(ready.layout.size)} in {count} {'file' if count == 1 else 'files'}, "
            f"{jobs} {'worker' if jobs == 1 else 'workers'}, peak memory {report.memory / 1e6:.0f} MB"
        )
    if dry_run:
        return report
    if ready.plan is not None:
        check_reads(ready.plan, ready.source)
    if staged is not None:
        advance = _advancing(dst.name, ready, progress)
        _stage(
            ready, staged, dst, name, overwrite=overwrite, jobs=jobs, advance=advance, store=store
        )
        return report
    if store is not None:
        from regraft.checkpoints.upload import upload

        upload(
            ready,
            store,
            jobs,
            overwrite=overwrite,
            advance=_advancing(dst.name, ready, progress),
            name=name,
        )
        return report
    with open_work(dst, file=name is not None) as work:
        _carry_out(work, ready, cutter, jobs, resume=resume, overwrite=overwrite, progress=progress)
    return report


def write_prepared(
    ready: Prepared,
    dst: Path,
    name: str | None,
    *,
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
    finish: Finish | None = None,
) -> None:
    """Write what was prepared, as one file where it has a ``name``; ``dst`` appears whole or not at all.

    ``finish`` gets the folder of the weights files when they are written, and may change numbers in them.

    Raises what writing raises, and what ``finish`` raises.
    """
    dst = Path(os.path.realpath(dst))
    streams = ready.source.is_remote
    cutter = None if streams else Cutter(ready.moves, ready.dtypes, ready.source.tensors)
    with open_work(dst, file=name is not None) as work:
        _carry_out(
            work,
            ready,
            cutter,
            _count_jobs(jobs),
            resume=False,
            overwrite=overwrite,
            progress=progress,
            finish=finish,
        )


def _carry_out(
    work: Work,
    ready: Prepared,
    cutter: Cutter | None,
    jobs: int,
    *,
    resume: bool,
    overwrite: bool,
    progress: Progress | None,
    finish: Finish | None = None,
) -> None:
    advance = _advancing(work.dst.name, ready, progress)
    try:
        work.check_place(overwrite=overwrite)
        work.begin(ready.job(), resume=resume)
        ready.report.resumed = work.resumed
        _check_space(work, ready)
        for made in ready.layout.files:
            (work.new / made.name).parent.mkdir(parents=True, exist_ok=True)
        if cutter is None:
            from regraft.checkpoints.stream import stream_into

            stream_into(work, ready, jobs, advance)
        else:
            Engine(ready.source.files, ready.layout.files, cutter, work, jobs, advance).run()
        if finish is not None:
            work.forget()
            finish(work.new)
        _place(work, ready, overwrite=overwrite)
    except OSError as error:
        raise cannot_write(work.dst, error) from error


def _place(work: Work, ready: Prepared, *, overwrite: bool) -> None:
    """Write everything beside the weights and put the result in its place.

    Raises ``BadInputError`` where the source changed meanwhile, ``OSError``.
    """
    for file in ready.source.files:
        file.stamp.check()
    if not work.file:
        _write_others(work, ready)
    kept = [*ready.source.others, Path(CONFIG), *map(Path, ready.copied)]
    narrow(work.new, [file.path for file in ready.source.files], kept=kept)
    work.place(overwrite=overwrite)


def _stage(
    ready: Prepared,
    staged: Staged,
    dst: Path,
    name: str | None,
    *,
    overwrite: bool,
    jobs: int,
    advance: Advance,
    store: Client | None,
) -> None:
    """Do one part of a conversion, or commit all of them."""
    share, report = staged.share, ready.report
    if store is not None and not isinstance(staged.folder, Path):
        from regraft.checkpoints.staged_uploads import commit_uploads, send_part

        if share is None:
            commit_uploads(ready, store, staged.folder, overwrite=overwrite, name=name)
        else:
            report.part = send_part(
                ready,
                store,
                staged.folder,
                share,
                jobs,
                overwrite=overwrite,
                advance=advance,
                name=name,
            )
        return
    from regraft.checkpoints.staging import commit, do_part

    assert isinstance(staged.folder, Path)
    if share is not None:
        report.part = do_part(ready, staged.folder, dst, share, jobs, advance)
        return

    def place(work: Work, ready: Prepared) -> None:
        try:
            _place(work, ready, overwrite=overwrite)
        except OSError as error:
            raise cannot_write(work.dst, error) from error

    commit(ready, staged.folder, dst, name, place)


def _advancing(name: str, ready: Prepared, progress: Progress | None) -> Advance:
    """What counts the bytes that are done, and tells of them."""
    done = [0]

    def advance(size: int) -> None:
        done[0] += size
        if progress is not None:
            progress(name, done[0], ready.layout.size)

    return advance


def _buffers(jobs: int, *, streams: bool) -> int:
    """Bytes that the workers' buffers take."""
    if not streams:
        return jobs * 2 * buffer_size(jobs)
    from regraft.checkpoints.stream import memory_of

    return memory_of(jobs)


def _count_jobs(jobs: int | None) -> int:
    if jobs is None:
        return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4, 16)
    if jobs < 1:
        raise BadInputError(Finding("bad-jobs", f"at least one worker is needed, not {jobs}"))
    if jobs > _MOST_JOBS:
        message = f"at most {_MOST_JOBS} workers can be had, not {jobs}"
        raise BadInputError(Finding("bad-jobs", message, fix="leave --jobs out, or give fewer"))
    return jobs


def file_name(src: Path, dst: Path, shard_size: int | None) -> str | None:
    """The name of the one file to write; ``None`` where that is a folder."""
    if dst.suffix in _TORCH and src.is_file() and not dst.is_dir():
        message = "torch's files are read, and never written"
        fix = "end the name in .safetensors, or name a folder"
        raise BadInputError(Finding("destination-is-file", message, where=str(dst), fix=fix))
    if dst.suffix != ".safetensors" or dst.is_dir():
        return None
    if not src.is_file() and not (src / PIPELINE).is_file():
        message = f"{src} is a folder, with more than weights in it, and this is a file's name"
        fix = "name a folder to write, or give the weights file that is to be converted"
        raise BadInputError(Finding("destination-is-file", message, where=str(dst), fix=fix))
    if shard_size is not None:
        message = f"a shard size is for folders, and {dst} is one file"
        raise BadInputError(Finding("option", message))
    return dst.name


def _check_space(work: Work, ready: Prepared) -> None:
    others = sum((ready.source.root / path).stat().st_size for path in ready.source.others)
    others += sum(path.stat().st_size for path in ready.copied.values())
    others += sum(map(len, ready.written.values()))
    needed = ready.layout.size + others + len(ready.layout.index or b"")
    done = sum(path.stat().st_blocks * 512 for path in work.new.rglob("*") if path.is_file())
    work.check_space(needed - done)


def _write_others(work: Work, ready: Prepared) -> None:
    """Everything beside the weights; the index, which says that they are complete, comes last."""
    others = {str(path): ready.source.root / path for path in ready.source.others}
    for path, origin in {**others, **ready.copied}.items():
        target = work.new / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        copy_file(origin, target)
        sync_path(target)
    for path, text in ready.written.items():
        (work.new / path).parent.mkdir(parents=True, exist_ok=True)
        write_file(work.new / path, text)
    if ready.config is not None and ready.source.config is not None:
        write_file(work.new / CONFIG, ready.config)
        shutil.copymode(ready.source.config, work.new / CONFIG)
    if ready.layout.index is not None:
        write_file(work.new / INDEX, ready.layout.index)
