"""The tensors of a file as bits, to compare and to search in; nothing is read before it is used."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from regraft.checkpoints.engine import open_source
from regraft.checkpoints.source import File, is_checkpoint, open_checkpoint
from regraft.checkpoints.tiles import read_into
from regraft.dialects.opening import find_source
from regraft.storage.dtypes import DTYPES, match_dtype
from regraft.storage.stamp import changed

Bits = npt.NDArray[Any]
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in a file that is mapped."""

    file: File
    start: int
    size: int

    def digest(self) -> bytes:
        """A hash of the bytes. They are read in parts: mapped ones would all stay in memory.

        Raises ``BadInputError`` where the file became shorter.
        """
        made = hashlib.blake2b(digest_size=16)
        part = np.empty(min(_PART, self.size), np.uint8)
        opened = open_source(self.file)
        try:
            for at in range(0, self.size, _PART):
                read = part[: min(_PART, self.size - at)]
                read_into(opened, read.data, self.start + at)
                made.update(read.data)
        except EOFError:
            raise changed(self.file.path, "it ended early") from None
        finally:
            opened.close()
        return made.digest()


class Tensor:
    """One tensor: its bits as unsigned integers in its shape."""

    def __init__(
        self,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        bits: Bits,
        place: Place | None = None,
    ) -> None:
        self.name, self.dtype, self.shape, self.bits = name, dtype, shape, bits
        self.place = place

    @property
    def whole(self) -> bool:
        """Whether every element has words of its own; types below a byte are packed."""
        return self.bits.shape == self.shape

    @property
    def typed(self) -> Bits:
        """The elements in their own type; as bits where that has no elements of its own."""
        return self.bits.view(DTYPES[self.dtype].numpy) if self.whole else self.bits

    def has_nan(self) -> bool:
        """Whether some of its numbers are none."""
        typed = self.typed
        if not self.whole or typed.dtype.kind not in "fV" or not typed.size:
            return False
        flat = typed.reshape(-1)
        return any(bool(np.isnan(flat[n : n + _PART]).any()) for n in range(0, flat.size, _PART))

    def value(self, bits: Any) -> float:
        """The number that some bits are."""
        return float(np.array([bits], self.bits.dtype).view(DTYPES[self.dtype].numpy)[0])

    @cached_property
    def digest(self) -> bytes:
        """A hash of the bits in order.

        Raises ``BadInputError`` where the file became shorter.
        """
        return digest(self.bits) if self.place is None else self.place.digest()

    @property
    def look(self) -> tuple[str, tuple[int, ...], bytes]:
        """What equal tensors share."""
        return self.dtype, self.shape, self.digest


def digest(bits: Bits) -> bytes:
    """A hash of an array's elements, row major."""
    made = hashlib.blake2b(digest_size=16)
    if bits.ndim < 2 or bits.flags.c_contiguous:
        made.update(np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data)
        return made.digest()
    # A copy of a part at a time: what is turned has no bytes in order.
    step = max(1, _PART * len(bits) // max(1, bits.size))
    for start in range(0, len(bits), step):
        part = np.ascontiguousarray(bits[start : start + step])
        made.update(part.reshape(-1).view(np.uint8).data)
    return made.digest()


_PART = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """All tensors of a checkpoint or an adapter, by name."""

    kind: str
    """``checkpoint`` or ``adapter``."""
    where: str
    tensors: Mapping[str, Tensor]


def open_content(path: Path) -> Content:
    """Open a checkpoint or one adapter.

    Raises ``BadInputError``.
    """
    if not is_checkpoint(path):
        adapter = find_source(path).one()
        return Content("adapter", adapter.where, content_of(adapter.tensors, adapter.where))
    source = open_checkpoint(path)
    maps: list[Any] = []
    for file in source.files:
        maps.append(_bytes_of(file))
    mapped = {number for number, data in enumerate(maps) if isinstance(data, mmap.mmap)}
    tensors: dict[str, Tensor] = {}
    table = source.tensors
    for row, name in enumerate(table.names):
        start, size = int(table.starts[row]), int(table.sizes[row])
        dtype, shape = table.dtypes[row], tuple(table.shapes[row])
        bits = DTYPES[dtype].bits
        word = np.dtype(_WORDS.get(bits // 8, np.uint8) if bits % 8 == 0 else np.uint8)
        # A slice of a map is a copy; frombuffer reads nothing.
        data = np.frombuffer(maps[int(table.files[row])], np.uint8, size, start) if size else None
        flat = np.zeros(0, word) if data is None else _aligned(data, word)
        full = flat.size == int(np.prod(shape, dtype=np.int64))
        number = int(table.files[row])
        place = Place(source.files[number], start, size) if number in mapped else None
        tensors[name] = Tensor(name, dtype, shape, flat.reshape(shape) if full else flat, place)
    return Content("checkpoint", source.where, tensors)


_LARGEST = 1 << 27
"""Bytes of a file that are read as a whole."""


def _bytes_of(file: File) -> Any:
    """A file's bytes. A large file is mapped, and must stay as it is.

    Raises ``BadInputError`` where it is not the file any more whose header was read.
    """
    opened = open_source(file)
    try:
        if file.size > _LARGEST and opened.descriptor is not None:
            return mmap.mmap(opened.descriptor, 0, access=mmap.ACCESS_READ)
        data = np.empty(file.size, np.uint8)
        try:
            read_into(opened, data.data, 0)
        except EOFError:
            file.stamp.check()
            raise
        return data
    finally:
        opened.close()


def _aligned(data: Bits, word: np.dtype[Any]) -> Bits:
    return data.view(word) if data.size % word.itemsize == 0 else data


def content_of(arrays: Mapping[str, Bits], where: str) -> dict[str, Tensor]:
    """Arrays in memory as tensors."""
    result = {}
    for name, array in arrays.items():
        word = np.dtype(_WORDS.get(array.dtype.itemsize, np.uint8))
        bits = np.ascontiguousarray(array).reshape(-1).view(word)
        whole = bits.size == array.size
        dtype = match_dtype(array.dtype, where=where, key=name).name
        result[name] = Tensor(
            name, dtype, array.shape, bits.reshape(array.shape) if whole else bits
        )
    return result
