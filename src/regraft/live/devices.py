"""Filling tensors on a GPU: threads read parts of files into pinned memory, and copies run beside the reading.

No tensor is ever whole on the host. Each thread has two buffers and a queue (a stream) of its own: while one buffer
is on its way to the device, the next part is read into the other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from regraft.checkpoints.gather import Bytes, Files, Fill, fill_slices
from regraft.checkpoints.source import Tensors
from regraft.planning.slices import Strips
from regraft.planning.windows import cut_strips

CHUNK = 16 << 20
"""Bytes of a buffer; longer ones were no faster, and all threads' buffers together are host memory."""
_SMALLEST = 1 << 20
_MOST_THREADS = 16


class Device(Protocol):
    """What the pipeline needs of a device."""

    def pinned(self, size: int) -> Any:
        """Host memory that the device can copy from by itself; with ``numpy()``."""

    def stream(self) -> Any:
        """A queue of copies, which run in their order."""

    def send(self, stream: Any, buffer: Any, size: int, target: torch.Tensor, at: int) -> Any:
        """Begin to copy a buffer's first bytes into a tensor, from a byte on; returns what can be waited for."""

    def wait(self, event: Any) -> None:
        """Wait for a copy."""

    def finish(self, stream: Any) -> None:
        """Wait for all copies of a queue."""


class CudaDevice:
    """A GPU of torch's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pinned(self, size: int) -> torch.Tensor:
        """Page-locked memory."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def stream(self) -> torch.cuda.Stream:
        """A stream that begins after what allocated the tensors."""
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        return stream

    def send(
        self, stream: Any, buffer: torch.Tensor, size: int, target: torch.Tensor, at: int
    ) -> torch.cuda.Event:
        """An asynchronous copy."""
        flat = target.detach().reshape(-1).view(torch.uint8)
        with torch.cuda.stream(stream):
            flat[at : at + size].copy_(buffer[:size], non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        return event

    def wait(self, event: Any) -> None:
        """Wait for a copy."""
        event.synchronize()

    def finish(self, stream: Any) -> None:
        """Wait for all copies."""
        stream.synchronize()


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A window of a tensor: bytes ``at`` up to ``at + size``, and what they are made of."""

    target: torch.Tensor
    strips: list[Strips]
    at: int
    size: int
    item: int


def chunks_of(
    wanted: Sequence[tuple[torch.Tensor, Sequence[Strips]]], tensors: Tensors, chunk: int
) -> list[Chunk]:
    """Windows of all tensors, in the order in which the files hold what they begin with."""
    found: list[tuple[tuple[int, int], Chunk]] = []
    for target, strips in wanted:
        item = target.element_size()
        total = target.numel()
        step = max(1, chunk // item)
        for start in range(0, total, step):
            stop = min(start + step, total)
            cut = cut_strips(strips, start, stop)
            found.append(
                (
                    _first(cut, tensors),
                    Chunk(target, cut, start * item, (stop - start) * item, item),
                )
            )
    found.sort(key=lambda pair: pair[0])
    return [one for _, one in found]


def _first(strips: Sequence[Strips], tensors: Tensors) -> tuple[int, int]:
    firsts = []
    for one in strips:
        if one.bits:
            continue
        files = tensors.files[one.sources]
        row = int(np.lexsort((tensors.starts[one.sources] + one.source_at, files))[0])
        source = int(one.sources[row])
        firsts.append((int(files[row]), int(tensors.starts[source]) + int(one.source_at[row])))
    return min(firsts, default=(0, 0))


def chunk_size(total: int, jobs: int) -> int:
    """Bytes of a buffer: smaller where there is too little to keep all threads busy.

    >>> chunk_size(1 << 34, 8) == CHUNK, chunk_size(1 << 24, 8) == 1 << 20
    (True, True)
    """
    return int(min(CHUNK, max(_SMALLEST, total // (4 * max(jobs, 1)))))


def fill_device(
    wanted: Sequence[tuple[torch.Tensor, Sequence[Strips]]],
    tensors: Tensors,
    files: Files,
    device: torch.device,
    jobs: int,
    backend: Device | None = None,
    chunk: int | None = None,
) -> int:
    """Fill contiguous tensors on one device; returns how many bytes were read.

    When one thread fails, the others stop after the chunk that they are at, and every copy that has begun is waited
    for, so that nothing writes to the tensors after this returns.

    Raises ``BadInputError`` where a file changed or ended early; what the tensors hold then has no meaning.
    """
    total = sum(target.numel() * target.element_size() for target, _ in wanted)
    jobs = max(1, min(jobs, _MOST_THREADS))
    chunk = chunk or chunk_size(total, jobs)
    work = _Work(chunks_of(wanted, tensors, chunk))
    backend = backend or CudaDevice(device)
    jobs = min(jobs, max(1, len(work.chunks)))
    threads = [
        threading.Thread(
            target=_run,
            args=(work, backend, chunk, tensors, files),
            name=f"regraft-device-{number}",
        )
        for number in range(jobs)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        work.stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        raise
    if work.errors:
        raise work.errors[0]
    return work.read


class _Work:
    """The chunks that are left, for all threads."""

    def __init__(self, chunks: list[Chunk]) -> None:
        self.chunks = chunks
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self.read = 0
        self._lock = threading.Lock()
        self._left: Iterator[Chunk] = iter(chunks)

    def take(self) -> Chunk | None:
        """The next chunk; ``None`` where there is none, or another thread failed."""
        with self._lock:
            return None if self.stop.is_set() else next(self._left, None)

    def add(self, read: int) -> None:
        with self._lock:
            self.read += read

    def fail(self, error: BaseException) -> None:
        with self._lock:
            self.errors.append(error)
        self.stop.set()


def _run(work: _Work, backend: Device, chunk: int, tensors: Tensors, files: Files) -> None:
    """One thread: read into one buffer while the other is on its way."""
    try:
        stream = backend.stream()
        buffers = [backend.pinned(chunk), backend.pinned(chunk)]
        events: list[Any] = [None, None]
        turn = 0
        try:
            while (one := work.take()) is not None:
                if events[turn] is not None:
                    backend.wait(events[turn])
                view: Bytes = buffers[turn].numpy()
                read = fill_slices([Fill(view[: one.size], one.strips, one.item)], tensors, files)
                events[turn] = backend.send(stream, buffers[turn], one.size, one.target, one.at)
                work.add(read)
                turn ^= 1
        finally:
            backend.finish(stream)
    except BaseException as error:
        work.fail(error)
