"""The files of the result: which tensors they hold, where, and the index."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from regraft.checkpoints.moves import Moves, size_of
from regraft.checkpoints.source import SINGLE, Source
from regraft.checkpoints.spelling import with_note
from regraft.errors import BadInputError, Finding
from regraft.names.keys import Ints
from regraft.storage.dtypes import DTYPES
from regraft.storage.header import MAX_HEADER_BYTES

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)B?")
_POWERS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}
_RANK = {name: rank for rank, name in enumerate(DTYPES)}


def parse_size(text: str) -> int:
    """A size in bytes from text with a decimal unit.

    >>> parse_size("200MB"), parse_size("5GB"), parse_size("1.5 kB")
    (200000000, 5000000000, 1500)

    Raises ``BadInputError``.
    """
    match = _SIZE.fullmatch(text.strip())
    size = round(float(match[1]) * 1000 ** _POWERS[match[2]]) if match else 0
    if size <= 0:
        message = f"a size such as 200MB or 5GB was expected, this is {text[:100]!r}"
        raise BadInputError(Finding("bad-size", message))
    return size


class OutFile(Struct, frozen=True, eq=False):
    """One file to write."""

    name: str
    head: bytes
    """Everything before the data."""
    targets: Ints
    """Its tensors in the order of its data."""
    starts: Ints
    """Where each begins, from the start of the file."""
    size: int
    """In bytes."""


class Layout(Struct, frozen=True, eq=False):
    """The files of a result, and what an index says of them."""

    files: tuple[OutFile, ...]
    index: bytes | None
    """The index file's content; ``None`` where one file needs none."""

    @property
    def size(self) -> int:
        """Bytes of all weights files."""
        return sum(file.size for file in self.files)


def lay_out(
    source: Source,
    moves: Moves,
    dtypes: Sequence[str],
    shard_size: int | None,
    name: str | None = None,
    note: str | None = None,
    stem: str | None = None,
) -> Layout:
    """Distribute the targets over files: as the source does, or by size, or into one with a ``name``.

    With a ``stem``, files are called like it, in whatever way they are distributed.

    ``dtypes`` are those to write. Metadata is kept; entries that name tensors get their new names. ``note`` is
    written into the first file.

    Raises ``BadInputError`` where a header would be larger than the format allows.
    """
    tensors = source.tensors
    sizes = np.array(
        [size_of(d, s) for d, s in zip(dtypes, moves.shapes, strict=True)], dtype=np.int64
    )
    files, starts = tensors.files[moves.first], tensors.starts[moves.first]
    order = np.lexsort((np.arange(len(sizes)), starts, files))
    names: list[str] | None
    if name is not None:
        shard, names = np.zeros(len(sizes), dtype=np.int64), [name]
    elif shard_size is None:
        shard = files[order]
        kept = not source.is_bin and len(set(shard.tolist())) == len(source.files)
        names = [file.name for file in source.files] if kept else None
    else:
        shard, names = _fill(sizes[order], shard_size), None
    names = names if stem is None else None
    _, shard = np.unique(shard, return_inverse=True)
    count = int(shard.max()) + 1
    if names is None:
        called = stem or "model"
        names = (
            [f"{called}.safetensors"]
            if count == 1
            else [f"{called}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
    metadata = _merge_metadata(source, moves)
    result = []
    bounds = np.searchsorted(shard, np.arange(count + 1))
    for number, file in enumerate(names):
        targets = order[bounds[number] : bounds[number + 1]]
        same = shard_size is None and stem is None and file == source.files[number].name
        own = rename_aliases(source.files[number].metadata, moves) if same else metadata
        own = with_note(own, None if number else note)
        if stem is not None:
            own = {**own, "format": "pt"}  # transformers reads no file without it
        result.append(_make_file(file, targets, sizes, moves, dtypes, own))
    if count == 1 and source.index is None:
        return Layout(tuple(result), None)
    if count == 1 and names == [SINGLE]:
        return Layout(tuple(result), None)
    return Layout(tuple(result), make_index(source, moves, result))


def _fill(sizes: Ints, limit: int) -> Ints:
    shard = np.zeros(len(sizes), dtype=np.int64)
    used, number = 0, 0
    for i, size in enumerate(sizes.tolist()):
        if used and used + size > limit:
            used, number = 0, number + 1
        shard[i] = number
        used += size
    return shard


def _make_file(
    name: str,
    targets: Ints,
    sizes: Ints,
    moves: Moves,
    dtypes: Sequence[str],
    metadata: dict[str, str],
) -> OutFile:
    ends = np.cumsum(sizes[targets])
    starts = ends - sizes[targets]
    items = np.array([max(DTYPES[dtypes[i]].bits // 8, 1) for i in targets.tolist()])
    if (starts % items).any():
        # A reader maps the file and expects every tensor at a multiple of its element's size.
        ranks = np.array([_RANK[dtypes[i]] for i in targets.tolist()])
        targets = targets[np.argsort(-ranks, kind="stable")]
        ends = np.cumsum(sizes[targets])
        starts = ends - sizes[targets]
    head = make_head(
        (
            (moves.names[i], dtypes[i], moves.shapes[i], start, end)
            for i, start, end in zip(targets.tolist(), starts.tolist(), ends.tolist(), strict=True)
        ),
        metadata,
        name,
    )
    size = len(head) + (int(ends[-1]) if len(ends) else 0)
    return OutFile(name, head, targets, starts + len(head), size)


def make_head(
    rows: Iterator[tuple[str, str, tuple[int, ...], int, int]],
    metadata: dict[str, str],
    where: str,
    *,
    pad: bool = True,
) -> bytes:
    """The bytes before the data: name, dtype, shape, start and end of every tensor.

    Raises ``BadInputError`` where they are more than the format allows.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for name, dtype, shape, start, end in rows:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    text = msgspec.json.encode(header)
    if pad:
        text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        message = f"the header would take {len(text)} bytes; the format allows {MAX_HEADER_BYTES}"
        raise BadInputError(
            Finding("header-too-large", message, where=where, fix="write more shards")
        )
    return len(text).to_bytes(8, "little") + text


def _merge_metadata(source: Source, moves: Moves) -> dict[str, str]:
    merged: dict[str, str] = {}
    for file in source.files:
        for key, value in file.metadata.items():
            merged.setdefault(key, value)
    return rename_aliases(merged, moves)


def rename_aliases(metadata: Mapping[str, str], moves: Moves) -> dict[str, str]:
    """Metadata in which an entry may say that one name stands for another, as ``save_model`` writes."""
    renamed = ((moves.aliases.get(key, key), value) for key, value in metadata.items())
    return {key: moves.kept.get(value, value) for key, value in renamed if key is not None}


def make_index(source: Source, moves: Moves, files: Sequence[OutFile]) -> bytes:
    """The index that says which tensor is in which file; what else the source's said is kept."""
    metadata = dict(source.index or {})
    metadata["total_size"] = sum(file.size - len(file.head) for file in files)
    names = {moves.names[i]: file.name for file in files for i in file.targets.tolist()}
    index = {"metadata": metadata, "weight_map": dict(sorted(names.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()
