"""Converting a checkpoint in parts: by the elements of a scheduler's array, on as many machines as there are.

Each part is done by a process of its own, which plans the whole and makes its pieces of the files; see
`regraft.storage.stage` for what they have in common. When all are done, one process commits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path

from regraft.checkpoints.engine import Workers
from regraft.checkpoints.flush import begin_writing
from regraft.checkpoints.noted import NotedFile
from regraft.checkpoints.prepared import Prepared
from regraft.checkpoints.sharding import OutFile
from regraft.checkpoints.shares import Piece, cut, piece_size, pieces_of
from regraft.checkpoints.stream import Advance, Stream
from regraft.checkpoints.tiles import write_all
from regraft.errors import BadInputError, Finding
from regraft.report import PartReport, show_size
from regraft.storage.probe import open_regular
from regraft.storage.scheduler import Share
from regraft.storage.stage import Job, Stage
from regraft.storage.work import Work, cannot_write, check_room, open_work

_SHOWN = 8


def job_of(ready: Prepared, piece: int) -> Job:
    """What a conversion in pieces of so many bytes is known by, on every machine."""
    source = ready.source
    files = tuple(
        (file.name, file.size, str(file.stamp.modified or file.stamp.version))
        for file in source.files
    )
    made = tuple(file.name for file in ready.layout.files)
    return Job(source.root.name, files, ready.result(), piece, made)


def open_stage(folder: Path, ready: Prepared) -> Stage:
    """The stage of a conversion."""
    return Stage(folder, job_of(ready, piece_size(ready.layout.size)))


def do_part(
    ready: Prepared, folder: Path, dst: Path, share: Share, jobs: int, advance: Advance
) -> PartReport:
    """Make what one part has to make and nobody has made yet.

    Raises ``BadInputError``.
    """
    pieces = cut(ready.layout.files, piece_size(ready.layout.size))
    mine = pieces_of(pieces, share)
    report = PartReport(share.number, share.count, len(mine), sum(piece.size for piece in mine))
    with open_stage(folder, ready) as stage:
        if stage.committed is not None:
            if not dst.exists():
                raise committed_already(str(folder), str(dst))
            report.before, report.left = len(mine), 0
            return report
        done = stage.done()
        wanted = [piece for piece in mine if piece[:2] not in done]
        missing = sum(piece.size for piece in wanted)
        report.before = len(mine) - len(wanted)
        advance(report.bytes - missing)
        check_room(folder, missing, dst)
        try:
            _make(ready, stage, wanted, jobs, advance)
        except OSError as error:
            raise cannot_write(folder, error) from error
        for file in ready.source.files:
            file.stamp.check()
        report.left = len(pieces) - len(stage.done())
    return report


def _make(
    ready: Prepared, stage: Stage, pieces: Sequence[Piece], jobs: int, advance: Advance
) -> None:
    """Make pieces, each by a thread, and mark them when they are on disk."""
    files = {
        number: _file(stage, ready.layout.files[number], list(its))
        for number, its in groupby(pieces, lambda piece: piece.file)
    }
    with Stream(ready, jobs) as stream, Workers(ready.source.files, jobs) as workers:

        def make(piece: Piece) -> None:
            file, out = files[piece.file].file, files[piece.file].out
            runs = stream.windows.runs(file, piece.start, piece.stop) if is_local else None
            if runs is None:
                for at, data in stream.make(file, piece.start, piece.stop):
                    write_all(out, data.data, at)
                    begin_writing(out, at, len(data))
                    advance(len(data))
                return
            write_all(out, memoryview(file.head)[piece.start : piece.stop], piece.start)
            for run in runs:
                workers.mine().do(run, out)
            begin_writing(out, piece.start, piece.size)
            advance(piece.size)

        is_local = not ready.source.is_remote
        try:
            tasks = (piece for shared in files.values() for piece in shared.open())
            with closing(stream.every(make, tasks)) as made:
                for piece in made:
                    files[piece.file].noted(piece)
        finally:
            for shared in files.values():
                shared.close()


def _file(stage: Stage, file: OutFile, pieces: list[Piece]) -> NotedFile:
    """A file of the result, as a part writes it."""

    def reach() -> int:
        stage.make(file.name, file.size)
        return stage.open(file.name)

    return NotedFile(file, pieces, reach, stage.mark)


Place = Callable[[Work, Prepared], None]
"""What writes everything beside the weights, the index last, and puts the result in its place."""


def commit(ready: Prepared, folder: Path, dst: Path, name: str | None, place: Place) -> None:
    """Check that all parts are done and nothing changed, and put the result in its place.

    A commit that was killed is done again by the next.

    Raises ``BadInputError``.
    """
    with open_stage(folder, ready) as stage:
        if stage.committed is not None:
            raise committed_already(str(folder), str(dst))
        done, pieces = stage.done(), cut(ready.layout.files, stage.job.piece)
        missing = [piece for piece in pieces if piece[:2] not in done]
        check_complete(ready, missing, len(pieces), str(folder))
        claimed = stage.claim()
        if claimed is None:  # a commit was killed between the renaming and the note of it
            with open_work(dst, file=name is not None) as work:
                work.clear()
            stage.finish()
            return
        try:
            _check_files(ready, claimed)
            with open_work(dst, file=name is not None) as work:
                work.new = claimed
                place(work, ready)
        except BaseException:
            stage.give_up(claimed)
            raise
        stage.finish()


def check_complete(ready: Prepared, missing: Sequence[Piece], count: int, where: str) -> None:
    """Check that none of so many pieces is missing.

    Raises ``BadInputError``.
    """
    if not missing:
        return
    by_file = {number: list(its) for number, its in groupby(missing, lambda piece: piece.file)}
    rows = [
        f"{ready.layout.files[number].name} ({len(its)}: bytes {its[0].start} to {its[-1].stop})"
        for number, its in by_file.items()
    ]
    more = f", and of {len(rows) - _SHOWN} more files" if len(rows) > _SHOWN else ""
    size = show_size(sum(piece.size for piece in missing))
    message = (
        f"{len(missing)} of {count} pieces are not there ({size}): of "
        f"{', '.join(rows[:_SHOWN])}{more}"
    )
    fix = "run the parts that died again, or do all that is missing with --part 0/1; then commit"
    raise BadInputError(Finding("stage-incomplete", message, where=where, fix=fix))


def _check_files(ready: Prepared, folder: Path) -> None:
    """Check that every file has its size and begins as it should."""
    for file in ready.layout.files:
        path = folder / file.name
        opened, size = open_regular(path)
        with opened:
            if size != file.size or opened.read(len(file.head)) != file.head:
                message = "the file is not what its parts are said to have made it"
                fix = "see what else wrote to the stage; start over after --abort"
                raise BadInputError(Finding("stage-damaged", message, where=str(path), fix=fix))


def committed_already(where: str, dst: str) -> BadInputError:
    """The error for a second commit, or for a part after it whose result is gone."""
    message = (
        f"this conversion was committed already, and the stage has nothing left for {dst[:500]}"
    )
    fix = "look at the result that was committed; to make it once more, start over after --abort"
    return BadInputError(Finding("stage-committed", message, where=where, fix=fix))
