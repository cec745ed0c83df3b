"""A file of a result that is made piece by piece, with a note of what is on disk, from which another run goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from regraft.checkpoints.sharding import OutFile
from regraft.checkpoints.shares import Piece

_SYNC_BYTES, _SYNC_SECONDS = 1 << 28, 5.0
"""How much work may be lost when a process dies."""

Note = Callable[[list[tuple[int, int]]], None]
"""Told which pieces are on disk: of each the file's number and its own."""


class NotedFile:
    """One file; what is `noted` may be many pieces at a time."""

    def __init__(
        self, file: OutFile, missing: Sequence[Piece], reach: Callable[[], int], note: Note
    ) -> None:
        self.file, self.missing, self.out = file, missing, -1
        self._reach, self._note = reach, note
        self._left = len(missing)
        self._finished: list[tuple[int, int]] = []
        self._size, self._since = 0, time.monotonic()

    def open(self) -> Sequence[Piece]:
        """Open it, if anything is missing; the pieces that are to be made."""
        if self.missing:
            self.out = self._reach()
        return self.missing

    def noted(self, piece: Piece) -> None:
        """Note that a piece is done, when it is on disk; the file is closed with its last one."""
        self._left -= 1
        self._finished.append(piece[:2])
        self._size += piece.size
        late = time.monotonic() - self._since > _SYNC_SECONDS
        if not self._left or late or self._size >= _SYNC_BYTES:
            os.fdatasync(self.out) if self._left else os.fsync(self.out)
            self._note(self._finished)
            self._finished, self._size, self._since = [], 0, time.monotonic()
        if not self._left:
            self.close()

    def close(self) -> None:
        """Close it."""
        if self.out >= 0:
            os.close(self.out)
            self.out = -1
