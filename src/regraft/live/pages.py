"""Tensors made of pages of files: a stitched tensor costs a few pages of memory, whatever its size.

A tensor that is stacked from many is a stretch of addresses onto which pages of the old files are mapped, private and
copied on write: what is written to it stays in this process and never reaches a file. Where two pieces meet inside a
page, the second one's bytes are copied onto the first one's page. Linux only.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from regraft.checkpoints.gather import Files, Reads, read_runs
from regraft.names.keys import Ints
from regraft.planning.slices import Strips

PAGE = mmap.PAGESIZE
SMALLEST = 8 * PAGE
"""A piece of fewer bytes is copied sooner than mapped."""
_SPARE = 8192
"""Mappings that are left to the rest of the process: allocators and libraries need some, too."""
_PRIVATE, _FIXED, _ANONYMOUS, _NORESERVE = 0x02, 0x10, 0x20, 0x4000
_READ, _WRITE = 1, 2


def can_map() -> bool:
    """Whether files can be mapped into tensors here."""
    return sys.platform == "linux" and _libc() is not None


@cache
def _libc() -> Any:
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = (
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int64,
        )
    except (OSError, AttributeError):
        return None
    return libc


@dataclass(slots=True)
class Budget:
    """How many mappings this load may still make; the system bounds those of a process (``vm.max_map_count``)."""

    left: int
    short: int = 0
    """Bytes that were copied because there were no more."""

    @staticmethod
    def now() -> Budget:
        """What the system leaves to this process."""
        try:
            limit = int(Path("/proc/sys/vm/max_map_count").read_text())
            with Path("/proc/self/maps").open("rb") as maps:
                used = sum(1 for _ in maps)
        except (OSError, ValueError):
            return Budget(0)
        return Budget(max(0, limit - used - _SPARE))


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """What a tensor is made of, in its order: runs of bytes of files that cover it without gaps."""

    target_at: Ints
    files: Ints
    source_at: Ints
    """From the file's start."""
    sizes: Ints

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def size(self) -> int:
        """In bytes."""
        return int(self.sizes.sum())

    @property
    def residues(self) -> Ints:
        """For each piece where in a page the tensor must begin, so that the piece's pages are the file's."""
        return (self.source_at - self.target_at) % PAGE


def pieces_of(strips: Sequence[Strips], item: int, starts: Ints, files: Ints) -> Pieces | None:
    """The pieces of a slice, joined where they follow one another; ``None`` where they are too short to be mapped.

    ``starts`` and ``files`` are columns of the source's tensors.
    """
    columns = []
    for one in strips:
        if one.bits or one.run * item < SMALLEST:
            return None
        sources, source_at, target_at, run = one.runs()
        columns.append(
            (
                target_at * item,
                files[sources],
                starts[sources] + source_at * item,
                np.full(len(sources), run * item),
            )
        )
    if not columns:
        return None
    target_at, number, source_at, sizes = (np.concatenate(c) for c in zip(*columns, strict=True))
    order = np.argsort(target_at)
    target_at, number, source_at, sizes = (
        column[order] for column in (target_at, number, source_at, sizes)
    )
    fresh = np.ones(len(order), dtype=np.bool_)
    fresh[1:] = (number[1:] != number[:-1]) | (source_at[1:] != source_at[:-1] + sizes[:-1])
    heads = np.flatnonzero(fresh)
    return Pieces(target_at[heads], number[heads], source_at[heads], np.add.reduceat(sizes, heads))


@dataclass(slots=True)
class Stitched:
    """A stretch of addresses that holds a tensor; it is unmapped when nothing refers to it any more."""

    memory: mmap.mmap
    at: int
    """Where the tensor begins."""
    mapped: int = 0
    """Bytes that are a file's pages."""
    copied: int = 0
    """Bytes that are to be read."""
    reads: list[tuple[int, int, int, int]] = field(default_factory=list)
    """What is to be read into it: file, from where, to where in the memory, how many bytes."""


