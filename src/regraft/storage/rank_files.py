"""One file for each rank of a training run, as verl writes them with FSDP: where the bytes of the whole tensors are.

``model_world_size_N_rank_R.pt`` is a file of ``torch.save`` whose values are DTensors: a rank's own part, the mesh of
ranks, and for each of the mesh's dims whether the tensor is cut along one of its own or is there whole. So the parts of
all files make up the tensors as the chunks of a distributed checkpoint do. What a DTensor's pickle speaks of becomes
records; nothing of it is run.
Source: torch 2.4 to 2.13, ``torch/distributed/tensor/_dtensor_spec.py``, ``placement_types.py``, ``device_mesh.py``;
verl's ``utils/checkpoint/fsdp_checkpoint_manager.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from msgspec import Struct

from regraft.errors import BadInputError, Finding
from regraft.storage.dcp import Chunk, Chunked, Record, covers
from regraft.storage.dtypes import BITS
from regraft.storage.probe import open_regular
from regraft.storage.torch_file import (
    DAMAGE,
    DTYPE_NAMES,
    Machine,
    Name,
    Opaque,
    Places,
    RefusedError,
    Tensor,
    opaque_beside,
    open_zip,
    raise_unreadable,
)

_FILE = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
_FIX = "join them: python -m verl.model_merger merge --backend fsdp --local_dir FOLDER --target_dir OUT"
_RECORDS = frozenset(
    (
        "DTensor",
        "DTensorSpec",
        "DeviceMesh",
        "Partial",
        "Replicate",
        "Shard",
        "TensorMeta",
        "_FlatLayout",
        "_MeshLayout",
        "_Partial",
        "_StridedShard",
    )
)
"""Classes of ``torch.distributed`` whose fields are looked at; releases keep them in several modules."""
_CUTS = ("Shard", "_StridedShard")
_COMPARED = 1 << 22


class _Part(Struct, frozen=True):
    """A rank's part of a tensor, or all of it."""

    local: Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    is_whole: bool
    """Whether it is no DTensor: every rank has all of it."""


class _Machine(Machine):
    """The machine for a rank's file."""

    def do(self, name: str, argument: Any) -> bool:
        """Carry out one opcode; whether it was the last."""
        if name == "BUILD" and len(self.stack) > 1 and isinstance(self.stack[-2], Record):
            (state,) = self._pop(1)
            self.stack[-1].state = state
            return False
        return super().do(name, argument)

    def look_up(self, module: Any, name: Any) -> Any:
        """What a name stands for."""
        if isinstance(module, str) and isinstance(name, str):
            if module.startswith("torch.distributed.") and name in _RECORDS:
                return Name("record", name)
            if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
                return Name("record", "rebuild")
        return super().look_up(module, name)

    def call(self, called: Any, arguments: Any) -> Any:
        """What a call makes."""
        if isinstance(called, Name) and called.kind == "record":
            if not isinstance(arguments, tuple):
                raise ValueError("a call without arguments")
            return (
                _rebuilt(arguments) if called.text == "rebuild" else Record(called.text, arguments)
            )
        return super().call(called, arguments)


def _rebuilt(arguments: tuple[Any, ...]) -> Any:
    """A tensor of a subclass: a DTensor with its part and how it is cut."""
    kind = arguments[1] if len(arguments) == 4 else None
    if not isinstance(kind, Name) or (kind.kind, kind.text) != ("record", "DTensor"):
        shown = kind.text if isinstance(kind, Name) else "something"
        return Opaque(f"a tensor of a class of its own ({shown})")
    made = Record("DTensor")
    made.state = _fields(arguments[3])
    return made


def _fields(state: Any) -> dict[Any, Any]:
    """An object's fields, which are those of its dict and of its slots."""
    both = state if isinstance(state, tuple) else (state,)
    return {k: v for each in both if isinstance(each, dict) for k, v in each.items()}


def rank_files(folder: Path) -> dict[int, Path]:
    """A run's files by rank; empty where a folder has none.

    Raises ``BadInputError`` where some are missing, or where there are those of several runs.
    """
    found = {path: match for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))}
    worlds = {int(match[1]) for match in found.values()}
    if not found:
        return {}
    by_rank = {int(match[2]): path for path, match in found.items()}
    if len(worlds) > 1 or len(by_rank) < len(found):
        message = f"it has files of runs of {' and of '.join(map(str, sorted(worlds)))} ranks"
        fix = "leave those of one run there"
        raise BadInputError(Finding("bad-dcp", message, where=str(folder), fix=fix))
    (world,) = worlds
    missing = [rank for rank in range(world) if rank not in by_rank] if world < 1 << 20 else [0]
    if missing or len(by_rank) != world:
        shown = ", ".join(map(str, missing[:8]))
        message = f"the run had {world} ranks, and there is no file of rank {shown}"
        fix = "bring the files of all ranks to one folder"
        raise BadInputError(Finding("bad-dcp", message, where=str(folder), fix=fix))
    return dict(sorted(by_rank.items()))


