"""Doing the work window by window: where the source, or the result, is beyond this machine.

Windows of a file are made in memory by several threads, each from ranged reads of the source, and handed on in their
order. At most as many are under way as there are threads, so memory is bounded, whatever the size of the checkpoint.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from regraft.checkpoints.gather import Bytes, Files
from regraft.checkpoints.prepared import Prepared
from regraft.checkpoints.sharding import OutFile
from regraft.checkpoints.tiles import write_all
from regraft.checkpoints.windows import Windows
from regraft.storage.work import Work

WINDOW = 8 << 20
"""Bytes of a window."""
_PER_THREAD = 3
"""Windows' worth of memory that a thread takes: what it makes, what it reads for it, and what is on its way."""
_AT_ONCE = 4
"""Reads of one window that go on at a time: what it is made of may lie in several files."""
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)

_Read = TypeVar("_Read")
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
        self._pool = ThreadPoolExecutor(jobs, "regraft-window")

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self.files.close()

    def run(
        self,
        file: OutFile,
        done: Collection[int] = (),
        put: Callable[[int, Bytes], None] | None = None,
    ) -> Iterator[tuple[int, Bytes]]:
        """The windows of a file in order: number, and bytes. Those that are ``done`` are passed over.

        ``put`` is called for each with its place and its bytes, by the thread that made it.

        Raises ``BadInputError`` where the source cannot be read.
        """
        starts = []
        for number, start in enumerate(range(0, file.size, WINDOW)):
            if number in done:
                self._count(min(WINDOW, file.size - start))
            else:
                starts.append(start)

        def make(start: int, stop: int) -> Bytes:
            data = self.windows.read(self.files, file, start, stop, self.reads)
            if put is not None:
                put(start, data)
            return data

        spans = ((start, min(start + WINDOW, file.size)) for start in starts)
        for start, made in self.each(make, spans):
            self._count(len(made))
            yield start // WINDOW, made

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
            if len(waiting) > self.jobs:
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
    with Stream(ready, jobs, advance) as stream:
        for number, file in enumerate(ready.layout.files):
            out = os.open(work.new / file.name, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
            try:
                if os.fstat(out).st_size != file.size:
                    os.ftruncate(out, file.size)
                finished: list[tuple[int, int]] = []
                here = {window for at, window in work.done if at == number}

                def put(at: int, data: Bytes, out: int = out) -> None:
                    write_all(out, data.data, at)

                for window, _ in stream.run(file, here, put):
                    finished.append((number, window))
                    if len(finished) * WINDOW >= 1 << 28:
                        os.fdatasync(out)
                        work.note(finished)
                        finished = []
                os.fsync(out)
                work.note(finished)
            finally:
                os.close(out)
