"""Distributed checkpoints of torch (DCP), without torch: what is in them, and where the bytes are.

A folder has ``.metadata``, a pickle of torch's own classes, and ``.distcp`` files with one item after the other, each
a file of ``torch.save`` with one tensor: a chunk of a tensor that several ranks held together. The pickle is walked
by the machine that reads ``torch.save`` itself; what it speaks of becomes records, and anything else is opaque (the
plans of its ranks, which Megatron-Core keeps there), so nothing of the file is ever run.

torch's writer of safetensors shards is read, too: each file holds chunks, and its metadata says where they belong.
Source: ``torch/distributed/checkpoint`` of torch 2.13: ``metadata.py``, ``filesystem.py``, ``hf_storage.py``.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from msgspec import Struct

from regraft.errors import BadInputError, Finding
from regraft.storage.dtypes import BITS
from regraft.storage.header import read_header
from regraft.storage.json_files import told_in_json
from regraft.storage.positioned import Positioned
from regraft.storage.probe import open_regular
from regraft.storage.torch_file import (
    DAMAGE,
    DTYPE_NAMES,
    Machine,
    Name,
    RefusedError,
    Tensor,
    opcodes,
    open_zip,
    raise_unreadable,
)
from regraft.storage.training import STATES, which_key

METADATA = ".metadata"
_FIX = "join it with torch: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.bin"
_MODULES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath"},
}
"""The classes whose records are looked at."""
_SHARDING = "DCP_SHARDING_INFO"
_MOST_BYTES = 1_000_000_000
_UNUSABLE: tuple[type[Exception], ...] = (RefusedError, *DAMAGE)
_MOST_CELLS = 1_000_000


class Chunk(Struct, frozen=True):
    """A part of a tensor that lies in a row."""

    offsets: tuple[int, ...]
    """Where it begins in the tensor, in elements of each dim."""
    sizes: tuple[int, ...]
    file: str
    at: int
    """Where its bytes begin in the file, or the item that holds them."""
    length: int
    """In bytes, of the item."""
    is_item: bool = True
    """Whether there is an item, a file of ``torch.save`` in the file; otherwise the bytes themselves begin there."""


class Chunked(Struct, frozen=True):
    """A tensor, and its chunks."""

    dtype: str
    """The format's name."""
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    path: tuple[str, ...]
    """Where it was in the state that was saved: the keys of dicts inside dicts, and its own."""


