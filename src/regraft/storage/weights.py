"""A file of weights, safetensors or torch's: what its header says, and the file as it was then."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from regraft.storage.header import TensorInfo, read_header
from regraft.storage.probe import open_regular
from regraft.storage.ranges import Ranges, open_ranges
from regraft.storage.stamp import Stamp
from regraft.storage.training import KEY, left_words

OF_TORCH = (".bin", ".pt", ".pth", ".ckpt")
"""How torch's files end."""


class File(Struct, frozen=True):
    """One file of a checkpoint, as it was when its header was read."""

    path: Path
    name: str
    stamp: Stamp
    """What it should still be."""
    metadata: Mapping[str, str]
    data_start: int
    """Where the data begins; 0 where there is no such place."""

    @property
    def size(self) -> int:
        """In bytes."""
        return self.stamp.size


def open_source(file: File) -> Ranges:
    """Open a source file, which must be what it was when its header was read.

    Raises ``BadInputError``.
    """
    return open_ranges(file.path, file.stamp)


def read_file(path: Path) -> tuple[File, Mapping[str, TensorInfo], list[str]]:
    """A file of weights, its tensors by name, and what is to be said of it.

    Raises ``BadInputError``.
    """
    file, _ = open_regular(path)
    with file:
        stamp = Stamp.of(path, file)
    notes: list[str] = []
    tensors: Mapping[str, TensorInfo]
    if path.suffix in OF_TORCH:
        from regraft.storage.torch_file import read_run

        tensors, left = read_run(path, KEY.get())
        notes += [left_words(left)] if left else []
        metadata: Mapping[str, str] = {"format": "pt"}
        data_start = 0
    else:
        header = read_header(path)
        tensors, metadata, data_start = header.tensors, header.metadata, header.data_start
    stamp.check()
    return File(path, path.name, stamp, metadata, data_start), tensors, notes
