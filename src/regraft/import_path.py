"""Keeping folders in which anyone's files may lie off Python's import path.

A checkpoint is often converted from inside its folder, or from a folder of downloads. Python puts the current folder
on its import path in several cases (``python -m``, ``python -c``, an empty entry in ``PYTHONPATH``), and a file
``random.py`` there would run as code.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_HOME = Path(__file__).resolve().parents[1]
"""Where regraft was imported from, and so are other packages; it stays on the path."""


def import_path() -> list[str]:
    """The import path without the folders that are on it by chance, in which anyone's files may lie.

    These are the current folder and that of the running script; and relative and empty entries, which mean the current
    folder. The folder that regraft itself came from is kept.
    """
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    chance = [Path.cwd()] + ([Path(main).parent] if isinstance(main, str) else [])
    return clean_path(sys.path, chance)


def clean_path(entries: Sequence[str], without: Sequence[Path]) -> list[str]:
    """Entries of an import path that are absolute and none of some folders."""
    home = os.path.realpath(_HOME)
    unwanted = {os.path.realpath(folder) for folder in without} - {home}
    return [
        entry
        for entry in entries
        if isinstance(entry, str)
        and Path(entry).is_absolute()
        and os.path.realpath(entry) not in unwanted
    ]


def entry_points_of(group: str) -> Iterable[EntryPoint]:
    """The entry points of a group, of all installed packages.

    ``importlib.metadata`` is imported only where a package has some: its import takes longer than this look.
    """
    if not any(_declares(Path(entry), f"[{group}]") for entry in sys.path):
        return ()
    from importlib.metadata import entry_points

    return entry_points(group=group)


def _declares(folder: Path, section: str) -> bool:
    """Whether a package in a folder of the import path has a section of entry points."""
    try:
        if folder.is_file():
            return True  # a zip file, which only importlib.metadata reads
        return any(section in text for text in _entry_points_in(folder))
    except OSError:
        return False


@lru_cache(maxsize=64)
def _entry_points_in(folder: Path) -> tuple[str, ...]:
    """What the packages in a folder say of their entry points, read once for all groups; none where it is none."""
    texts = []
    for package in folder.iterdir():
        if package.suffix in (".dist-info", ".egg-info"):
            with suppress(OSError, UnicodeDecodeError):
                texts.append((package / "entry_points.txt").read_text(encoding="utf-8"))
    return tuple(texts)


def leave_current_folder() -> None:
    """Take the current folder off this process's import path."""
    sys.path[:] = clean_path(sys.path, [Path.cwd()])
