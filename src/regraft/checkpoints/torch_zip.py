"""Where the tensors are in a file that ``torch.save`` wrote, without torch.

The file is a zip archive with every storage as an uncompressed member and a pickle that says what
the tensors are. The pickle is read by an unpickler that knows the handful of names a plain state
dict needs; any other name is refused, so nothing of the file is ever run.
Source: ``torch/serialization.py`` and ``torch/_utils.py`` of torch 2.13.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from regraft.errors import BadInputError, Finding
from regraft.storage.dtypes import BITS
from regraft.storage.header import TensorInfo
from regraft.storage.probe import PROBE_SIZE, open_regular, recognize_content

_FIX = "save the model again as safetensors"
_MAX_PICKLE_BYTES = 100_000_000
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}


@dataclass(frozen=True, slots=True)
class _Name:
    """A name of torch's that stands for a type."""

    dtype: str


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _RefusedError(Exception):
    pass


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise _RefusedError("a tensor without a storage")
    dtype = next((item.dtype for item in rest if isinstance(item, _Name)), storage.dtype)
    numbers = (offset, *shape, *strides)
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**62 for n in numbers):
        raise _RefusedError("a tensor whose shape is none")
    return _Tensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _parameter(data: Any, *rest: Any) -> Any:
    return data


_CALLED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CALLED:
            return _CALLED[module, name]
        if module in ("torch", "torch.storage"):
            dtype = _STORAGES.get(name) or _DTYPES.get(name)
            if dtype is not None:
                return _Name(dtype)
        raise _RefusedError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        if (
            not isinstance(pid, tuple)
            or len(pid) < 3
            or pid[0] != "storage"
            or not isinstance(pid[1], _Name)
            or not isinstance(pid[2], str)
        ):
            raise _RefusedError("a storage that is none")
        return _Storage(pid[1].dtype, pid[2])


def read_zip(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file that ``torch.save`` wrote; starts and ends count from the file's start.

    Raises ``BadInputError`` for a file that holds anything but plain tensors by name.
    """
    where = str(path)
    file, _ = open_regular(path)
    with file:
        start = file.read(PROBE_SIZE)
        known = recognize_content(start, where)
        if known is not None and not start.startswith(b"PK"):
            raise BadInputError(known)
        try:
            with zipfile.ZipFile(file) as archive:
                members = {info.filename: info for info in archive.infolist()}
                root, data = _read_pickle(archive, members)
            loaded = _Unpickler(io.BytesIO(data)).load()
            return _locate(loaded, root, members, file, where)
        except _RefusedError as error:
            message = f"it holds {error}, and only plain tensors by name are read"
            raise BadInputError(Finding("not-tensors", message, where=where, fix=_FIX)) from None
        except BadInputError:
            raise
        except Exception as error:
            message = f"torch did not write this: {type(error).__name__}: {str(error)[:200]}"
            raise BadInputError(
                Finding("bad-torch-file", message, where=where, fix=_FIX)
            ) from error


def _read_pickle(
    archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]
) -> tuple[str, bytes]:
    name = next((n for n in members if n.endswith("/data.pkl") and n.count("/") == 1), None)
    if name is None:
        raise _RefusedError("no data.pkl")
    root = name.removesuffix("data.pkl")
    if members[name].file_size > _MAX_PICKLE_BYTES:
        raise _RefusedError(f"a pickle of {members[name].file_size} bytes")
    order = members.get(f"{root}byteorder")
    if order is not None and archive.read(order) != b"little":
        raise _RefusedError("numbers in big-endian order")
    return root, archive.read(name)


def _locate(
    loaded: Any, root: str, members: dict[str, zipfile.ZipInfo], file: BinaryIO, where: str
) -> dict[str, TensorInfo]:
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise _RefusedError(f"an object of type {type(loaded).__name__}")
    findings: list[Finding] = []
    starts: dict[str, tuple[int, int]] = {}
    result: dict[str, TensorInfo] = {}
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, _Tensor):
            message = f"expected a tensor with a name, and it is of type {type(value).__name__}"
            findings.append(Finding("not-tensors", message, where=where, key=str(key)[:300]))
            continue
        if value.storage.key not in starts:
            starts[value.storage.key] = _find_storage(root, value.storage.key, members, file)
        begin, length = starts[value.storage.key]
        item = BITS[value.dtype] // 8
        count, dense = item, True
        for size, stride in zip(reversed(value.shape), reversed(value.strides), strict=True):
            dense &= size == 1 or stride * item == count
            count *= size
        start = begin + value.offset * BITS[value.storage.dtype] // 8
        if count and not dense:
            message = "its elements do not lie in a row"
            findings.append(Finding("not-tensors", message, where=where, key=key, fix=_FIX))
        elif start + count > begin + length:
            message = f"it reaches {start + count - begin - length} bytes past its storage"
            findings.append(Finding("bad-torch-file", message, where=where, key=key, fix=_FIX))
        else:
            result[key] = TensorInfo(value.dtype, value.shape, start, start + count)
    if findings:
        raise BadInputError(findings)
    return result


def _find_storage(
    root: str, key: str, members: dict[str, zipfile.ZipInfo], file: BinaryIO
) -> tuple[int, int]:
    """Where a storage's bytes begin, and how many there are."""
    info = members.get(f"{root}data/{key}")
    if info is None:
        raise _RefusedError(f"no storage {key[:100]!r}")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise _RefusedError("compressed storages")
    file.seek(info.header_offset)
    head = file.read(30)
    if head[:4] != b"PK\x03\x04":
        raise _RefusedError("a broken zip member")
    names = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    return info.header_offset + 30 + names, info.file_size
