"""Tensors in chunks, as one safetensors file that is nowhere: its bytes are put together as they are asked for.

So a checkpoint whose tensors lie in chunks, in one rank's file or another's, needs no reader of its own: what reads
safetensors by ranges reads it, and exactly the bytes that are asked for are read of the chunks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from regraft.storage.dcp import Chunk, Chunked, chunks_by_file, place_of
from regraft.storage.dtypes import BITS
from regraft.storage.objects import Found
from regraft.storage.probe import open_regular
from regraft.storage.ranges import Ranges, open_ranges
from regraft.storage.stamp import Stamp, changed

Ints = npt.NDArray[np.int64]


class _Runs:
    """A chunk as runs of bytes: all as long, in a row in its file, and each at its own place in the tensor."""

    def __init__(self, chunk: Chunk, shape: tuple[int, ...], item: int, at: int) -> None:
        self.file, self.at = chunk.file, at
        inner = len(shape)
        while inner and (inner == len(shape) or chunk.sizes[inner] == shape[inner]):
            inner -= 1
        self.length = item * prod(chunk.sizes[inner:])
        steps = [item * prod(shape[d + 1 :]) for d in range(len(shape))]
        first = sum(a * b for a, b in zip(chunk.offsets, steps, strict=True))
        starts = np.full(1, first, dtype=np.int64)
        for size, step in zip(chunk.sizes[:inner], steps[:inner], strict=True):
            starts = (starts[:, None] + np.arange(size, dtype=np.int64) * step).reshape(-1)
        self.starts: Ints = starts

    def fill(self, out: npt.NDArray[np.uint8], start: int, file: Ranges) -> None:
        """Fill what is the chunk's of some bytes of the tensor, which begin at ``start``."""
        stop = start + len(out)
        low = int(np.searchsorted(self.starts, start - self.length, side="right"))
        high = int(np.searchsorted(self.starts, stop, side="left"))
        if low >= high or not self.length:
            return
        skipped = max(0, start - int(self.starts[low]))
        over = max(0, int(self.starts[high - 1]) + self.length - stop)
        data = np.empty((high - low) * self.length - skipped - over, np.uint8)
        file.fill([data.data], self.at + low * self.length + skipped)
        done = 0
        for number, at in enumerate(self.starts[low:high].tolist()):
            here = max(at, start)
            size = min(at + self.length, stop) - here
            if number and size == self.length and high - low > 64:
                done = self._middle(out, data, start, low + number, high - (over > 0), done)
                if over:
                    out[int(self.starts[high - 1]) - start :] = data[done:]
                return
            out[here - start : here - start + size] = data[done : done + size]
            done += size

    def _middle(
        self,
        out: npt.NDArray[np.uint8],
        data: npt.NDArray[np.uint8],
        start: int,
        low: int,
        high: int,
        done: int,
    ) -> int:
        """Many whole runs at once."""
        count = high - low
        places = (self.starts[low:high] - start)[:, None] + np.arange(self.length)
        out[places] = data[done : done + count * self.length].reshape(count, self.length)
        return done + count * self.length


class ChunkedFile:
    """A safetensors file that is put together as it is read; what a stand-in may stand for."""

    def __init__(self, folder: Path, tensors: Mapping[str, Chunked], where: str) -> None:
        self._folder, self.where = folder, where
        self._stamps = {name: _stamp(folder / name) for name in chunks_by_file(tensors)}
        self._files: dict[str, Ranges] = {}
        order = sorted(tensors.items(), key=lambda item: -BITS[item[1].dtype])
        self._runs = _runs_of(folder, order)
        sizes = [prod(tensor.shape) * BITS[tensor.dtype] // 8 for _, tensor in order]
        ends = np.cumsum(np.array(sizes, dtype=np.int64))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for (name, tensor), end, size in zip(order, ends.tolist(), sizes, strict=True):
            header[name] = {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "data_offsets": (end - size, end),
            }
        text = msgspec.json.encode(header)
        text += b" " * (-len(text) % 8)
        self.head = len(text).to_bytes(8, "little") + text
        self._ends: Ints = ends + len(self.head)
        self._sizes = sizes
        stamps = repr([(n, s.size, s.modified, s.version) for n, s in self._stamps.items()])
        version = hashlib.sha256(self.head + stamps.encode()).hexdigest()
        self.found = Found("", len(self.head) + sum(sizes), version)

    def read(self, start: int, end: int) -> memoryview:
        """Some of its bytes, which must lie inside.

        Raises ``BadInputError`` where one of the files changed.
        """
        out = np.empty(end - start, np.uint8)
        head = np.frombuffer(self.head, np.uint8)[start:end]
        out[: len(head)] = head
        number = int(np.searchsorted(self._ends, start, side="right"))
        while number < len(self._sizes):
            last, size = int(self._ends[number]), self._sizes[number]
            low, high = max(start, last - size), min(end, last)
            if last - size >= end:
                break
            for runs in self._runs[number] if low < high else ():
                self._fill(runs, out[low - start : high - start], low - (last - size))
            number += 1
        return out.data.toreadonly()

    def _fill(self, runs: _Runs, out: npt.NDArray[np.uint8], start: int) -> None:
        path = self._folder / runs.file
        file = self._files.get(runs.file)
        if file is None:
            file = self._files[runs.file] = open_ranges(path, self._stamps[runs.file])
        try:
            runs.fill(out, start, file)
        except EOFError:
            raise changed(path, "it ended early") from None

    def check(self) -> None:
        """Check that the files are what they were.

        Raises ``BadInputError``.
        """
        for name, stamp in self._stamps.items():
            stamp.check()
            if name in self._files:
                self._files[name].check()

    def close(self) -> None:
        """Close the files that were opened."""
        while self._files:
            self._files.popitem()[1].close()


def _stamp(path: Path) -> Stamp:
    """What a file with chunks is now.

    Raises ``BadInputError`` where it is not there.
    """
    file, _ = open_regular(path)
    with file:
        return Stamp.of(path, file)


def _runs_of(folder: Path, tensors: list[tuple[str, Chunked]]) -> list[list[_Runs]]:
    """The runs of every tensor's chunks; each item of the files is looked into once.

    Raises ``BadInputError``.
    """
    wanted: dict[str, list[tuple[int, Chunk]]] = {}
    for number, (_, tensor) in enumerate(tensors):
        for chunk in tensor.chunks:
            if prod(chunk.sizes):
                wanted.setdefault(chunk.file, []).append((number, chunk))
    runs: list[list[_Runs]] = [[] for _ in tensors]
    for name, chunks in wanted.items():
        path = folder / name
        file, size = open_regular(path)
        with file:
            for number, chunk in sorted(chunks, key=lambda each: each[1].at):
                key, tensor = tensors[number]
                at = chunk.at
                if chunk.is_item:
                    at = place_of(file, size, chunk, tensor.dtype, str(path), key)
                runs[number].append(_Runs(chunk, tensor.shape, BITS[tensor.dtype] // 8, at))
    return runs