class Record:
    """An object of a class that is known, as plain data: nothing of the class is run."""

    def __init__(self, kind: str, arguments: tuple[Any, ...] = ()) -> None:
        self.kind, self.arguments = kind, arguments
        self.state: Any = None

    def get(self, name: str) -> Any:
        """A field; ``None`` where it is not there."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class _Machine(Machine):
    """The machine for ``.metadata``."""

    def do(self, name: str, argument: Any) -> bool:
        """Carry out one opcode; whether it was the last."""
        if name == "BUILD":
            (state,) = self._pop(1)
            if isinstance(self.stack[-1], Record):
                self.stack[-1].state = state
            return False
        return super().do(name, argument)

    def look_up(self, module: Any, name: Any) -> Any:
        """What a name stands for."""
        if name in _MODULES.get(module, ()) if isinstance(module, str) else False:
            return Name("record", name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return Name("record", name)
        return super().look_up(module, name)

    def call(self, called: Any, arguments: Any) -> Any:
        """What a call makes."""
        if isinstance(called, Name) and called.kind == "record":
            return Record(called.text, arguments if isinstance(arguments, tuple) else ())
        return super().call(called, arguments)

    def is_key(self, key: object) -> bool:
        """Records are hashed by what they are, and not by what they hold."""
        return isinstance(key, Record) or super().is_key(key)


def is_dcp(folder: Path) -> bool:
    """Whether a folder is a distributed checkpoint of torch, in either form."""
    if (folder / METADATA).is_file():
        return True
    first = next(iter(sorted(folder.glob("shard-*-model-*.safetensors"))), None)
    return first is not None and _SHARDING in read_header(first).metadata


def read_dcp(folder: Path) -> tuple[dict[str, Chunked], list[str]]:
    """The tensors of a distributed checkpoint by name, and what else is in it.

    Raises ``BadInputError`` for a folder that is none, and for a pickle that speaks of anything else than a plain
    checkpoint does.
    """
    is_table = (folder / METADATA).is_file()
    where = str(folder / METADATA if is_table else folder)
    data = b""
    if is_table:
        file, size = open_regular(folder / METADATA)
        with file:
            if size > _MOST_BYTES:
                raise _bad(where, f"it has {size} bytes")
            data = file.read()
    try:
        return _tensors_of(_load(data), where) if is_table else _of_shards(folder)
    except RefusedError as error:
        raise _bad(where, f"it holds {error}, and only plain checkpoints are read") from None
    except DAMAGE as error:
        raise_unreadable(error, where)
        raise _bad(where, f"it is not what torch writes ({str(error)[:200]})") from None


def _bad(where: str, message: str, key: str | None = None) -> BadInputError:
    return BadInputError(Finding("bad-dcp", message, where=where, key=key, fix=_FIX))


def _load(data: bytes) -> Record:
    machine = _Machine({})
    for opcode, argument, _ in opcodes(io.BytesIO(data)):
        if machine.do(opcode.name, argument):
            root = machine.result()
            if isinstance(root, Record) and root.kind == "Metadata":
                return root
            break
    raise ValueError("there is no Metadata in it")


def _tensors_of(root: Record, where: str) -> tuple[dict[str, Chunked], list[str]]:
    items: dict[tuple[str, tuple[int, ...] | None], Record] = {}
    for index, info in _table(root.get("storage_data")).items():
        offset = index.get("offset")
        items[index.get("fqn"), None if offset is None else _numbers(offset)] = info
    paths = root.get("planner_data")
    paths = paths if isinstance(paths, dict) else {}
    tensors: dict[str, Chunked] = {}
    other: list[str] = []
    for name, told in _table(root.get("state_dict_metadata")).items():
        if told.kind != "TensorStorageMetadata":
            other.append(name)
            continue
        shape = _numbers(told.get("size"))
        chunks = []
        for chunk in told.get("chunks"):
            offsets, sizes = _numbers(chunk.get("offsets")), _numbers(chunk.get("sizes"))
            item = items.get((name, offsets)) or items[name, None]
            if item.get("transform_descriptors"):
                raise RefusedError("items that are compressed")
            file = item.get("relative_path")
            if not isinstance(file, str) or Path(file).name != file or not file:
                raise RefusedError(f"a file that is not in the folder ({str(file)[:100]!r})")
            at, length = _numbers((item.get("offset"), item.get("length")))
            chunks.append(Chunk(offsets, sizes, file, at, length))
        dtype = _dtype_of(told.get("properties"))
        if not covers(shape, chunks):
            raise _bad(where, "its chunks do not make up the tensor", name)
        path = paths.get(name)
        keys = tuple(map(str, path)) if isinstance(path, (tuple, list)) else (name,)
        tensors[name] = Chunked(dtype, shape, tuple(chunks), keys)
    return tensors, other


def _table(value: Any) -> dict[Any, Record]:
    if not isinstance(value, dict) or not all(isinstance(v, Record) for v in value.values()):
        raise ValueError("a table is missing")
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > 64:
        raise ValueError("a shape is missing")
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**62 for n in value):
        raise ValueError("a shape that is none")
    return tuple(value)


def _dtype_of(properties: Any) -> str:
    state = properties.state
    first = state[0] if isinstance(state, tuple) and state else properties.get("dtype")
    if not isinstance(first, Name) or first.kind != "dtype" or first.text not in DTYPE_NAMES:
        raise RefusedError(f"a tensor of a type without a name in safetensors ({str(first)[:60]})")
    return DTYPE_NAMES[first.text]


def covers(shape: Sequence[int], chunks: Sequence[Chunk]) -> bool:
    """Whether chunks make up a tensor: every element is in one of them, and in no other.

    >>> covers((4,), [Chunk((0,), (3,), "", 0, 0), Chunk((3,), (1,), "", 0, 0)])
    True
    >>> covers((4,), [Chunk((0,), (3,), "", 0, 0), Chunk((2,), (1,), "", 0, 0)])
    False
    """
    filled = [chunk for chunk in chunks if prod(chunk.sizes)]
    if any(len(c.offsets) != len(shape) or len(c.sizes) != len(shape) for c in filled):
        return False
    if sum(prod(chunk.sizes) for chunk in filled) != prod(shape):
        return False
    edges = [
        sorted(
            {0, size, *(c.offsets[d] for c in filled), *(c.offsets[d] + c.sizes[d] for c in filled)}
        )
        for d, size in enumerate(shape)
    ]
    if any(each[-1] > size for each, size in zip(edges, shape, strict=True)):
        return False
    if prod(len(each) for each in edges) > _MOST_CELLS:
        raise RefusedError("chunks in a grid of more than a million cells")
    count = np.zeros([len(each) - 1 for each in edges], np.int8)
    for chunk in filled:
        cells = tuple(
            slice(each.index(at), each.index(at + size))
            for each, at, size in zip(edges, chunk.offsets, chunk.sizes, strict=True)
        )
        if count[cells].any():
            return False
        count[cells] = 1
    return bool(count.all())


def _of_shards(folder: Path) -> tuple[dict[str, Chunked], list[str]]:
    """What torch's writer of safetensors shards made: one file for each rank."""
    found: dict[str, tuple[str, list[Chunk]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        header = read_header(path)
        told = told_in_json(header.metadata.get(_SHARDING, "{}")) or {}
        for name, info in header.tensors.items():
            offsets = told.get(name, {}).get("saved_offsets", [0] * len(info.shape))
            at = header.data_start + info.start
            size = info.end - info.start
            chunk = Chunk(_numbers(offsets), info.shape, path.name, at, size, is_item=False)
            dtype, chunks = found.setdefault(name, (info.dtype, []))
            if dtype != info.dtype:
                raise _bad(str(path), f"it is {info.dtype} here, and {dtype} in another file", name)
            if all(other.offsets != chunk.offsets for other in chunks):
                chunks.append(chunk)
    tensors = {}
    for name, (dtype, chunks) in found.items():
        ends = [[a + b for a, b in zip(c.offsets, c.sizes, strict=True)] for c in chunks]
        shape = tuple(map(max, zip(*ends, strict=True))) if ends and ends[0] else ()
        if not covers(shape, chunks):
            raise _bad(str(folder), "its chunks do not make up the tensor", name)
        tensors[name] = Chunked(dtype, shape, tuple(chunks), (name,))
    return tensors, []


class _Part(Positioned):
    """A part of an open file, as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        super().__init__(size)
        self._file, self._start = file, start

    def at(self, start: int, end: int) -> bytes:
        self._file.seek(self._start + start)
        return self._file.read(end - start)


def place_of(file: BinaryIO, size: int, chunk: Chunk, dtype: str, where: str, key: str) -> int:
    """Where the bytes of a chunk begin in its file: inside an item of ``torch.save``, whose own words are checked.

    Raises ``BadInputError`` where the item is no plain tensor of the chunk's shape and type.
    """
    if not prod(chunk.sizes):
        return 0
    if chunk.at + chunk.length > size:
        raise _bad(
            where, f"it has {size} bytes, and a chunk ends at {chunk.at + chunk.length}", key
        )
    part = io.BufferedReader(_Part(file, chunk.at, chunk.length))
    try:
        tensor, places = open_zip(part)
    except _UNUSABLE as error:
        raise_unreadable(error, where)
        raise _bad(where, f"an item is no plain tensor ({str(error)[:200]})", key) from None
    if not isinstance(tensor, Tensor) or DTYPE_NAMES.get(tensor.dtype) != dtype:
        raise _bad(where, "an item is no tensor of the type that the metadata says", key)
    found = places.find(tensor.storage)
    dense, count = True, 1
    for length, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        dense &= length == 1 or stride == count
        count *= length
    start = tensor.offset * BITS[dtype] // 8
    if tensor.shape != chunk.sizes or not dense or found is None:
        raise _bad(where, "an item is no dense tensor of the shape that the metadata says", key)
    if start + count * BITS[dtype] // 8 > found[1] - found[0]:
        raise _bad(where, "an item is shorter than its shape says", key)
    return chunk.at + found[0] + start


def model_of(
    tensors: Mapping[str, Chunked], where: str, wanted: str | None
) -> tuple[dict[str, Chunked], list[str]]:
    """The tensors of the model by their own names, and those that are left: optimizers' states and the like.

    Args:
        tensors: all that were saved.
        where: the checkpoint, for messages.
        wanted: below which key the model is (``model``, ``app.model``), where several fit.

    Raises ``BadInputError`` where none or several fit.
    """
    groups: dict[str, dict[str, Chunked]] = {}
    left = []
    for name, tensor in tensors.items():
        above, own = ".".join(tensor.path[:-1]), tensor.path[-1]
        if wanted is None and (STATES.search(above) or STATES.search(name)):
            left.append(name)
        elif wanted is None:
            groups.setdefault(above, {})[own] = tensor
        elif name.startswith(wanted + "."):
            groups.setdefault(wanted, {})[name.removeprefix(wanted + ".")] = tensor
        else:
            left.append(name)
    if len(groups) == 1:
        return next(iter(groups.values())), left
    raise which_key(where, groups)


def chunks_by_file(tensors: Mapping[str, Chunked]) -> Iterator[str]:
    """The files that chunks are in, each once."""
    yield from dict.fromkeys(c.file for tensor in tensors.values() for c in tensor.chunks)
