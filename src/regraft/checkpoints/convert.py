"""Converting a checkpoint, file to file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from regraft.checkpoints.casting import parse_casts
from regraft.checkpoints.engine import Engine, buffer_size, check_unchanged
from regraft.checkpoints.memory import peak, resident
from regraft.checkpoints.prepare import Prepared, prepare
from regraft.checkpoints.sharding import parse_size
from regraft.checkpoints.source import CONFIG, INDEX
from regraft.checkpoints.units import Cutter
from regraft.checkpoints.work import Work, cannot_write, open_work, write_file
from regraft.errors import BadInputError, Finding
from regraft.files.folder import check_destination, copy_file
from regraft.files.safetensors import sync_path
from regraft.plan.model import Foreign
from regraft.report import CheckpointReport

Tell = Callable[[str], None]
Progress = Callable[[str, int, int], None]

_SLACK = 2 << 20
"""What the threads' stacks, the units in flight and the report take."""


def convert_checkpoint(
    src: Path,
    dst: Path,
    *,
    to: str,
    model: Path | None = None,
    source: str | None = None,
    foreign: Foreign | None = None,
    shard_size: str | int | None = None,
    dtype: str | list[str] | None = None,
    jobs: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    tell: Tell | None = None,
    progress: Progress | None = None,
) -> CheckpointReport:
    """Convert a checkpoint to another layout; ``dst`` appears whole or not at all.

    Raises what `regraft.convert` raises.
    """
    dst = Path(os.path.realpath(dst))
    jobs = _count_jobs(jobs)
    casts = parse_casts(dtype)
    limit = parse_size(shard_size) if isinstance(shard_size, str) else shard_size
    if not dry_run:
        _check_place(src, dst, overwrite)
    ready = prepare(
        src, to, model=model, source_layout=source, foreign=foreign, shard_size=limit, casts=casts
    )
    cutter = Cutter(ready.moves, ready.dtypes, ready.source.tensors)
    report = ready.report
    report.memory = max(resident() + jobs * 2 * buffer_size(jobs) + _SLACK, peak())
    if tell is not None:
        size = (
            f"{ready.layout.size / 1e9:.3g} GB"
            if ready.layout.size > 1e8
            else (f"{ready.layout.size / 1e6:.3g} MB")
        )
        tell(
            f"{size} in {len(ready.layout.files)} files, {jobs} workers, "
            f"peak memory {report.memory / 1e6:.0f} MB"
        )
    if dry_run:
        return report
    with open_work(dst) as work:
        _carry_out(work, ready, cutter, jobs, resume, overwrite, progress)
    return report


def _carry_out(
    work: Work,
    ready: Prepared,
    cutter: Cutter,
    jobs: int,
    resume: bool,
    overwrite: bool,
    progress: Progress | None,
) -> None:
    done = [0]

    def advance(size: int) -> None:
        done[0] += size
        if progress is not None:
            progress(work.dst.name, done[0], ready.layout.size)

    try:
        try:
            work.begin(ready.job(), resume)
            ready.report.resumed = work.resumed
            _check_space(work, ready)
            Engine(ready.source.files, ready.layout.files, cutter, work, jobs, advance).run()
            for file in ready.source.files:
                check_unchanged(file)
            _write_others(work, ready)
            work.place(overwrite)
        except OSError as error:
            raise cannot_write(work.dst, error) from error
    except BaseException:
        if not _worth_keeping(work):
            work.clear()
        raise


def _worth_keeping(work: Work) -> bool:
    """Whether ``--resume`` would find something that is done."""
    try:
        return (work.folder / "journal").stat().st_size > 1
    except OSError:
        return False


def _count_jobs(jobs: int | None) -> int:
    if jobs is None:
        return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4, 16)
    if jobs < 1:
        raise BadInputError(Finding("bad-jobs", f"at least one worker is needed, not {jobs}"))
    return jobs


def _check_place(src: Path, dst: Path, overwrite: bool) -> None:
    if src.is_file() and not dst.exists():
        src = src.parent / src.name
    check_destination(src, dst, overwrite)


def _check_space(work: Work, ready: Prepared) -> None:
    others = sum((ready.source.root / path).stat().st_size for path in ready.source.others)
    needed = ready.layout.size + others + len(ready.layout.index or b"") + (1 << 18)
    needed -= sum(path.stat().st_blocks * 512 for path in work.new.iterdir() if path.is_file())
    state = os.statvfs(work.folder)
    free = state.f_bavail * state.f_frsize
    if needed > free:
        message = f"{needed / 1e9:.3g} GB more are needed, and {free / 1e9:.3g} GB are free"
        raise BadInputError(
            Finding("no-space", message, where=str(work.dst), fix="make room, or write elsewhere")
        )


def _write_others(work: Work, ready: Prepared) -> None:
    """Everything beside the weights; the index, which says that they are complete, comes last."""
    for path in ready.source.others:
        target = work.new / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        copy_file(ready.source.root / path, target)
        sync_path(target)
    if ready.config is not None and ready.source.config is not None:
        write_file(work.new / CONFIG, ready.config)
        shutil.copymode(ready.source.config, work.new / CONFIG)
    if ready.layout.index is not None:
        write_file(work.new / INDEX, ready.layout.index)
