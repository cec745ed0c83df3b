"""Doing the work: several threads, each on a file of its own as long as there are enough.

Bytes that lie together are copied by the kernel (``copy_file_range``); Python never sees them.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue

import numpy as np

from regraft.checkpoints.flush import begin_writing
from regraft.checkpoints.sharding import OutFile
from regraft.checkpoints.tiles import Mover, read_into, write_all
from regraft.checkpoints.units import Cutter, Op, Run
from regraft.checkpoints.workers import buffer_size
from regraft.storage.ranges import Ranges
from regraft.storage.stamp import changed
from regraft.storage.weights import File, open_source
from regraft.storage.work import Work, cannot_write

_REFUSED = {
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EBADF,
    errno.ETXTBSY,
}
_OPEN = 32
"""Source files that a worker keeps open."""
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_SYNC_BYTES, _SYNC_SECONDS = 1 << 29, 5.0
"""How much work may be lost when the power fails."""


class Engine:
    """Writes the files of a result into the work folder."""

    def __init__(
        self,
        sources: Sequence[File],
        files: Sequence[OutFile],
        cutter: Cutter,
        work: Work,
        jobs: int,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.sources, self.files, self.cutter, self.work = sources, files, cutter, work
        self.jobs, self.progress = jobs, progress
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self.complete: SimpleQueue[_Active | None] = SimpleQueue()
        self.waiting = list(range(len(files)))[::-1]
        self.active: dict[int, _Active] = {}
        self.synced = time.monotonic()
        self.unsynced = 0

    def run(self) -> None:
        """Do everything that the journal does not know as done.

        Raises ``BadInputError`` where the source changed, or the result cannot be written.
        """
        threads = [
            threading.Thread(target=self._work, name=f"regraft-{n}") for n in range(self.jobs)
        ]
        working = len(threads)
        try:
            for thread in threads:
                thread.start()
            # Waiting for the disk is done here, so that no worker has to.
            while working or not self.complete.empty():
                if self._is_due():
                    self._note()
                with suppress(Empty):
                    active = self.complete.get(timeout=0.5)
                    if active is None:
                        working -= 1
                    else:
                        self._seal(active)
        except OSError as error:
            raise cannot_write(self.work.dst, error) from error
        finally:
            self.stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            if self.active:
                self._note()
            for active in self.active.values():
                active.close()
        if self.errors:
            raise self.errors[0]

    def _work(self) -> None:
        worker = Worker(self.sources, buffer_size(self.jobs))
        try:
            active: _Active | None = None
            while not self.stop.is_set():
                taken = self._take(active)
                if taken is None:
                    return
                active, number, unit = taken
                if number < 0:
                    self.complete.put(active)
                    active = None
                    continue
                if unit is not None:
                    for op in unit:
                        worker.do(op, active.out)
                    begin_writing(active.out, *_range_of(unit))
                self._finish(active, number, unit)
        except OSError as error:
            self._fail(cannot_write(self.work.dst, error))
        except BaseException as error:
            self._fail(error)
        finally:
            worker.close()
            self.complete.put(None)

    def _fail(self, error: BaseException) -> None:
        with self.lock:
            self.errors.append(error)
        self.stop.set()

    def _take(self, mine: _Active | None) -> tuple[_Active, int, list[Op] | None] | None:
        """The next unit: of the worker's own file, of a file nobody has begun, or of any other.

        A number below 0 says that the file is complete.
        """
        with self.lock:
            while True:
                if mine is None or mine.drained:
                    mine = self._open_next()
                if mine is None:
                    mine = next((a for a in self.active.values() if not a.drained), None)
                if mine is None:
                    return None
                for number, unit in mine.units:
                    mine.running += 1
                    if (mine.number, number) in self.work.done:
                        return mine, number, None
                    return mine, number, unit
                mine.drained = True
                if not mine.running:
                    del self.active[mine.number]
                    return mine, -1, None

    def _open_next(self) -> _Active | None:
        if not self.waiting:
            return None
        number = self.waiting.pop()
        file = self.files[number]
        path = self.work.new / file.name
        out = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
        try:
            if os.fstat(out).st_size != file.size:
                os.ftruncate(out, file.size)
            write_all(out, memoryview(file.head), 0)
            for at, data in self.cutter.padding(file):
                write_all(out, data, at)
        except BaseException:
            os.close(out)
            raise
        active = _Active(number, out, enumerate(self.cutter.units(file)))
        self.active[number] = active
        return active

    def _finish(self, active: _Active, number: int, unit: list[Op] | None) -> None:
        size = sum(size_of(op) for op in unit) if unit else 0
        with self.lock:
            active.running -= 1
            self.unsynced += size
            if unit is not None:
                active.finished.append((active.number, number))
            complete = active.drained and not active.running
            if complete:
                del self.active[active.number]
        if complete:
            self.complete.put(active)
        if self.progress is not None:
            self.progress(size)

    def _is_due(self) -> bool:
        late = time.monotonic() - self.synced > _SYNC_SECONDS
        if not late and self.unsynced < _SYNC_BYTES:
            return False
        self.unsynced, self.synced = 0, time.monotonic()
        return True

    def _seal(self, active: _Active) -> None:
        """Wait until a finished file is on disk."""
        os.fsync(active.out)
        active.close()
        self.work.note(active.finished)

    def _note(self) -> None:
        """Flush what is open and note it in the journal."""
        with self.lock:
            actives = [a for a in self.active.values() if a.finished]
            taken = [(os.dup(a.out), list(a.finished)) for a in actives]
            for active in actives:
                active.finished = []
        for out, finished in taken:
            try:
                os.fdatasync(out)
                self.work.note(finished)
            except OSError as error:
                self._fail(cannot_write(self.work.dst, error))
            finally:
                os.close(out)


class _Active:
    """A file that is being written."""

    __slots__ = ("drained", "finished", "number", "out", "running", "units")

    def __init__(self, number: int, out: int, units: Iterator[tuple[int, list[Op]]]) -> None:
        self.number, self.out, self.units = number, out, units
        self.running = 0
        self.drained = False
        self.finished: list[tuple[int, int]] = []

    def close(self) -> None:
        if self.out >= 0:
            os.close(self.out)
            self.out = -1


class Worker:
    """What a thread keeps for itself: open source files and buffers."""

    def __init__(self, sources: Sequence[File], buffer_bytes: int) -> None:
        self.sources, self.mover = sources, Mover(buffer_bytes)
        self.open: dict[int, Ranges] = {}
        self.kernel = hasattr(os, "copy_file_range")

    def source(self, number: int) -> Ranges:
        """A source file, open."""
        if number not in self.open:
            if len(self.open) >= _OPEN:
                self.open.pop(next(iter(self.open))).close()
            self.open[number] = open_source(self.sources[number])
        return self.open[number]

    def close(self) -> None:
        """Close the source files."""
        for file in self.open.values():
            file.close()
        self.open.clear()

    def do(self, op: Op, out: int) -> None:
        """Do one operation, into an open file.

        Raises ``BadInputError`` where the source changed, ``OSError``.
        """
        number = op.file if isinstance(op, Run) else op[0]
        file = self.source(number)
        try:
            if not isinstance(op, Run):
                self.mover.move(op[1], file, out)
            elif op.read is not None and op.written is not None:
                self._cast(op, file, out)
            else:
                self._copy(op, file, out)
        except EOFError:
            raise changed(self.sources[number].path, "it ended early") from None

    def _copy(self, op: Run, file: Ranges, out: int) -> None:
        here, there, left = op.source_at, op.target_at, op.size
        descriptor = file.descriptor
        while left and self.kernel and descriptor is not None:
            try:
                count = os.copy_file_range(descriptor, out, left, here, there)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                self.kernel = False
                break
            if not count:
                raise EOFError
            here, there, left = here + count, there + count, left - count
        view = self.mover.buffers()[0].data if left else memoryview(b"")
        while left:
            part = view[: min(left, len(view))]
            read_into(file, part, here)
            write_all(out, part, there)
            here, there, left = here + len(part), there + len(part), left - len(part)

    def _cast(self, op: Run, file: Ranges, out: int) -> None:
        assert op.read is not None and op.written is not None
        first, second = self.mover.buffers()
        step = len(first) // max(op.read.itemsize, op.written.itemsize)
        count = op.size // op.read.itemsize
        for at in range(0, count, step):
            part = min(step, count - at)
            data = first[: part * op.read.itemsize]
            read_into(file, data.data, op.source_at + at * op.read.itemsize)
            result = second[: part * op.written.itemsize]
            with np.errstate(all="ignore"):
                result.view(op.written)[...] = data.view(op.read)
            write_all(out, result.data, op.target_at + at * op.written.itemsize)


class Workers:
    """For each thread that asks a `Worker` of its own; a context manager, which closes them."""

    def __init__(self, sources: Sequence[File], jobs: int) -> None:
        self._sources, self._size = sources, buffer_size(jobs)
        self._own, self._all = threading.local(), list[Worker]()

    def mine(self) -> Worker:
        """The calling thread's."""
        if not hasattr(self._own, "worker"):
            self._own.worker = Worker(self._sources, self._size)
            self._all.append(self._own.worker)
        worker: Worker = self._own.worker
        return worker

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._all:
            worker.close()


def _range_of(unit: list[Op]) -> tuple[int, int]:
    """The part of the target that the runs of a unit fill; of no length where it is not one part."""
    runs = [op for op in unit if isinstance(op, Run)]
    if len(runs) < len(unit):
        return 0, 0
    first = runs[0].target_at
    return first, runs[-1].target_at + runs[-1].size - first


def size_of(op: Op) -> int:
    """Bytes that an operation reads."""
    if isinstance(op, Run):
        return op.size
    count = op[1].read.itemsize
    for size in op[1].sizes:
        count *= size
    return count
