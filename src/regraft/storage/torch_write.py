"""Writing a file that ``torch.load`` reads, without torch: a dict of names and tensors, as a zip archive.

The archive is the one that ``torch.save`` has written since torch 1.6: a pickle that says what the tensors are, and a
member for the bytes of each. Only what ``weights_only=True`` allows stands in the pickle. The same tensors give the
same bytes.
Source: ``torch/serialization.py`` and ``torch/_utils.py`` of torch 2.13, and Python's ``pickletools``.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from regraft.errors import BadInputError, Finding

_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
}
_ALIGNMENT = 64
_HEADER = 30
"""The bytes of a member's header in a zip archive, before its name."""
_WHEN = (1980, 1, 1, 0, 0, 0)


def write_torch(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray[Any, Any]],
    inside: str | None = None,
) -> None:
    """Write tensors of floating-point numbers as ``torch.save`` does.

    ``inside`` is the key under which the dict of tensors stands in another dict; without it, it is the file's own.

    Raises ``BadInputError`` where a dtype has no storage in torch, or the file cannot be written.
    """
    path = Path(path)
    for name, tensor in tensors.items():
        if tensor.dtype.name not in _STORAGES:
            message = f"{tensor.dtype} is no type that is written for torch"
            raise BadInputError(Finding("dtype", message, where=str(path), key=name))
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            _add(archive, "data.pkl", b"".join(_pickle(tensors, inside)))
            _add(archive, "byteorder", b"little")
            for number, tensor in enumerate(tensors.values()):
                _add(archive, f"data/{number}", _bytes(tensor))
            _add(archive, "version", b"3\n")
    except OSError as error:
        message = f"the file cannot be written: {error.strerror or error}"
        raise BadInputError(Finding("cannot-write", message, where=str(path))) from error


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """A member whose data begin at a multiple of 64 bytes, so that torch can map it."""
    info = zipfile.ZipInfo(f"archive/{name}", _WHEN)
    assert archive.fp is not None
    begin = archive.fp.tell() + _HEADER + len(info.filename.encode()) + 4
    padding = -begin % _ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    archive.writestr(info, data)


def _bytes(tensor: np.ndarray[Any, Any]) -> bytes:
    flat = np.ascontiguousarray(tensor)
    return flat.astype(flat.dtype.newbyteorder("<"), copy=False).tobytes()


def _pickle(tensors: Mapping[str, np.ndarray[Any, Any]], inside: str | None) -> Iterator[bytes]:
    """The opcodes of the dict, protocol 2; nothing is kept in the memo."""
    yield b"\x80\x02}"
    if inside is not None:
        yield _text(inside) + b"}"
    if tensors:
        yield b"("
        for number, (name, tensor) in enumerate(tensors.items()):
            yield _text(name) + _tensor(number, tensor)
        yield b"u"
    yield b"." if inside is None else b"s."


def _tensor(number: int, tensor: np.ndarray[Any, Any]) -> bytes:
    """``_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())``."""
    strides, step = [], 1
    for size in reversed(tensor.shape):
        strides.append(step)
        step *= size
    storage = b"".join(
        (
            b"(",
            _text("storage"),
            b"ctorch\n",
            _STORAGES[tensor.dtype.name].encode(),
            b"\n",
            _text(str(number)),
            _text("cpu"),
            _whole(tensor.size),
            b"tQ",
        )
    )
    numbers = [b"(" + b"".join(map(_whole, each)) + b"t" for each in (tensor.shape, strides[::-1])]
    return b"".join(
        (
            b"ctorch._utils\n_rebuild_tensor_v2\n(",
            storage,
            _whole(0),
            *numbers,
            b"\x89ccollections\nOrderedDict\n)RtR",
        )
    )


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _whole(number: int) -> bytes:
    if 0 <= number < 256:
        return b"K" + bytes([number])
    if 0 <= number < 2**31:
        return b"J" + struct.pack("<i", number)
    data = number.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data
