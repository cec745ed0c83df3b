"""Noticing that a file changed while it was read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from regraft.errors import BadInputError, Finding


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file as it was at a time."""

    path: Path
    size: int
    """In bytes."""
    changed: int
    """Its modification time, in nanoseconds."""

    @staticmethod
    def of(path: Path) -> Stamp:
        """What a file is now.

        Raises ``OSError``.
        """
        status = path.stat()
        return Stamp(path, status.st_size, status.st_mtime_ns)

    def check(self) -> None:
        """Check that the file is what it was.

        Raises ``BadInputError``.
        """
        try:
            now = Stamp.of(self.path)
        except OSError as error:
            raise changed(self.path, error.strerror or "it is gone") from None
        if now.size != self.size:
            raise changed(self.path, f"it had {self.size} bytes and has {now.size}")
        if now != self:
            raise changed(self.path, "it was written to")


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