def stitch(pieces: Pieces, item: int, files: Files, budget: Budget) -> Stitched | None:
    """Map a tensor from its pieces, all but what ``read_rest`` reads; ``None`` where that would copy most of it.

    Raises ``BadInputError`` where a file changed.
    """
    residues = pieces.residues
    fitting = residues % item == 0
    if not fitting.any():
        return None
    weights = np.bincount(residues[fitting], pieces.sizes[fitting].astype(np.float64))
    start = int(weights.argmax())
    good = (residues == start) & (pieces.sizes >= SMALLEST)
    if pieces.sizes[good].sum() * 2 < pieces.size:
        return None
    needed = int(good.sum()) + 1
    if needed > budget.left:
        budget.short += pieces.size
        return None
    span = -(-(start + pieces.size) // PAGE) * PAGE
    memory = mmap.mmap(-1, span, _PRIVATE | _ANONYMOUS | _NORESERVE, _READ | _WRITE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    made = Stitched(memory, start)
    budget.left -= needed
    rows = zip(
        (pieces.target_at + start).tolist(),
        pieces.files.tolist(),
        pieces.source_at.tolist(),
        pieces.sizes.tolist(),
        good.tolist(),
        strict=True,
    )
    for number, (at, file, source, size, fits) in enumerate(rows):
        end = at + size
        # The first piece has its first page to itself; any other's belongs to the piece before.
        low = at // PAGE * PAGE if number == 0 else -(-at // PAGE) * PAGE
        high = -(-end // PAGE) * PAGE
        opened = files[file].descriptor
        mappable = fits and low < high and opened is not None
        if mappable and _map(base + low, high - low, opened or 0, source + low - at):
            made.mapped += end - max(low, at)
            end = max(low, at)
        if at < end:
            made.reads.append((file, source, at, end - at))
            made.copied += end - at
    return made


def read_rest(stitched: Sequence[Stitched], files: Files, jobs: int = 1) -> None:
    """Read into stitched tensors what could not be mapped.

    Raises ``BadInputError`` where a file changed or ended early.
    """
    rows = [
        (file, source, number, at, size)
        for number, one in enumerate(stitched)
        for file, source, at, size in one.reads
    ]
    columns = np.array(rows, dtype=np.int64).reshape(-1, 5).T
    read_runs(Reads(*columns), [memoryview(one.memory) for one in stitched], files, jobs)


def _map(address: int, size: int, file: int, at: int) -> bool:
    """Map a part of a file onto an address; whether the system had a mapping left."""
    flags = _PRIVATE | _FIXED
    found = _libc().mmap(address, size, _READ | _WRITE, flags, file, at)
    if found == address:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOMEM, errno.ENODEV, errno.EACCES):
        return False
    raise OSError(code, os.strerror(code))


def prefetch(files: Files, pieces: Sequence[Pieces]) -> None:
    """Ask the system to read ahead exactly what will be needed, where it is not in memory yet."""
    if not hasattr(os, "posix_fadvise") or not pieces:
        return
    columns = zip(*((p.files, p.source_at, p.sizes) for p in pieces), strict=True)
    number, at, sizes = (np.concatenate(parts) for parts in columns)
    order = np.lexsort((at, number))
    number, at, sizes = number[order], at[order], sizes[order]
    fresh = np.ones(len(order), dtype=np.bool_)
    fresh[1:] = (number[1:] != number[:-1]) | (at[1:] != at[:-1] + sizes[:-1])
    heads = np.flatnonzero(fresh)
    totals = np.add.reduceat(sizes, heads)
    for file, start, size in zip(
        number[heads].tolist(), at[heads].tolist(), totals.tolist(), strict=True
    ):
        opened = files[file].descriptor
        if opened is not None and not _is_cached(opened, start, size):
            os.posix_fadvise(opened, start, size, os.POSIX_FADV_WILLNEED)


def _is_cached(file: int, at: int, size: int) -> bool:
    """Whether a few samples of a part of a file are in memory."""
    flag = getattr(os, "RWF_NOWAIT", None)
    if flag is None:
        return False
    byte = bytearray(1)
    samples = min(8, max(1, size >> 24))
    try:
        return all(
            os.preadv(file, [byte], at + (size - 1) * i // samples, flag) == 1
            for i in range(1, samples + 1)
        )
    except OSError:
        return False
