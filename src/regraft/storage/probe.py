"""Opening a file that should be there, and saying what it is when it is something else."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from regraft.errors import BadInputError, Finding
from regraft.storage.formats import form_of_start
from regraft.storage.stand_ins import open_remote, remote_at

_READING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

PROBE_SIZE = 512
"""How many of a file's first bytes `recognize_content` wants to see."""


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """Open a regular file for reading bytes; links to one are followed.

    Returns:
        The open file and its size in bytes.

    Raises:
        BadInputError: the file is missing, is not a regular file or may not be read.
    """
    where = str(path)
    try:
        if (remote := remote_at(path)) is not None:
            return open_remote(remote), remote.found.size
        # A named pipe would block in open, and a device may act on it, so the kind is looked at first.
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise BadInputError(describe_kind(where, mode))
        file = os.fdopen(os.open(path, os.O_RDONLY | _READING), "rb")
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):  # another file took its place
            file.close()
            raise BadInputError(describe_kind(where, status.st_mode))
        return file, status.st_size
    except OSError as error:
        raise BadInputError(_describe_failure(path, error)) from error
    except ValueError as error:
        raise BadInputError(
            Finding("bad-path", f"the path is not valid: {error}", where=ascii(where))
        ) from error


def recognize_content(start: bytes, where: str) -> Finding | None:
    """Recognize what often lies in a file's place, from the file's first bytes.

    Returns:
        The finding to report, or None for content that is none of these.
    """
    if start.startswith(b"version https://git-lfs"):
        return Finding(
            "lfs-pointer",
            "the file is a Git LFS pointer and not the file itself",
            where=where,
            fix="run `git lfs install` and `git lfs pull` in the repository, or download the file",
        )
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return Finding(
            "html-page",
            "the file is an HTML page and not the file itself",
            where=where,
            fix="download it again from its raw link, logged in if the repository is gated",
        )
    if start.startswith(b"PK\x03\x04"):
        return Finding(
            "zip-archive",
            "the file is a zip archive, as torch.save writes, whatever its name says",
            where=where,
            fix="name it adapter_model.bin if torch saved it, or unpack it if the weights are in it",
        )
    form = form_of_start(start)
    return form.finding(where) if form is not None else None


def describe_kind(where: str, mode: int) -> Finding:
    """The finding for what is no regular file."""
    kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
    return Finding("not-a-file", f"expected a file, and this is {kind}", where=where)


def _describe_failure(path: Path, error: OSError) -> Finding:
    where = str(path)
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        if path.is_symlink():
            return Finding(
                "missing-file",
                "the file is a link whose target does not exist",
                where=where,
                fix="download the file again",
            )
        return Finding("missing-file", "the file does not exist", where=where, fix="check the path")
    if isinstance(error, PermissionError):
        return Finding(
            "unreadable-file",
            "the file may not be read",
            where=where,
            fix="give yourself permission to read it",
        )
    return Finding("unreadable-file", f"the file cannot be read: {error.strerror}", where=where)
