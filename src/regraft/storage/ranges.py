"""Reading parts of a file, here or in a store: one small protocol for everything that moves bytes.

A file of this machine has a descriptor, so that the kernel can copy from it. Of an object in a store parts that lie
near each other come with one request, since a request takes as long as many bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from regraft.storage.stamp import Stamp
from regraft.storage.stand_ins import Object, remote_at

NEAR = 1 << 20
"""Bytes that are read and thrown away rather than asking twice: about what a stream gives in the time of a request."""
MOST = 1 << 24
"""Bytes of one request, about."""


class Ranges(Protocol):
    """An open source; it must stay what it was. Any thread may read."""

    @property
    def descriptor(self) -> int | None:
        """The descriptor of a file of this machine; ``None`` of what is in a store."""

    @property
    def near(self) -> int:
        """Parts with at most so many bytes between them are read together."""

    def fill(self, places: Sequence[memoryview], at: int) -> None:
        """Fill buffers, one after the other, from a place on.

        Raises ``EOFError`` where it ends before they are full, ``BadInputError`` where a store gives no answer.
        """

    def check(self) -> None:
        """Check that it is still what it was.

        Raises ``BadInputError``.
        """

    def close(self) -> None:
        """Close it."""


class LocalRanges(Ranges):
    """A file of this machine."""

    def __init__(self, path: Path, stamp: Stamp) -> None:
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        self._stamp = stamp
        try:
            stamp.check(self._file)
        except BaseException:
            os.close(self._file)
            raise

    @property
    def descriptor(self) -> int | None:
        """Its descriptor."""
        return self._file

    @property
    def near(self) -> int:
        """Only what meets is read together."""
        return 0

    def fill(self, places: Sequence[memoryview], at: int) -> None:
        """Fill buffers, one after the other, from a place on."""
        fill_from(self._file, places, at)

    def check(self) -> None:
        """Check that it is unchanged, and still the one at its path."""
        self._stamp.check(self._file)
        self._stamp.check()

    def close(self) -> None:
        """Close it."""
        with suppress(OSError):
            os.close(self._file)


class RemoteRanges(Ranges):
    """An object in a store. Every answer is of the version that was seen first, or an error."""

    def __init__(self, remote: Object) -> None:
        self._remote = remote

    @property
    def descriptor(self) -> int | None:
        """It has none."""
        return None

    @property
    def near(self) -> int:
        """Parts with at most so many bytes between them are read together."""
        return NEAR

    def fill(self, places: Sequence[memoryview], at: int) -> None:
        """Fill buffers, one after the other, from a place on."""
        total = sum(map(len, places))
        if at + total > self._remote.found.size:
            raise EOFError
        waiting = list(places)
        while total:
            count = min(total, MOST)
            data = self._remote.read(at, at + count)
            at, total = at + count, total - count
            while data:
                first = waiting[0]
                part = min(len(first), len(data))
                first[:part] = data[:part]
                data = data[part:]
                waiting[0] = first[part:]
                if not waiting[0]:
                    waiting.pop(0)

    def check(self) -> None:
        """Check that it is what it was."""
        self._remote.check()

    def close(self) -> None:
        """Nothing is held open."""


def open_ranges(path: Path, stamp: Stamp) -> Ranges:
    """Open a source, which must be what it was when it was stamped.

    Raises ``BadInputError``, or ``OSError`` where it cannot be opened.
    """
    remote = remote_at(path)
    return LocalRanges(path, stamp) if remote is None else RemoteRanges(remote)


def fill_from(file: int, places: Sequence[memoryview], at: int) -> None:
    """Fill buffers, one after the other, from a place of an open file.

    Raises ``EOFError`` where the file ends before they are full.
    """
    waiting = list(places)
    while waiting:
        count = os.preadv(file, waiting, at)
        if not count:
            raise EOFError
        at += count
        full = 0
        while full < len(waiting) and count >= len(waiting[full]):
            count -= len(waiting[full])
            full += 1
        waiting = waiting[full:]
        if count:
            waiting[0] = waiting[0][count:]
