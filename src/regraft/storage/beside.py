"""What may be read and copied from a folder of unknown origin: its own regular files, and nothing that links lead to.

Adapters and checkpoints are looked at alike.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from regraft.errors import Finding
from regraft.storage.probe import describe_kind


def check_files(root: Path, paths: Iterable[Path]) -> Iterator[Finding]:
    """What is no regular file of a folder: links that lead out of it or nowhere, pipes, sockets and devices.

    The links of a Hugging Face cache lead from ``snapshots/...`` to its own ``blobs``, and are followed.
    """
    home = Path(os.path.realpath(root))
    allowed = [home, home.parent.parent / "blobs"]
    allowed += [above.parent / "blobs" for above in home.parents if above.name == "snapshots"]
    for path in paths:
        try:
            mode = path.lstat().st_mode
        except OSError:
            continue  # whoever opens it says so
        if not stat.S_ISLNK(mode):
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                yield describe_kind(str(path), mode)
            continue
        to = Path(os.path.realpath(path))
        if not any(to.is_relative_to(place) for place in allowed):
            message = f"it is a link that leads out of the folder, to {to}"
            fix = "replace the link with the file, if it is what you expect"
            yield Finding("link-outside", message, where=str(path), fix=fix)
        elif not path.exists():
            message = f"it is a link to {to}, which does not exist"
            yield Finding("missing-file", message, where=str(path), fix="remove it, or mend it")
        elif not path.is_file() and not path.is_dir():
            yield describe_kind(str(path), path.stat().st_mode)


def mode_like(sources: Iterable[Path]) -> int:
    """The permissions of a new file that tells what is in some files or folders: none that one of them lacks.

    What is not there says nothing.
    """
    mode = 0o666
    for source in sources:
        for path in (source, *source.glob("*"), *source.glob("*/*")):
            with suppress(OSError):
                if path.is_file():
                    mode &= path.stat().st_mode
                elif path == source:
                    # What is in a folder can be read by those who may enter it.
                    mode &= path.stat().st_mode | 0o200
    return mode | 0o600


def write_like(file: Path, text: str, sources: Iterable[Path]) -> None:
    """Write a new file that tells what is in others. Raises ``FileExistsError``, ``OSError``."""
    opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode_like(sources))
    with os.fdopen(opened, "w", encoding="utf-8", newline="\n", errors="replace") as out:
        out.write(text)


def narrow(folder: Path, sources: Iterable[Path], kept: Iterable[Path] = ()) -> None:
    """Give files that were made from others no more permissions than those have, and the folder none that theirs lacks.

    Args:
        folder: the folder with what was made.
        sources: the files that it was made from.
        kept: files in ``folder`` (relative to it) that have their own permissions already.

    Raises ``OSError``.
    """
    files = list(sources)
    allowed = 0o777
    for path in files:
        allowed &= path.stat().st_mode | 0o700
    above = 0o777
    for home in {path.parent for path in files}:
        above &= home.stat().st_mode | 0o700
    apart = {folder / path for path in kept}
    for root, _, names in os.walk(folder):
        for path in [Path(root), *(Path(root, name) for name in names)]:
            if path in apart or path.is_symlink():
                continue
            mode = path.stat().st_mode & 0o777
            wanted = mode & (above if path.is_dir() else allowed)
            if wanted != mode:
                path.chmod(wanted)
