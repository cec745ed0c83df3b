"""Reading strips of files into memory: the bytes reader of slices.

Long runs are read where they belong; those that follow one another in a file are read together, into as many places
as there are. Strips without long runs (a transpose) are read in tiles and turned in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, pairwise
from math import prod
from operator import not_
from typing import Protocol

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from regraft.arrays.transpose import copy_strided
from regraft.checkpoints.source import Tensors
from regraft.checkpoints.tiles import has_gaps, measure_side, parts_of, read_into, tile_of
from regraft.names.keys import Ints
from regraft.planning.slices import Strips
from regraft.storage.ranges import MOST, Ranges
from regraft.storage.stamp import changed
from regraft.storage.threads import Pool
from regraft.storage.weights import File, open_source
from regraft.values import replace

Bytes = npt.NDArray[np.uint8]

_GATHERED = 512
"""Runs of fewer bytes are read together with what lies between them."""
_READ = 1 << 24
"""Bytes of one read, about: enough for the disk, and small enough to be shared among threads."""
_SHORT = 1 << 18
"""Reads of fewer bytes are done by the thread that shares them out."""
_PLACES = 512
"""Places of one read; the system allows 1024."""
_TILE = 1 << 20
"""Bytes of a tile."""
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Files:
    """The files of a checkpoint, open; each must be what it was when its header was read.

    Any thread may ask. Close it, or use it as a context manager.
    """

    def __init__(self, sources: Sequence[File]) -> None:
        self.sources = sources
        self._open: dict[int, Ranges] = {}
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> Ranges:
        """A file, open.

        Raises ``BadInputError`` where the file changed.
        """
        with self._lock:
            if number not in self._open:
                source = self.sources[number]
                try:
                    self._open[number] = open_source(source)
                except OSError as error:
                    raise changed(source.path, error.strerror or "it is gone") from None
            return self._open[number]

    def near(self, number: int) -> int:
        """Parts of a file with at most so many bytes between them are read together."""
        return self[number].near

    def check(self) -> None:
        """Check that every file that was read is still the one at its path, and unchanged.

        Raises ``BadInputError``.
        """
        for opened in self._open.values():
            opened.check()

    def close(self) -> None:
        """Close all of them."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True, eq=False)
class Fill:
    """A slice to fill: its bytes in memory, and the strips that it is made of."""

    view: Bytes
    strips: Sequence[Strips]
    item: int
    """Bytes of an element."""

    @property
    def is_padded(self) -> bool:
        """Whether the strips leave elements out, which are zero then."""
        return covered(self.strips) * self.item < self.view.nbytes


def covered(strips: Sequence[Strips]) -> int:
    """How many elements some strips fill."""
    return sum(len(one) * prod(one.sizes) for one in strips)


@dataclass(frozen=True, slots=True, eq=False)
class Reads:
    """Runs of bytes, one a row, in the order of the files."""

    files: Ints
    source_at: Ints
    """From the file's start."""
    fills: Ints
    """The number of the slice."""
    target_at: Ints
    """From the slice's start."""
    sizes: Ints

    def __len__(self) -> int:
        return len(self.files)

    def groups(self, near: Callable[[int], int] | None = None) -> Iterator[range]:
        """Rows to be read at once: they follow one another in a file, with at most ``near(file)`` bytes between."""
        if not len(self):
            return
        apart = self.source_at[1:] - self.source_at[:-1] - self.sizes[:-1]
        most = np.zeros(len(apart), dtype=np.int64)
        if near is not None:
            numbers, rows = np.unique(self.files[1:], return_inverse=True)
            most = np.array([near(number) for number in numbers.tolist()], dtype=np.int64)[rows]
        # Bytes that are wanted at two places overlap: they are read once where what lies between could be, too.
        follows = (
            (self.files[1:] == self.files[:-1]) & (apart <= most) & ((apart >= 0) | (most > 0))
        )
        breaks = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(self)]
        ends = np.cumsum(
            self.sizes + np.concatenate([[0], np.maximum(np.where(follows, apart, 0), 0)])
        )
        for first, last in pairwise(breaks):
            if last - first == 1:
                yield range(first, last)
                continue
            start = first
            while start < last:
                done = int(ends[start - 1]) if start else 0
                stop = int(np.searchsorted(ends, done + _READ, side="right"))
                stop = min(max(stop, start + 1), start + _PLACES, last)
                yield range(start, stop)
                start = stop


