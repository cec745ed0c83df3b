"""Dividing the files of a result among those who make it: into pieces, and pieces into parts of the same size.

A piece is a window of one file. Which pieces there are depends on the result alone, and not on how many parts it is
divided into: a part that died may be done again by more processes, or by fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from regraft.checkpoints.sharding import OutFile
from regraft.storage.scheduler import Share

SMALLEST, LARGEST = 1 << 12, 1 << 26
"""Bytes of a piece."""
WANTED = 512
"""So many pieces a result has at least, if they are not smaller than the smallest then."""


class Piece(NamedTuple):
    """Bytes [start, stop) of one file of a result."""

    file: int
    number: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.stop - self.start


def piece_size(total: int) -> int:
    """Bytes of a piece of a result of so many bytes.

    >>> piece_size(1 << 20), piece_size(1 << 30), piece_size(1 << 40)
    (4096, 2097152, 67108864)
    """
    size = SMALLEST
    while size < LARGEST and size * WANTED < total:
        size *= 2
    return size


def cut(files: Sequence[OutFile], size: int) -> list[Piece]:
    """All pieces of some files, in their order."""
    return [
        Piece(number, k, start, min(start + size, file.size))
        for number, file in enumerate(files)
        for k, start in enumerate(range(0, file.size, size))
    ]


def pieces_of(pieces: Sequence[Piece], share: Share) -> list[Piece]:
    """The pieces of one part. Those of a part follow one another, and all parts have about as many bytes.

    >>> pieces = [Piece(0, k, k * 10, k * 10 + 10) for k in range(10)]
    >>> [len(pieces_of(pieces, Share(i, 3))) for i in range(3)]
    [3, 4, 3]
    """
    total = sum(piece.size for piece in pieces)
    mine, before = [], 0
    for piece in pieces:
        middle = before + piece.size / 2
        if min(int(middle * share.count / total), share.count - 1) == share.number:
            mine.append(piece)
        before += piece.size
    return mine
