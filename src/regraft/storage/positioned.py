"""Bytes at a place as a file that can be read and sought in."""

from __future__ import annotations

import io
import os
from typing import Any


class Positioned(io.RawIOBase):
    """A file of a known size; a subclass says how bytes at a place are read (`at`)."""

    def __init__(self, size: int) -> None:
        self._size, self._at = size, 0

    def at(self, start: int, end: int) -> bytes | memoryview:
        """The bytes of a part that is not empty and lies inside, or the first of them."""
        raise NotImplementedError

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where it is read next."""
        return self._at

    def seek(self, to: int, whence: int = os.SEEK_SET) -> int:
        """Go to another place."""
        self._at = max(0, (0, self._at, self._size)[whence] + to)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, as far as there is something."""
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = self.at(self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