def long_runs(strips: Strips, item: int) -> bool:
    """Whether some strips are read run by run."""
    return strips.run == prod(strips.sizes) or strips.run * item >= _GATHERED


def reads_of(fills: Sequence[Fill], tensors: Tensors) -> tuple[Reads, list[tuple[int, Strips]]]:
    """The runs that fill some slices, and for those that have no long ones each place by itself."""
    columns: list[tuple[Ints, Ints, Ints, Ints, Ints]] = []
    tiled: list[tuple[int, Strips]] = []
    for number, fill in enumerate(fills):
        for strips in fill.strips:
            if strips.bits:
                continue
            if not long_runs(strips, fill.item):
                rows = np.arange(len(strips))
                tiled += [(number, strips.take(rows[i : i + 1])) for i in rows.tolist()]
                continue
            sources, source_at, target_at, run = strips.runs()
            start = tensors.starts[sources] + source_at * fill.item
            columns.append(
                (
                    tensors.files[sources],
                    start,
                    np.full(len(sources), number),
                    target_at * fill.item,
                    np.full(len(sources), run * fill.item),
                )
            )
    none = np.zeros(0, dtype=np.int64)
    joined = [np.concatenate([none, *parts]) for parts in zip(*columns, strict=True)]
    reads = Reads(*joined) if joined else Reads(none, none, none, none, none)
    return _ordered(_split(reads)), tiled


