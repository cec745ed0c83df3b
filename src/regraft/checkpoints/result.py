"""Writing what was prepared, and putting the result in its place; a dry run needs nothing of this module."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.checkpoints.engine import Engine
from regraft.checkpoints.prepare import Prepared
from regraft.checkpoints.source import CONFIG, INDEX
from regraft.checkpoints.units import Cutter
from regraft.checkpoints.workers import count_jobs
from regraft.errors import BadInputError, Finding
from regraft.storage.folder import Beside, check_destination, complete
from regraft.storage.work import Work, cannot_write, open_work, work_folder

if TYPE_CHECKING:
    from regraft.checkpoints.convert import Progress, Staged
    from regraft.storage.objects import Client

NOTHING_TO_RESUME = "--resume found nothing of a run before, so all of it was made now"
Advance = Callable[[int], None]
Finish = Callable[[Path], None]
"""Called with the folder of the weights files when they are written."""


def check_place(src: Path, dst: Path, *, resume: bool, overwrite: bool, file: bool) -> None:
    """Check that a result can be put at ``dst``, before any work is done.

    Raises ``BadInputError``.
    """
    if resume and not overwrite and dst.exists() and not work_folder(dst).exists():
        message = "nothing is left to resume: a result stands here already"
        fix = "compare it with `regraft verify SRC DST`, or pass --overwrite to convert again"
        raise BadInputError(Finding("destination-exists", message, where=str(dst), fix=fix))
    check_destination(src, dst, overwrite=overwrite, file=file)


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
    write(
        ready,
        dst,
        name,
        cutter,
        count_jobs(jobs),
        resume=False,
        overwrite=overwrite,
        progress=progress,
        finish=finish,
    )


def write(
    ready: Prepared,
    dst: Path,
    name: str | None,
    cutter: Cutter | None,
    jobs: int,
    *,
    resume: bool,
    overwrite: bool,
    progress: Progress | None,
    options: Mapping[str, str] | None = None,
    finish: Finish | None = None,
) -> None:
    """Write what was prepared, on this machine; ``options`` are words for what was asked for.

    With a ``cutter`` each worker reads what its piece of the result is made of; without, sources are read in order.
    Everything else is as in `write_prepared`.
    """
    beside = None if name is not None else _beside(ready)
    advance = advancing(dst.name, ready, progress)
    try:
        job, size = ready.job(options or {}), ready.layout.size
        size += beside.size if beside is not None else 0
    except OSError as error:
        raise cannot_write(dst, error) from error
    with open_work(dst, file=name is not None) as work:
        try:
            work.check_place(overwrite=overwrite)
            work.begin(job, resume=resume)
            ready.report.resumed = work.resumed
            if resume and not work.resumed:
                ready.report.notes.append(NOTHING_TO_RESUME)
            work.check_space(size)
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
            complete(work, [f.stamp for f in ready.source.files], beside, overwrite=overwrite)
        except OSError as error:
            raise cannot_write(work.dst, error) from error


def _beside(ready: Prepared) -> Beside:
    """What stands beside the weights; the index, which says that they are complete, comes last."""
    source = ready.source
    copied = {str(path): source.root / path for path in source.others}
    written, like = dict(ready.written), {}
    if ready.config is not None and source.config is not None:
        written[CONFIG], like[CONFIG] = ready.config, source.config.path
    if ready.layout.index is not None:
        written[INDEX] = ready.layout.index
    return Beside({**copied, **ready.copied}, written, like)


def stage(
    ready: Prepared,
    staged: Staged,
    dst: Path,
    name: str | None,
    *,
    overwrite: bool,
    jobs: int,
    progress: Progress | None,
    store: Client | None,
) -> None:
    """Do one part of a conversion, or commit all of them."""
    share, report = staged.share, ready.report
    advance = advancing(dst.name, ready, progress)
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
        beside = None if work.file else _beside(ready)
        try:
            complete(work, [f.stamp for f in ready.source.files], beside, overwrite=overwrite)
        except OSError as error:
            raise cannot_write(work.dst, error) from error

    commit(ready, staged.folder, dst, name, place)


def advancing(name: str, ready: Prepared, progress: Progress | None) -> Advance:
    """What counts the bytes that are done, and tells of them."""
    done = [0]

    def advance(size: int) -> None:
        done[0] += size
        if progress is not None:
            progress(name, done[0], ready.layout.size)

    return advance
