"""What of many sources is done, noted in the folder of their results, so that --resume goes on from there.

OUT/.regraft-run holds a line of JSON for each source that was converted. It goes when all of them are; while it is
there, some are not: the run was interrupted, or something failed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

import regraft
from regraft.errors import BadInputError, Finding
from regraft.sources.resolve import Item
from regraft.storage.job import LocalJob
from regraft.views.outcome import SourceOutcome, Verdict

NAME = ".regraft-run"
_BEFORE = "done by the run before"

Stamps = dict[str, tuple[int, int | str]]


class Done(Struct, frozen=True):
    """One source that was converted."""

    name: str
    job: LocalJob
    destination: str
    made: Stamps
    """The files of the result: their sizes in bytes, and when they were written."""
    verdict: Verdict
    why: str
    load: str


class RunJournal:
    """What is done of a run over many sources into one folder."""

    def __init__(
        self,
        folder: Path,
        options: Mapping[str, str],
        beside: Sequence[Path],
        *,
        resume: bool,
        overwrite: bool,
    ) -> None:
        """``beside`` are files that every source is converted with: the base's config, rule books.

        With ``overwrite`` a result of a source that changed since is made again.

        Raises ``BadInputError`` where a run that is to be resumed had other options.
        """
        self._path = folder / NAME
        self._options, self._beside = dict(options), stamps(beside)
        self._overwrite, self._lock = overwrite, threading.Lock()
        self._done = {done.name: done for done in _read(self._path)} if resume else {}
        for done in self._done.values():
            now = LocalJob(regraft.__version__, done.job.read, self._options)
            if not now.is_same(done.job):
                fix = (
                    "give the same options as then, or leave out --resume and pass --overwrite to "
                    "convert all again"
                )
                raise now.other_work(done.job, str(folder), fix)
        if not resume:
            with suppress(OSError):
                self._path.unlink()

    def job(self, item: Item) -> LocalJob:
        """What converting a source is, as far as is known without opening it."""
        return LocalJob(regraft.__version__, {**stamps([item.path]), **self._beside}, self._options)

    def before(self, item: Item) -> SourceOutcome | None:
        """What a run before made of a source, where that stands as it left it.

        Raises ``BadInputError`` where the source changed since.
        """
        done = self._done.get(item.name)
        if done is None or stamps([Path(done.destination)]) != done.made:
            return None
        job = self.job(item)
        if not job.is_same(done.job):
            if self._overwrite:
                return None
            fix = "remove that result, or pass --overwrite to make it again"
            raise job.other_work(done.job, done.destination, fix)
        why = f"{done.why} ({_BEFORE})" if done.why else _BEFORE
        return SourceOutcome(
            item.name, str(item.path), done.destination, done.verdict, why, load=done.load
        )

    def note(self, item: Item, job: LocalJob, outcome: SourceOutcome) -> None:
        """Note that a source was converted."""
        if outcome.destination is None:
            return
        done = Done(
            item.name,
            job,
            outcome.destination,
            stamps([Path(outcome.destination)]),
            outcome.verdict,
            outcome.why,
            outcome.load,
        )
        with self._lock, suppress(OSError), self._path.open("ab") as file:
            file.write(msgspec.json.encode(done) + b"\n")

    def end(self) -> None:
        """All is done, and there is nothing to resume."""
        with suppress(OSError):
            self._path.unlink()


def stamps(paths: Sequence[Path]) -> Stamps:
    """The files at some paths, and in the folders among them: sizes in bytes, and when they were written."""
    found: Stamps = {}
    for path in paths:
        for root, folders, names in os.walk(path):
            folders.sort()
            for name in names:
                _stamp(Path(root, name), found)
        if not path.is_dir():
            _stamp(path, found)
    return found


def _stamp(path: Path, found: Stamps) -> None:
    with suppress(OSError):
        status = path.stat()
        found[str(path.absolute())] = (status.st_size, status.st_mtime_ns)


def _read(path: Path) -> list[Done]:
    """What a journal holds; a line that is torn says nothing.

    Raises ``BadInputError`` where it cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        message = f"what a run before has done cannot be read: {error.strerror or error}"
        raise BadInputError(
            Finding("system", message, where=str(path), fix="leave out --resume")
        ) from error
    found = []
    for line in lines:
        with suppress(msgspec.DecodeError):
            found.append(msgspec.json.decode(line, type=Done))
    return found