def _split(reads: Reads) -> Reads:
    """Long runs in parts, so that threads can share them."""
    counts = np.maximum(1, -(-reads.sizes // _READ))
    if not len(reads) or counts.max() == 1:
        return reads
    rows = np.repeat(np.arange(len(reads)), counts)
    part = (np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)) * _READ
    return Reads(
        reads.files[rows],
        reads.source_at[rows] + part,
        reads.fills[rows],
        reads.target_at[rows] + part,
        np.minimum(_READ, reads.sizes[rows] - part),
    )


def _ordered(reads: Reads) -> Reads:
    order = np.lexsort((reads.source_at, reads.files))
    return Reads(
        reads.files[order],
        reads.source_at[order],
        reads.fills[order],
        reads.target_at[order],
        reads.sizes[order],
    )


def fill_slices(
    fills: Sequence[Fill],
    tensors: Tensors,
    files: Files,
    jobs: int = 1,
    stop: threading.Event | None = None,
) -> int:
    """Read everything that fills some slices; returns how many bytes were read.

    Raises:
        BadInputError: a file changed, or ended early. What is in the slices then has no meaning.
    """
    for fill in fills:
        if fill.is_padded:
            fill.view[...] = 0
        for strips in fill.strips:
            if strips.bits:
                _put_constant(strips, fill.view)
    reads, tiled = reads_of(fills, tensors)
    views = [fill.view.data for fill in fills]
    tiles = [_Tiles(fills[number], strips, tensors, files) for number, strips in tiled]
    return _run([*_scatters(reads, views, files), *tiles], jobs, stop)


def read_runs(reads: Reads, views: Sequence[memoryview], files: Files, jobs: int = 1) -> int:
    """Read runs, in any order, into some buffers; returns how many bytes were read.

    Raises ``BadInputError`` where a file changed, or ended early.
    """
    return _run(list(_scatters(_ordered(_split(reads)), views, files)), jobs)


def _scatters(reads: Reads, views: Sequence[memoryview], files: Files) -> Iterator[_Scatter]:
    columns = (reads.files, reads.source_at, reads.fills, reads.target_at, reads.sizes)
    numbers, starts, fills, places, sizes = (column.tolist() for column in columns)
    for rows in reads.groups(files.near):
        number, size = numbers[rows.start], sum(sizes[rows.start : rows.stop])
        parts = [
            (starts[row], views[fills[row]][places[row] : places[row] + sizes[row]]) for row in rows
        ]
        # Of what is far away no read is short.
        short = size < _SHORT and files[number].descriptor is not None
        yield _Scatter(files, number, parts, short)


def _run(tasks: Sequence[_Task], jobs: int, stop: threading.Event | None = None) -> int:
    """Do all of them with so many threads; when one fails, none is begun any more."""
    stop = stop or threading.Event()

    def run(task: _Task) -> int:
        if stop.is_set():
            return 0
        try:
            return task()
        except BaseException:
            stop.set()
            raise

    if jobs == 1 or len(tasks) < 2:
        return sum(run(task) for task in tasks)
    with Pool(jobs, "regraft-read") as pool:
        # Short ones are more of Python than of reading: threads would only wait for one another.
        short = [task.is_short for task in tasks]
        shared = pool.map(run, compress(tasks, map(not_, short)))
        return sum(map(run, compress(tasks, short))) + sum(shared)


def _put_constant(strips: Strips, view: Bytes) -> None:
    """Write what padding holds into a slice's bytes."""
    word = np.dtype(f"V{len(strips.bits)}")
    flat, value = view.view(word), np.frombuffer(strips.bits, word)[0]
    steps = [step * word.itemsize for step in strips.target_strides]
    for at in strips.target_at.tolist():
        as_strided(flat[at:], strips.sizes, steps)[...] = value


class _Task(Protocol):
    """Something to read."""

    @property
    def is_short(self) -> bool:
        """Whether it is sooner done than handed to another thread."""

    def __call__(self) -> int:
        """Read it; returns how many bytes were read."""


@dataclass(frozen=True, slots=True)
class _Scatter:
    """One part of a file that goes to one place or several."""

    files: Files
    number: int
    """Of the file."""
    places: Sequence[tuple[int, memoryview]]
    """From where in the file, and to where."""
    is_short: bool

    def __call__(self) -> int:
        places = self.places
        follow = all(at + len(view) == after for (at, view), (after, _) in pairwise(places))
        return _read_scattered(self.files, self.number, places, whole=follow)


def _read_scattered(
    files: Files, number: int, places: Sequence[tuple[int, memoryview]], *, whole: bool
) -> int:
    """Fill some buffers from one part of a file, each from its own place; returns how many bytes were read.

    ``whole`` says that they follow one another without anything between them.

    Raises ``BadInputError`` where the file ends before they are full.
    """
    file, at = files[number], places[0][0]
    try:
        if whole:
            file.fill([view for _, view in places], at)
            return sum(len(view) for _, view in places)
        end = max(start + len(view) for start, view in places)
        data = np.empty(end - at, np.uint8)
        file.fill([data.data], at)
        for start, view in places:
            view[:] = data.data[start - at : start - at + len(view)]
        return len(data)
    except EOFError:
        raise changed(files.sources[number].path, "it ended early") from None


@dataclass(frozen=True, slots=True)
class _Tiles:
    """A nest of short runs, at one place."""

    fill: Fill
    strips: Strips
    tensors: Tensors
    files: Files

    @property
    def is_short(self) -> bool:
        """Never: it has many short reads."""
        return False

    def __call__(self) -> int:
        strips, item = self.strips, self.fill.item
        source = int(strips.sources[0])
        number = int(self.tensors.files[source])
        base = int(self.tensors.starts[source]) + int(strips.source_at[0]) * item
        file = self.files[number]
        read = gather_tiles if file.descriptor is not None else gather_whole
        try:
            target = self.fill.view[int(strips.target_at[0]) * item :]
            return read(strips, item, file, base, target)
        except EOFError:
            raise changed(self.files.sources[number].path, "it ended early") from None


def gather_tiles(strips: Strips, item: int, file: Ranges, base: int, target: Bytes) -> int:
    """Read one nest in tiles; its first element is at ``base`` in the file and at the target's beginning.

    Returns how many bytes were read. Raises ``EOFError`` where the file ends early.
    """
    sizes, there, here = strips.sizes, strips.source_strides, strips.target_strides
    loose = has_gaps(sizes, there, item)
    word = np.dtype(_WORDS[item])
    words = target[: len(target) // item * item].view(word)
    count = 0
    for part, start in parts_of(sizes, tile_of(sizes, there, here, _TILE // item)):
        side = measure_side(part, there, gaps=loose)
        at = base + item * sum(i * step for i, step in zip(start, there, strict=True))
        data = np.empty(side.length * item, np.uint8)
        length = side.span * item
        for row, segment in enumerate(side.segments):
            view = data.data[row * length : (row + 1) * length]
            read_into(file, view, at + segment * item)
        to = words[sum(i * step for i, step in zip(start, here, strict=True)) :]
        copy_strided(
            as_strided(to, part, [step * item for step in here]),
            as_strided(data.view(word), part, [step * item for step in side.strides]),
        )
        count += len(data)
    return count


def gather_whole(strips: Strips, item: int, file: Ranges, base: int, target: Bytes) -> int:
    """What `gather_tiles` does, with everything that lies between: for sources of which a request takes long.

    What the outermost loop of the source steps over is read in parts of at most ``MOST`` bytes, or one step.
    """
    sizes, there, here = strips.sizes, strips.source_strides, strips.target_strides
    word = np.dtype(_WORDS[item])
    words = target[: len(target) // item * item].view(word)
    outer = max(range(len(sizes)), key=lambda i: there[i])
    inner = 1 + sum((sizes[i] - 1) * there[i] for i in range(len(sizes)) if i != outer)
    step = max(1, (MOST // item - inner) // max(there[outer], 1) + 1)
    count = 0
    for start in range(0, sizes[outer], step):
        part = tuple(min(step, n - start) if i == outer else n for i, n in enumerate(sizes))
        span = inner + (part[outer] - 1) * there[outer]
        data = np.empty(span * item, np.uint8)
        file.fill([data.data], base + start * there[outer] * item)
        copy_strided(
            as_strided(words[start * here[outer] :], part, [s * item for s in here]),
            as_strided(data.view(word), part, [s * item for s in there]),
        )
        count += len(data)
    return count


def byte_runs(strips: Sequence[Strips], tensors: Tensors, item: int) -> list[tuple[int, int, int]]:
    """Which bytes of which files some strips read: file, from where, how many; in order, joined where they meet."""
    columns: list[tuple[Ints, Ints, Ints]] = []
    for one in strips:
        if one.bits:
            continue
        dense = _by_source(one)
        sources, source_at, _, run = dense.runs()
        start = tensors.starts[sources] + source_at * item
        columns.append((tensors.files[sources], start, start + run * item))
    if not columns:
        return []
    files, starts, ends = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    files, starts, ends = np.unique(np.stack([files, starts, ends]), axis=1)
    fresh = np.ones(len(files), dtype=np.bool_)
    fresh[1:] = (files[1:] != files[:-1]) | (starts[1:] != ends[:-1])
    heads = np.flatnonzero(fresh)
    last = np.append(heads[1:], len(files)) - 1
    sizes = ends[last] - starts[heads]
    return list(zip(files[heads].tolist(), starts[heads].tolist(), sizes.tolist(), strict=True))


def _by_source(strips: Strips) -> Strips:
    """The same elements in the order of the source, as if the target had that order, too; copies of one once."""
    loops = (i for i, step in enumerate(strips.source_strides) if step)
    order = sorted(loops, key=lambda i: -strips.source_strides[i])
    sizes: list[int] = []
    strides: list[int] = []
    for i in order:
        size, step = strips.sizes[i], strips.source_strides[i]
        if sizes and strides[-1] == size * step:
            sizes[-1], strides[-1] = sizes[-1] * size, step
        else:
            sizes.append(size)
            strides.append(step)
    same = tuple(strides)
    return replace(strips, sizes=tuple(sizes), source_strides=same, target_strides=same)
