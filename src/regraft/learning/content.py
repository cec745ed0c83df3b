"""The tensors of a file as bits, to compare and to search in; nothing is read before it is used."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from regraft.checkpoints.source import is_checkpoint, open_checkpoint
from regraft.checkpoints.tiles import read_into
from regraft.dialects.opening import find_source
from regraft.storage.dtypes import DTYPES, match_dtype
from regraft.storage.stamp import changed
from regraft.storage.weights import File, open_source

Bits = npt.NDArray[Any]
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(slots=True)
class Held:
    """What was read last of some files, as long as it is not too much."""

    most: int
    """In bytes."""
    held: OrderedDict[tuple[Path, int], Bits] = field(default_factory=OrderedDict)
    """By file and place."""
    size: int = 0

    def bytes_of(self, place: Place) -> Bits:
        """The bytes of a tensor, read where they are not at hand.

        Raises ``BadInputError`` where the file is not what it was.
        """
        key = place.file.path, place.start
        if key in self.held:
            self.held.move_to_end(key)
            return self.held[key]
        data = place.read()
        if not place.size:  # empty tensors may begin where others do
            return data
        self.held[key] = data
        self.size += place.size
        while self.size > self.most:
            _, gone = self.held.popitem(last=False)
            self.size -= gone.size
        return data


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in a file. It is read, never mapped: a mapped file that becomes shorter ends the process."""

    file: File
    start: int
    size: int
    held: Held

    def read(self) -> Bits:
        """The bytes.

        Raises ``BadInputError`` where the file is not what it was.
        """
        data = np.empty(self.size, np.uint8)
        opened = open_source(self.file)
        try:
            read_into(opened, data.data, self.start)
        except EOFError:
            raise changed(self.file.path, "it ended early") from None
        finally:
            opened.close()
        return data

    def digest(self) -> bytes:
        """A hash of the bytes, which are read in parts.

        Raises ``BadInputError`` where the file is not what it was.
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
        bits: Bits | Place,
    ) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self._bits = bits

    @property
    def bits(self) -> Bits:
        """Its bits; those of a large file are read when they are asked for, and not kept by the tensor.

        Raises ``BadInputError`` where the file is not what it was.
        """
        if not isinstance(self._bits, Place):
            return self._bits
        flat = _aligned(self._bits.held.bytes_of(self._bits), _word(self.dtype))
        return flat.reshape(self.bits_shape)

    @property
    def bits_shape(self) -> tuple[int, ...]:
        """The shape of its bits: its own, or their number where elements have no words of their own."""
        if not isinstance(self._bits, Place):
            return self._bits.shape
        item = _word(self.dtype).itemsize
        count = self._bits.size // (item if self._bits.size % item == 0 else 1)
        return self.shape if count == prod(self.shape) else (count,)

    @property
    def size(self) -> int:
        """How many words its bits are."""
        return prod(self.bits_shape)

    @property
    def whole(self) -> bool:
        """Whether every element has words of its own; types below a byte are packed."""
        return self.bits_shape == self.shape

    @property
    def typed(self) -> Bits:
        """The elements in their own type; as bits where that has no elements of its own."""
        return self.bits.view(self.held_as)

    @property
    def held_as(self) -> np.dtype[Any]:
        """The type of `typed`."""
        if self.whole:
            return np.dtype(DTYPES[self.dtype].numpy)
        return self.bits.dtype

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

        Raises ``BadInputError`` where the file is not what it was.
        """
        return self._bits.digest() if isinstance(self._bits, Place) else digest(self._bits)

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
    held = Held(_KEPT)
    whole = _small_files(source.files)
    tensors: dict[str, Tensor] = {}
    table = source.tensors
    for row, name in enumerate(table.names):
        start, size, number = int(table.starts[row]), int(table.sizes[row]), int(table.files[row])
        dtype, shape = table.dtypes[row], tuple(table.shapes[row])
        bits: Bits | Place
        if number in whole:
            flat = _aligned(whole[number][start : start + size], _word(dtype))
            bits = flat.reshape(shape) if flat.size == prod(shape) else flat
        else:
            bits = Place(source.files[number], start, size, held)
        tensors[name] = Tensor(name, dtype, shape, bits)
    return Content("checkpoint", source.where, tensors)


_LARGEST = 1 << 27
"""Bytes of files that are read as a whole."""
_KEPT = 1 << 26
"""Bytes of tensors of the other files that are kept: the same are often read again soon."""


def _small_files(files: Sequence[File]) -> dict[int, Bits]:
    """The bytes of the first files by number, as long as together they are not large.

    Raises ``BadInputError`` where one is not the file any more whose header was read.
    """
    read: dict[int, Bits] = {}
    total = 0
    for number, file in enumerate(files):
        total += file.size
        if total > _LARGEST:
            break
        read[number] = Place(file, 0, file.size, Held(0)).read()
    return read


def _word(dtype: str) -> np.dtype[Any]:
    """The unsigned integers that elements of a type are taken for; bytes where these are no whole ones."""
    bits = DTYPES[dtype].bits
    return np.dtype(_WORDS.get(bits // 8, np.uint8) if bits % 8 == 0 else np.uint8)


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
