"""Noticing that a file changed while it was read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from msgspec import Struct

from regraft.errors import BadInputError, Finding
from regraft.storage.stand_ins import remote_at


class Stamp(Struct, frozen=True):
    """A file as it was at a time."""

    path: Path
    size: int
    """In bytes."""
    modified: int
    """When its content was last written, in nanoseconds; a program may set it back."""
    changed: int
    """When anything about it was last changed, in nanoseconds; no program can set it."""
    identity: tuple[int, int]
    """Its device and its number there: another file under the same name has another."""
    version: str = ""
    """Of what is in a store: its ETag, or what else tells its versions apart; empty for a file of this machine."""

    @staticmethod
    def of(path: Path, file: int | IO[bytes] | None = None) -> Stamp:
        """What a file is now; ``file`` is its descriptor, where it is open.

        Raises ``OSError``.
        """
        remote = remote_at(path)
        if remote is not None:
            return _RemoteStamp(path, remote.found.size, 0, 0, (0, 0), remote.found.version)
        opened = file if file is None or isinstance(file, int) else file.fileno()
        status = path.stat() if opened is None else os.fstat(opened)
        return Stamp(
            path,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            (status.st_dev, status.st_ino),
        )

    def check(self, file: int | IO[bytes] | None = None) -> None:
        """Check that the file is what it was; ``file`` is its descriptor, where it is open.

        Raises ``BadInputError``.
        """
        try:
            now = Stamp.of(self.path, file)
        except OSError as error:
            raise changed(self.path, error.strerror or "it is gone") from None
        if now.size != self.size:
            raise changed(self.path, f"it had {self.size} bytes and has {now.size}")
        if now.identity != self.identity:
            raise changed(self.path, "another file took its place")
        if now != self:
            raise changed(self.path, "it was written to")


class _RemoteStamp(Stamp, frozen=True):
    """What a stand-in stood for."""

    def check(self, file: int | IO[bytes] | None = None) -> None:
        """Let what it stands for say whether it is the same."""
        remote = remote_at(self.path)
        if remote is None or remote.found.version != self.version:
            raise changed(self.path, "another file took its place")
        remote.check()


def changed(path: Path, how: str) -> BadInputError:
    """The error for a source that changed meanwhile."""
    return BadInputError(
        Finding(
            "file-changed",
            f"the file changed while it was read: {how}",
            where=str(path),
            fix="run again when nothing else writes to it",
        )
    )
