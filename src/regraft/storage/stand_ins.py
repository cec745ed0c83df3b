"""Files that stand for objects in a store; see `regraft.storage.outline`."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from regraft.storage.positioned import Positioned

if TYPE_CHECKING:
    from regraft.storage.objects import Client, Found

_AFTER_HEAD, _BUFFER = 1 << 16, 1 << 20
"""Bytes that are read at a time, of what begins with a header that is known, and of what is read as a whole."""


class Object(Protocol):
    """What a stand-in may stand for."""

    @property
    def found(self) -> Found:
        """Its size and its version."""

    @property
    def head(self) -> bytes:
        """Its first bytes, as far as they are known."""

    @property
    def where(self) -> str:
        """Its address."""

    def read(self, start: int, end: int) -> memoryview:
        """Some of its bytes, which must lie inside.

        Raises ``BadInputError``.
        """

    def check(self) -> None:
        """Check that it is what it was.

        Raises ``BadInputError``.
        """


class Remote(Struct, frozen=True):
    """An object in a store."""

    client: Client
    found: Found
    head: bytes = b""
    """Its first bytes, as far as they are known."""

    @property
    def where(self) -> str:
        """Its address."""
        return self.client.where(self.found.key)

    def read(self, start: int, end: int) -> memoryview:
        """Some of its bytes, which must lie inside.

        Raises ``BadInputError``.
        """
        if end <= len(self.head):
            return memoryview(self.head)[start:end]
        return self.client.read(self.found, start, end) if end > start else memoryview(b"")

    def check(self) -> None:
        """Every answer of a store is compared with the version that was seen first: nothing is left to check."""


class RemoteFile(Positioned):
    """An object as a file that can be read and sought in."""

    def __init__(self, remote: Object) -> None:
        super().__init__(remote.found.size)
        self._remote = remote

    def at(self, start: int, end: int) -> memoryview:
        """Bytes of its head as far as that goes, which take no request."""
        head = len(self._remote.head)
        return self._remote.read(start, min(end, head) if start < head else end)


STAND_INS: dict[str, Object] = {}
"""What stands for what, by resolved path."""
NAMES: dict[str, str] = {}
"""The addresses of what outlines are of, by the paths that stand for them; what lies deeper comes first."""


def remote_at(path: Path) -> Object | None:
    """What a path stands for; ``None`` for a file of this machine."""
    return STAND_INS.get(os.path.realpath(path)) if STAND_INS else None


def open_remote(remote: Object) -> io.BufferedReader:
    """An object, open to be read."""
    size = _AFTER_HEAD if remote.head else _BUFFER
    return io.BufferedReader(RemoteFile(remote), size)


def named(text: str) -> str:
    """A text in which what stands for something is called by its address."""
    for path, address in NAMES.items():
        text = text.replace(path, address)
    return text
