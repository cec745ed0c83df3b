"""From a path to opened adapters, whatever dialect they are in; and to the dialect that is asked for.

    opening = find_source(path, said)      which dialect, which adapters
    for opened in opening: ...             each of them
    Target.of(to, dst)                     what writes, and whether it writes one file

Everything that takes an adapter's path goes through here, so all of it takes every dialect.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from regraft.adapters.protocol import Into, Opened
from regraft.dialects.base import Dialect, Found, dialect_of, dialects
from regraft.dialects.names import SourceName
from regraft.errors import BadInputError, Finding
from regraft.layouts.names import DEFAULT, Layout

if TYPE_CHECKING:
    from regraft.adapters.convert import Converted


@contextmanager
def reopened(dialect: Dialect, source: Opened, result: Converted) -> Iterator[Opened]:
    """A result as its dialect opens it: in memory where it can, otherwise from files that are gone afterwards."""
    in_memory = getattr(dialect, "in_memory", None)
    if in_memory is not None:
        yield in_memory(result)
        return
    with tempfile.TemporaryDirectory(prefix="regraft-") as folder:
        made = Path(folder) / "result"
        made.mkdir()
        dialect.save(made, source, result)
        opened = Opening(made, dialect, dialect.find(made)).one()
        yield opened


_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz")
"""Endings of the name of a file with weights; a folder that is called so is meant as a file."""


class Opening(Struct, frozen=True):
    """The adapters of a path, to be opened one by one."""

    src: Path
    dialect: Dialect
    found: Found
    files: tuple[Path, ...] = ()
    """All files of the adapters."""

    def open(self, folder: Path) -> Opened:
        """One of them. Raises ``BadInputError``, ``RefusedError``, or ``AmbiguousError``."""
        return self.dialect.open(folder, self.found.root, self.found.weights)

    def __iter__(self) -> Iterator[Opened]:
        return map(self.open, self.found.folders)

    def one(self) -> Opened:
        """The only one. Raises ``BadInputError`` where there are several."""
        if len(self.found.folders) > 1:
            folders = ", ".join(str(folder) for folder in self.found.folders[:5])
            message = f"there are {len(self.found.folders)} adapters here: {folders}"
            raise BadInputError(
                Finding("option", message, where=str(self.src), fix="give one of them")
            )
        return self.open(self.found.folders[0])


def find_source(src: Path, said: SourceName | None = None) -> Opening:
    """The adapters of a path, by the dialect that was named or that recognises it.

    Raises ``BadInputError``, ``AmbiguousError`` where several dialects do.
    """
    named = said.dialect if said is not None else None
    dialect = dialect_of(src) if named is None else dialects()[named]
    if said is not None and (said.alpha is not None or said.rank is not None):
        dialect = _told(dialect, src, said)
    found = dialect.find(src)
    if found.weights is not None:
        return Opening(src, dialect, found, (found.weights, *found.beside))
    others = {found.root / path for path in found.others}
    inside = (path for folder in found.folders for path in folder.iterdir())
    own = tuple(path for path in inside if path.is_file() and path not in others)
    return Opening(src, dialect, found, own)


def _told(dialect: Dialect, src: Path, said: SourceName) -> Dialect:
    """A dialect that knows the alpha and rank of its files. Raises ``BadInputError`` for one whose files say them."""
    told = getattr(dialect, "told", None)
    if told is None:
        names = [name for name in dialects() if hasattr(dialects()[name], "told")]
        raise BadInputError(
            Finding(
                "option",
                f"--alpha and --rank are for files that do not say them ({', '.join(names)}), and those of "
                f"{dialect.name} do",
                where=str(src),
                fix='leave them out; for a lower rank use --via svd:RANK (via="svd:RANK")',
            )
        )
    made: Dialect = told(said.alpha, said.rank)
    return made


class Target(Struct, frozen=True):
    """What adapters are written in, and as what."""

    dialect: Dialect
    file: bool
    """Whether the destination is one file."""

    @staticmethod
    def writes(to: Layout, source: Opening) -> Into:
        """The dialect that ``to`` asks for."""
        dialect = dialects()[to.dialect or DEFAULT]
        return Into(dialect, dialect.name == source.dialect.name)

    @staticmethod
    def of(to: Layout, dst: Path) -> Target:
        """What writes ``to`` at a path.

        Raises ``BadInputError`` where the dialect writes no such file, or no folder.
        """
        dialect = dialects()[to.dialect or DEFAULT]
        can = dialect.capabilities
        file = dst.suffix in can.suffixes and not dst.is_dir()
        endings = " or ".join(can.suffixes)
        if not file and not can.folder:
            message = f"{dialect.name} adapters are one file"
            fix = f"name a file that ends in {endings}"
            raise BadInputError(Finding("destination-is-file", message, where=str(dst), fix=fix))
        if not file and dst.suffix in _FILES and not dst.is_dir():
            message = (
                "an adapter is a folder, with its weights and its config, and this is a file's name"
            )
            fix = "name a folder to write" + (
                f", or a file that ends in {endings}" if endings else ""
            )
            raise BadInputError(Finding("destination-is-file", message, where=str(dst), fix=fix))
        return Target(dialect, file)
