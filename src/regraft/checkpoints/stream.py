"""Doing the work window by window: where the source, or the result, is beyond this machine.

Windows of a file are made in memory by several threads, each from ranged reads of the source, and handed on in their
order. At most as many are under way as there are threads, so memory is bounded, whatever the size of the checkpoint.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from itertools import groupby
from queue import SimpleQueue
from typing import Any, TypeVar

from regraft.checkpoints.flush import begin_writing
from regraft.checkpoints.gather import Bytes, Files
from regraft.checkpoints.noted import NotedFile
from regraft.checkpoints.prepared import Prepared
from regraft.checkpoints.sharding import OutFile
from regraft.checkpoints.shares import Piece, cut
from regraft.checkpoints.tiles import write_all
from regraft.checkpoints.windows import Windows
from regraft.storage.threads import Pool, stopped_by
from regraft.storage.work import Work

WINDOW = 8 << 20
"""Bytes of a window."""
_PER_THREAD = 3
"""Windows' worth of memory that a thread takes: what it makes, what it reads for it, and what is on its way."""
_AT_ONCE = 4
"""Reads of one window that go on at a time: what it is made of may lie in several files."""
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)

_Read = TypeVar("_Read")
_Task = TypeVar("_Task")
Advance = Callable[[int], None]


def memory_of(jobs: int) -> int:
    """The most memory that streaming takes, in bytes, beside what the plan does."""
    return (jobs + 1) * _PER_THREAD * WINDOW


class Stream:
    """The windows of a conversion's files; use it as a context manager."""

    def __init__(self, ready: Prepared, jobs: int, advance: Advance | None = None) -> None:
        self.windows = Windows(ready.moves, ready.dtypes, ready.source.tensors)
        self.files = Files(ready.source.files)
        self.jobs, self.advance = jobs, advance
        self.reads = _AT_ONCE if ready.source.is_remote else 1
        self._pool = Pool(jobs, "regraft-window")

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.stop.set()
        self._pool.shutdown(cancel_futures=True)
        self.files.close()

    def run(self, file: OutFile) -> Iterator[tuple[int, Bytes]]:
        """The windows of a file in order: where each begins, and its bytes.

        Raises ``BadInputError`` where the source cannot be read.
        """

        def make(start: int, stop: int) -> Bytes:
            return self.windows.read(self.files, file, start, stop, self.reads)

        spans = ((at, min(at + WINDOW, file.size)) for at in range(0, file.size, WINDOW))
        for start, made in self.each(make, spans):
            self._count(len(made))
            yield start, made

    def every(
        self, do: Callable[[_Task], None], tasks: Iterable[_Task]
    ) -> Generator[_Task, None, None]:
        """Do some tasks by the threads, each of which takes the next; those that are done, as they come.

        The threads go on while the caller looks at one. Raises what ``do`` or ``tasks`` raise.
        """
        lock, stop, finished = threading.Lock(), threading.Event(), SimpleQueue[Any]()
        end, waiting = object(), iter(tasks)

        def work() -> None:
            try:
                while not stop.is_set():
                    with lock, stopped_by(stop):
                        task = next(waiting, end)
                    if task is end:
                        return
                    with stopped_by(stop):
                        do(task)  # type: ignore[arg-type]
                    finished.put(task)
            except BaseException:
                stop.set()
                raise
            finally:
                finished.put(end)

        threads = [self._pool.submit(work) for _ in range(self.jobs)]
        running = len(threads)
        try:
            while running:
                task = finished.get()
                if task is end:
                    running -= 1
                else:
                    yield task
            for thread in threads:
                thread.result()
        finally:
            stop.set()
            wait(threads)

    def make(self, file: OutFile, start: int, stop: int) -> Iterator[tuple[int, Bytes]]:
        """Bytes of a file in windows, made by the calling thread: where each begins, and what is in it.

        Raises ``BadInputError`` where the source cannot be read.
        """
        for at in range(start, stop, WINDOW):
            end = min(at + WINDOW, stop)
            yield at, self.windows.read(self.files, file, at, end, self.reads)

    def each(
        self, read: Callable[[int, int], _Read], spans: Iterable[tuple[int, int]]
    ) -> Iterator[tuple[int, _Read]]:
        """What is read of some spans, in their order, by the same threads: where each begins, and what was read."""
        waiting: deque[tuple[int, Future[_Read]]] = deque()
        for start, stop in spans:
            waiting.append((start, self._pool.submit(read, start, stop)))
            # Those that come later are made while one takes long, at most as many as there are threads.
            if len(waiting) > 2 * self.jobs:
                at, future = waiting.popleft()
                yield at, future.result()
        while waiting:
            at, future = waiting.popleft()
            yield at, future.result()

    def _count(self, size: int) -> None:
        if self.advance is not None:
            self.advance(size)


def stream_into(work: Work, ready: Prepared, jobs: int, advance: Advance) -> None:
    """Write the files of a result into the work folder, whatever the journal does not know as done.

    Raises ``BadInputError``, ``OSError``.
    """
    done = work.done
    missing = [piece for piece in cut(ready.layout.files, WINDOW) if piece[:2] not in done]
    files = {
        number: _file(work, ready.layout.files[number], list(its))
        for number, its in groupby(missing, lambda piece: piece.file)
    }
    with Stream(ready, jobs) as stream:

        def make(piece: Piece) -> None:
            output = files[piece.file]
            for at, data in stream.make(output.file, piece.start, piece.stop):
                write_all(output.out, data.data, at)
                begin_writing(output.out, at, len(data))
                advance(len(data))

        try:
            advance(ready.layout.size - sum(piece.size for piece in missing))
            tasks = (piece for output in files.values() for piece in output.open())
            with closing(stream.every(make, tasks)) as made:
                for piece in made:
                    files[piece.file].noted(piece)
        finally:
            for output in files.values():
                output.close()


def _file(work: Work, file: OutFile, missing: Sequence[Piece]) -> NotedFile:
    """A file of the result, in the work folder."""

    def reach() -> int:
        out = os.open(work.new / file.name, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
        if os.fstat(out).st_size != file.size:
            os.ftruncate(out, file.size)
        return out

    return NotedFile(file, missing, reach, work.note)