def read_rank_files(files: dict[int, Path]) -> tuple[dict[str, Chunked], list[str]]:
    """The tensors of a run by name, and what else is in its files.

    Raises ``BadInputError`` for files that torch did not write, and for parts that make up no tensors.
    """
    parts: dict[str, list[tuple[int, _Part, int]]] = {}
    left: dict[str, None] = {}
    for rank, path in files.items():
        file, size = open_regular(path)
        with file:
            loaded, places = _load(file, str(path))
            left |= dict.fromkeys(opaque_beside(loaded))
            for name, value in loaded.items():
                if isinstance(value, (Tensor, Record)) and isinstance(name, str):
                    part = _part(value, rank, len(files), str(path), name)
                    at = _place(part.local, places, size, str(path), name)
                    parts.setdefault(name, []).append((rank, part, at))
    folder = str(next(iter(files.values())).parent)
    if not parts:
        raise _bad(folder, "there is no tensor in its files")
    return {name: _join(name, found, files, folder) for name, found in parts.items()}, list(left)


def _load(file: BinaryIO, where: str) -> tuple[dict[Any, Any], Places]:
    try:
        loaded, places = open_zip(file, _Machine({}))
    except RefusedError as error:
        raise _bad(where, f"it holds {error}") from None
    except DAMAGE as error:
        raise_unreadable(error, where)
        raise _bad(where, f"torch did not write this ({str(error)[:200]})") from None
    if not isinstance(loaded, dict):
        raise _bad(where, "it holds no dict of names and tensors")
    return loaded, places


def _bad(where: str, message: str, key: str | None = None) -> BadInputError:
    return BadInputError(Finding("bad-dcp", message, where=where, key=key, fix=_FIX))


