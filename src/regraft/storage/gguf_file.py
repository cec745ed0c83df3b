"""The head of a GGUF file: its fields, and where its tensors are.

The reader of the package gguf maps the whole file, so that a file that shrinks meanwhile kills the process, and makes
an object of every entry of every list, so that 10 MB of numbers take a gigabyte. Here lists are passed over, and
tensors are left where they are. Source: ``docs/gguf.md`` of ggml.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

from msgspec import Struct

MAGIC = b"GGUF"
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""Types of fields, as `struct` spells them."""
_TEXT, _LIST = 8, 9
_LONGEST = 1 << 20
"""Bytes of a text that are read; longer ones are passed over."""
_DEEPEST = 8
_DIMS = 8
_ALIGNMENT = "general.alignment"


class GgufTensor(Struct, frozen=True):
    """A tensor in a file."""

    kind: int
    """Its type, as ggml numbers them."""
    shape: tuple[int, ...]
    """The slowest dim first, as in numpy (the file has the fastest first)."""
    at: int
    """Where it begins, in bytes from the beginning of the file."""


class GgufHead(Struct, frozen=True):
    """What a file has."""

    fields: Mapping[str, int | float | bool | str]
    """Its numbers and texts."""
    lists: Mapping[str, int]
    """How many entries its lists have."""
    tensors: Mapping[str, GgufTensor]
    order: str
    """``<`` or ``>``: the order of bytes, as `struct` spells it."""


def read_gguf_head(path: Path) -> GgufHead:
    """Read what a GGUF file says of itself.

    >>> head = read_gguf_head(Path("adapter.gguf"))  # doctest: +SKIP
    >>> head.fields["general.type"], head.tensors["blk.0.attn_q.weight.lora_a"].shape  # doctest: +SKIP
    ('adapter', (8, 64))

    Raises ``ValueError``, with what is wrong, where it is no sound GGUF file, and ``OSError``.
    """
    with path.open("rb") as file:
        return _Walk(file).head()


class _Walk:
    """Goes through a head, from one value to the next."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._order = file, "<"
        self._size = file.seek(0, 2)
        file.seek(0)

    def head(self) -> GgufHead:
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin as a GGUF file does")
        version = self._whole("I")
        if not version & 0xFFFF:  # it was written for machines of the other byte order
            self._order = ">"
            version = int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, and 2 and 3 are read")
        tensors, count = self._whole("Q"), self._whole("Q")
        fields: dict[str, int | float | bool | str] = {}
        lists: dict[str, int] = {}
        for _ in range(count):
            name = self._text()
            kind = self._whole("I")
            if name in fields or name in lists:
                raise ValueError(f"it has the field {name} twice")
            if kind == _LIST:
                lists[name] = self._pass_over_list()
            else:
                fields[name] = self._text() if kind == _TEXT else self._number(_spelled(kind))
        found = dict(self._tensor() for _ in range(tensors))
        if len(found) < tensors:
            raise ValueError("it has a tensor twice")
        start = _aligned(self._file.tell(), fields.get(_ALIGNMENT, 32))
        placed = {
            name: GgufTensor(each.kind, each.shape, start + each.at) for name, each in found.items()
        }
        return GgufHead(fields, lists, placed, self._order)

    def _tensor(self) -> tuple[str, GgufTensor]:
        name = self._text()
        dims = self._whole("I")
        if dims > _DIMS:
            raise ValueError(f"{name} has {dims} dims")
        shape = tuple(self._whole("Q") for _ in range(dims))[::-1]
        kind = self._whole("I")
        return name, GgufTensor(kind, shape, self._whole("Q"))

    def _pass_over_list(self, depth: int = 0) -> int:
        kind, length = self._whole("I"), self._whole("Q")
        if kind == _LIST:
            if depth == _DEEPEST:
                raise ValueError("its lists are nested too deeply")
            for _ in range(length):
                self._pass_over_list(depth + 1)
        elif kind == _TEXT:
            for _ in range(length):
                self._pass_over(self._whole("Q"))
        else:
            self._pass_over(length * struct.calcsize(_spelled(kind)))
        return length

    def _text(self) -> str:
        length = self._whole("Q")
        if length > _LONGEST:
            self._pass_over(length)
            return ""
        return self._take(length).decode("utf-8", "replace")

    def _whole(self, spelled: str) -> int:
        return int(self._number(spelled))

    def _number(self, spelled: str) -> int | float | bool:
        spelled = self._order + spelled
        (value,) = struct.unpack(spelled, self._take(struct.calcsize(spelled)))
        found: int | float | bool = value
        return found

    def _take(self, length: int) -> bytes:
        data = self._file.read(length)
        if len(data) < length:
            raise ValueError("it ends within its head")
        return data

    def _pass_over(self, length: int) -> None:
        if length > self._size or self._file.seek(length, 1) > self._size:
            raise ValueError("it ends within its head")


def _spelled(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"no type of fields has the number {kind}")
    return _NUMBERS[kind]


def _aligned(at: int, to: object) -> int:
    if not isinstance(to, int) or to <= 0 or to & (to - 1):
        raise ValueError(f"{_ALIGNMENT} is {to!r} and no power of two")
    return -(-at // to) * to


def read_gguf_tensor(file: BinaryIO, tensor: GgufTensor, block: int, size: int) -> bytes:
    """A tensor's bytes; ``size`` bytes stand for ``block`` numbers of its type.

    Raises ``ValueError`` where they do not fit its shape or the file.
    """
    rows = tensor.shape[-1] if tensor.shape else 1
    if rows % block:
        raise ValueError(f"a row of {rows} is not made of blocks of {block}")
    length = prod(tensor.shape) // block * size
    file.seek(0, 2)
    if tensor.at + length > file.tell():
        raise ValueError("the file ends too early")
    file.seek(tensor.at)
    return file.read(length)
