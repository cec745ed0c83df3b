"""Reading and writing safetensors files.

Source: the format's description, https://huggingface.co/docs/safetensors. The header's side of it
is in `regraft.storage.header`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO
from weakref import finalize

import msgspec
import numpy as np

from regraft.errors import BadInputError, Finding
from regraft.storage.dtypes import DTYPES, DType, count_cells, count_elements, match_dtype
from regraft.storage.header import MAX_HEADER_BYTES, Header, TensorInfo, read_header
from regraft.storage.probe import open_regular
from regraft.storage.stamp import Stamp, changed
from regraft.storage.waiting import forget

__all__ = ["Header", "TensorFile", "TensorInfo", "open_tensors", "read_header", "write_tensors"]

_RANK = {name: rank for rank, name in enumerate(DTYPES)}
_SMALL = 1 << 16
_BATCH = 1 << 23
_READ = 1 << 26


def open_tensors(
    path: str | os.PathLike[str], header: Header | None = None
) -> dict[str, np.ndarray[Any, Any]]:
    """Read the tensors of a safetensors file, as read-only views on its data.

    The data is read into memory rather than mapped: a mapped file that becomes shorter ends the process that looks
    at it.

    Args:
        path: the file.
        header: what `read_header` returned for the same file, to spare reading it again.

    Returns:
        The tensors by name, in the header's order, with the shapes of the header. A tensor of a
        type smaller than a byte comes packed, see `regraft.storage.dtypes`.

    Raises:
        BadInputError: the file breaks a rule of the format, changed since its header was read or while it was
            read, does not fit into memory, or holds a packed tensor whose rows are not whole bytes.
    """
    path = Path(path)
    header = read_header(path) if header is None else header
    data = _read_data(path, header)
    plain = {name: dtype.numpy for name, dtype in DTYPES.items() if dtype.per_cell == 1}
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, info in header.tensors.items():
        dtype = plain.get(info.dtype)
        shape = info.shape
        if dtype is None:
            packed = DTYPES[info.dtype]
            dtype = packed.numpy
            shape = count_cells(packed, shape, where=str(path), key=name)
        tensors[name] = np.ndarray(shape, dtype, data, info.start)
    return tensors


def read_tensor(path: Path, header: Header, name: str) -> np.ndarray[Any, Any]:
    """Read one tensor of a safetensors file whose header is known.

    Raises ``BadInputError`` as `open_tensors` does.
    """
    info = header.tensors[name]
    dtype = DTYPES[info.dtype]
    shape = count_cells(dtype, info.shape, where=str(path), key=name)
    return np.ndarray(shape, dtype.numpy, _read_data(path, header, info.start, info.end))


class TensorFile(Mapping[str, np.ndarray[Any, Any]]):
    """The tensors of an open safetensors file by name: each is read when it is asked for, and not kept.

    The file is never mapped. One that changes while it is open is an error with the next tensor that is read.

    Raises ``BadInputError`` as `read_header` and `open_tensors` do, when it is made and for each tensor.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._file, _ = open_regular(self._path)
        finalize(self, self._file.close)
        self._stamp = Stamp.of(self._path, self._file)
        self.header = read_header(self._path)
        self._stamp.check()

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        info = self.header.tensors[name]
        dtype, shape = self._form(name)
        start = self.header.data_start + info.start
        data = _read_at(self._file, self._path, start, info.end - info.start)
        self._stamp.check(self._file)
        return np.ndarray(shape, dtype, data)

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.tensors)

    def __len__(self) -> int:
        return len(self.header.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.header.tensors

    def outline(self, name: str) -> np.ndarray[Any, Any]:
        """An array of a tensor's dtype and shape that takes no memory; whatever is computed with it is no number."""
        dtype, shape = self._form(name)
        with np.errstate(invalid="ignore"):  # not every small type has a NaN
            blank = np.full((), np.nan if dtype.kind in "fV" else 0, dtype)
        return np.broadcast_to(blank, shape)

    def _form(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        info = self.header.tensors[name]
        dtype = DTYPES[info.dtype]
        return dtype.numpy, count_cells(dtype, info.shape, where=str(self._path), key=name)


def _read_data(path: Path, header: Header, start: int = 0, end: int | None = None) -> memoryview:
    """A part of the file's data, or all of it; read-only."""
    file, size = open_regular(path)
    with file:
        stamp = Stamp.of(path, file)
        if size != header.size:
            raise changed(path, f"it had {header.size} bytes and has {size}")
        count = (size - header.data_start if end is None else end) - start
        data = _read_at(file, path, header.data_start + start, count)
        stamp.check(file)
    return data


def _read_at(file: BinaryIO, path: Path, start: int, count: int) -> memoryview:
    """Some bytes of an open file; read-only."""
    try:
        data = np.empty(count, np.uint8)
    except MemoryError as error:
        message = f"{count} bytes are to be read, and they do not fit into memory"
        raise BadInputError(Finding("file-too-large", message, where=str(path))) from error
    view = data.data
    at = 0
    try:
        file.seek(start)
        while at < count:
            read = file.readinto(view[at : at + _READ])  # type: ignore[attr-defined]
            if not read:
                raise changed(path, "it ended early")
            at += read
    except OSError as error:
        message = f"the file cannot be read: {error.strerror}"
        raise BadInputError(Finding("unreadable-file", message, where=str(path))) from error
    return view.toreadonly()


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray[Any, Any]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file, which appears at ``path`` whole or not at all.

    Like the reference writer, it orders the tensors by their type's alignment, largest first, and
    then by name, and pads the header to a multiple of 8 bytes, so that every tensor is aligned. The
    same tensors and metadata give the same bytes. The file is on disk when this returns; a file
    that was there before is replaced, and stays as it was on an error.

    Args:
        path: the file to write; its folder must exist.
        tensors: the tensors by name, of any shape, strides and byte order.
        metadata: text to carry in the header, such as ``{"format": "pt"}``; kept as it is. An empty
            one is left out.

    Raises:
        BadInputError: the format has no type for a tensor's dtype, a name or the metadata is not
            text, or the header would be too large; or the file cannot be written.
    """
    path = Path(path)
    head, arrays = _lay_out(str(path), tensors, metadata)
    temporary = path.with_name(f".{path.name[:100]}.{os.urandom(4).hex()}.tmp")
    try:
        try:
            with temporary.open("xb", buffering=0) as file:
                _write_all(file, head, arrays)
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_path(path.parent)
    except OSError as error:
        raise BadInputError(
            Finding(
                "cannot-write",
                f"the file cannot be written: {error.strerror or error}",
                where=str(path),
                fix="check that the folder exists, may be written to and has room",
            )
        ) from error


def sync_path(path: Path) -> None:
    """Wait until a file's content or a folder's entries are on disk.

    Does nothing on Windows, which cannot do it for a folder or for a file open for reading.
    """
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lay_out(
    where: str, tensors: Mapping[str, np.ndarray[Any, Any]], metadata: Mapping[str, str]
) -> tuple[bytes, list[np.ndarray[Any, Any]]]:
    """The bytes before the data, and the arrays in the order of the data."""
    findings: list[Finding] = []
    matched: dict[np.dtype[Any], DType] = {}
    named: list[tuple[int, str, np.ndarray[Any, Any]]] = []
    for name, array in tensors.items():
        if name == "__metadata__":
            message = f"a tensor cannot be named {name!r}"
            findings.append(Finding("bad-name", message, where=where))
            continue
        dtype = matched.get(array.dtype)
        if dtype is None:
            try:
                dtype = matched[array.dtype] = match_dtype(array.dtype, where=where, key=name)
            except BadInputError as error:
                findings += error.findings
                continue
        named.append((-_RANK[dtype.name], name, array))
    texts: dict[Any, Any] = dict(metadata)
    for key, value in texts.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            message = f"the metadata must map text to text, and {key!r} is {value!r}"
            findings.append(Finding("metadata-not-text", message, where=where, key="__metadata__"))
    if findings:
        raise BadInputError(findings)

    named.sort(key=lambda item: item[:2])
    arrays = [array for _, _, array in named]
    ends = list(accumulate(array.nbytes for array in arrays))
    header: dict[str, Any] = {"__metadata__": texts} if texts else {}
    for (_, name, array), end in zip(named, ends, strict=True):
        dtype = matched[array.dtype]
        header[name] = {
            "dtype": dtype.name,
            "shape": count_elements(dtype, array.shape),
            "data_offsets": (end - array.nbytes, end),
        }
    text = _encode(header, where)
    return len(text).to_bytes(8, "little") + text, arrays


def _encode(header: dict[str, Any], where: str) -> bytes:
    try:
        text = msgspec.json.encode(header)
    except UnicodeEncodeError as error:
        message = "a tensor's name or the metadata holds half of a surrogate pair"
        raise BadInputError(Finding("bad-name", message, where=where)) from error
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        message = f"the header would take {len(text)} bytes; the format allows {MAX_HEADER_BYTES}"
        raise BadInputError(Finding("header-too-large", message, where=where))
    return text


def _write_all(file: FileIO, head: bytes, arrays: Iterable[np.ndarray[Any, Any]]) -> None:
    """Write everything, joining small tensors to spare one system call for each."""
    batch, size = [head], len(head)
    for array in arrays:
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        small = array.nbytes <= _SMALL
        if small:
            batch.append(array.tobytes())
            size += array.nbytes
        if size >= _BATCH or not small:
            _write(file, memoryview(b"".join(batch)))
            batch, size = [], 0
        if not small:
            _write(file, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            forget(array)
    _write(file, memoryview(b"".join(batch)))


def _write(file: FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]