def _part(value: Tensor | Record, rank: int, world: int, where: str, key: str) -> _Part:
    if isinstance(value, Tensor):
        return _Part(value, value.shape, (0,) * len(value.shape), is_whole=True)
    fields = _fields(value.state)
    local, spec = fields.get("_local_tensor"), fields.get("_spec")
    if value.kind != "DTensor" or not isinstance(local, Tensor) or not isinstance(spec, Record):
        raise _bad(where, "it is no DTensor with its part and how it is cut", key)
    told = _fields(spec.state)
    mesh, placements, meta = (told.get(name) for name in ("mesh", "placements", "tensor_meta"))
    if not isinstance(mesh, Record) or not isinstance(placements, tuple):
        raise _bad(where, "nothing says how it is cut", key)
    shape = _shape_of(meta)
    sizes = _mesh_shape(mesh)
    if shape is None or sizes is None or prod(sizes) != world or len(sizes) != len(placements):
        message = f"its mesh is none of the {world} ranks that there are files of"
        raise _bad(where, message, key)
    for place in placements:
        if not isinstance(place, Record) or place.kind not in (*_CUTS, "Replicate"):
            kind = place.kind if isinstance(place, Record) else "something else"
            message = f"it is placed as {kind}, and only {', '.join(_CUTS)} and Replicate say where a part belongs"
            raise _bad(where, message, key)
    starts, lengths = [0] * len(shape), list(shape)
    coordinates = _coordinates(rank, sizes)
    for number in _order(placements, sizes, shape, where, key):
        size, dim = sizes[number], _dim_of(placements[number], len(shape))
        assert dim is not None
        each = -(-lengths[dim] // size)
        first = min(coordinates[number] * each, lengths[dim])
        starts[dim] += first
        lengths[dim] = min(each, lengths[dim] - first)
    if local.shape != tuple(lengths):
        message = f"rank {rank} has a part of shape {list(local.shape)}, and it would be {lengths}"
        raise _bad(where, message, key)
    return _Part(local, shape, tuple(starts), is_whole=False)


def _order(
    placements: Sequence[Record], sizes: Sequence[int], shape: Sequence[int], where: str, key: str
) -> list[int]:
    """The mesh's dims that cut a tensor, in the order in which they do.

    That is the mesh's own order, but for `_StridedShard`: FSDP over tensor parallelism cuts what that has cut before,
    though its dim of the mesh comes first. Its ``split_factor`` says in how many parts the tensor was cut before.
    """
    orders: dict[int, list[int]] = {}
    for number in reversed(range(len(sizes))):
        place = placements[number]
        if place.kind == "Replicate":
            continue
        dim = _dim_of(place, len(shape))
        if dim is None:
            raise _bad(where, "it is cut along a dim that it has not", key)
        order = orders.setdefault(dim, [])
        before = _fields(place.state).get("split_factor") if place.kind == "_StridedShard" else 1
        counts = [prod(sizes[n] for n in order[:k]) for k in range(len(order) + 1)]
        if before not in counts:
            message = f"it was cut into {before} parts before FSDP cut it, and its mesh has no such number"
            raise _bad(where, message, key)
        order.insert(counts.index(before), number)
        if place.kind == "_StridedShard" and shape[dim] % prod(sizes[n] for n in order):
            message = (
                f"FSDP cut what tensor parallelism had cut before, and {shape[dim]} rows are not"
                " divided evenly: releases of torch differ in where the parts belong"
            )
            raise _bad(where, message, key)
    return [number for order in orders.values() for number in order]


def _shape_of(meta: Any) -> tuple[int, ...] | None:
    if not isinstance(meta, Record) or not meta.arguments:
        return None
    shape = meta.arguments[0]
    return shape if isinstance(shape, tuple) and all(map(_is_size, shape)) else None


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _mesh_shape(mesh: Record) -> tuple[int, ...] | None:
    """How many ranks there are along each dim of a mesh; ranks are counted row by row."""
    fields = _fields(mesh.state)
    listed = fields.get("_flatten_rank_map") or fields.get("_flatten_mesh_list")
    if listed is not None and listed != tuple(range(len(listed))):
        return None
    tensor = fields.get("mesh")
    if isinstance(tensor, Tensor):
        return tensor.shape
    layout = fields.get("_layout")
    axes = _fields(layout.state).get("axes") if isinstance(layout, Record) else None
    if axes is None and isinstance(layout, Record):
        axes = _fields(layout.state).get("shape")
    if not isinstance(axes, tuple):
        return None
    sizes: list[int] = []
    for axis in axes:
        shape = _fields(axis.state).get("shape") if isinstance(axis, Record) else axis
        count = 1
        for size in shape if isinstance(shape, tuple) else (shape,):
            if not isinstance(size, int) or not _is_size(size):
                return None
            count *= size
        sizes.append(count)
    return tuple(sizes)


def _coordinates(rank: int, sizes: Sequence[int]) -> list[int]:
    found = []
    for size in reversed(sizes):
        found.append(rank % size)
        rank //= size
    return found[::-1]


def _dim_of(place: Record, dims: int) -> int | None:
    given = _fields(place.state).get("dim", place.arguments[0] if place.arguments else None)
    if not isinstance(given, int) or not -dims <= given < dims:
        return None
    return given % dims


def _place(tensor: Tensor, places: Places, size: int, where: str, key: str) -> int:
    """Where a part's bytes begin in its file."""
    if tensor.dtype not in DTYPE_NAMES:
        raise _bad(where, f"its type {tensor.dtype} has no name in safetensors", key)
    bits = BITS[DTYPE_NAMES[tensor.dtype]]
    if 0 in tensor.shape:
        return 0
    count = 1
    for length, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if length > 1 and stride != count:
            raise _bad(where, "its elements do not lie in a row", key)
        count *= length
    found = places.find(tensor.storage)
    if found is None:
        raise _bad(where, "its storage is not in the file", key)
    start = found[0] + tensor.offset * bits // 8
    if start + count * bits // 8 > min(found[1], size):
        raise _bad(where, "it reaches past its storage", key)
    return start


def _join(
    name: str, found: list[tuple[int, _Part, int]], files: dict[int, Path], folder: str
) -> Chunked:
    """One tensor of the parts of all ranks."""
    (_, first, _), *rest = found
    if len(found) != len(files):
        raise _bad(folder, f"{len(files) - len(found)} of {len(files)} ranks do not have it", name)
    for rank, part, _ in rest:
        same = part.shape == first.shape and part.local.dtype == first.local.dtype
        if not same or part.is_whole != first.is_whole:
            message = f"rank {rank} has it of another shape, type or kind than the others"
            raise _bad(folder, message, name)
    chunks: dict[tuple[int, ...], Chunk] = {}
    bits = BITS[DTYPE_NAMES[first.local.dtype]]
    for rank, part, at in found:
        length = prod(part.local.shape) * bits // 8
        chunk = Chunk(part.offsets, part.local.shape, files[rank].name, at, length, is_item=False)
        known = chunks.setdefault((*part.offsets, *part.local.shape), chunk)
        if known is not chunk and not _are_equal(files, known, chunk):
            message = f"rank {rank} has other numbers than the others, and all have it whole"
            raise _bad(folder, message, name)
    if not covers(first.shape, list(chunks.values())):
        raise _bad(folder, "its parts do not make up the tensor", name)
    return Chunked(DTYPE_NAMES[first.local.dtype], first.shape, tuple(chunks.values()), (name,))


def _are_equal(files: dict[int, Path], one: Chunk, other: Chunk) -> bool:
    folder = next(iter(files.values())).parent
    with open_regular(folder / one.file)[0] as a, open_regular(folder / other.file)[0] as b:
        a.seek(one.at)
        b.seek(other.at)
        for done in range(0, one.length, _COMPARED):
            size = min(_COMPARED, one.length - done)
            if a.read(size) != b.read(size):
                return False
    return True
