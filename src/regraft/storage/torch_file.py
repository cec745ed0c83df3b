"""Where the tensors are in a file that ``torch.save`` wrote, without torch.

Such a file is a pickle that says what the tensors are, and the bytes of their storages: as members of a zip archive
since torch 1.6, one after the other behind the pickle before. The pickle is walked opcode by opcode by a machine of
its own that knows what a plain state dict needs: numbers, text, tuples, lists and dicts, and a handful of names of
torch's. Any other name stands for itself: what is made with it is opaque, of which nothing is known but that name, so
nothing of the file is ever run. Opaque things may lie beside the tensors (a run's arguments, its optimizer), and are
never one of them. A file that names what runs code is refused whole. Work and memory are bounded by the size of the
file: nothing is hashed but text, whole numbers and opaque things, these by what they are and not by what they hold; no
place in the memo is made before it is filled, and nothing is decompressed.
Source: ``torch/serialization.py`` and ``torch/_utils.py`` of torch 2.13, and Python's ``pickletools``.
"""

from __future__ import annotations

import errno
import io
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from msgspec import Struct, field

from regraft.errors import BadInputError, Finding
from regraft.storage.dtypes import BITS, DTYPES, describe_unknown_dtype
from regraft.storage.formats import find_form
from regraft.storage.header import TensorInfo
from regraft.storage.header_check import name_problem
from regraft.storage.probe import PROBE_SIZE, open_regular, recognize_content
from regraft.storage.stamp import Stamp, changed
from regraft.storage.training import STATES, which_key

_FIX = "save it again as safetensors"
_MAX_PICKLE_BYTES = 100_000_000
_MOST_SHARED, _SMALL = 8, 1 << 26
"""How many times a file's size its tensors may have, which may share their bytes; some bytes more are always fine."""
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
DTYPE_NAMES = {
    "float64": "F64",
    "double": "F64",
    "float32": "F32",
    "float": "F32",
    "float16": "F16",
    "half": "F16",
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
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}
"""The format's name for torch's types; that of a type it has not is torch's own."""
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_UNKNOWN_BITS = {"complex32": 32, "complex128": 128}
"""Types that the format has no name for, and their sizes."""
_CALLED = {
    ("collections", "OrderedDict"): "dict",
    ("torch._utils", "_rebuild_tensor_v2"): "tensor",
    ("torch._utils", "_rebuild_tensor_v3"): "tensor",
    ("torch._utils", "_rebuild_parameter"): "parameter",
    ("torch._utils", "_rebuild_parameter_with_state"): "parameter",
}
_SUMMARY = {
    "_rebuild_sparse_tensor": "a sparse tensor, and it must be dense",
    "_rebuild_sparse_csr_tensor": "a sparse tensor, and it must be dense",
    "_rebuild_nested_tensor": "a nested tensor, and it must be dense",
    "_rebuild_qtensor": "a quantized tensor, and it must be dense",
    "_rebuild_meta_tensor_no_storage": "a tensor that has no data (its device is meta)",
}
_HARMFUL = {
    "os",
    "posix",
    "nt",
    "subprocess",
    "sys",
    "shutil",
    "runpy",
    "importlib",
    "imp",
    "socket",
    "ctypes",
    "pty",
    "commands",
    "webbrowser",
    "code",
    "codeop",
    "timeit",
    "pdb",
    "bdb",
    "asyncio",
    "http",
    "urllib",
    "requests",
    "pip",
    "multiprocessing",
    "threading",
    "signal",
    "pickle",
    "marshal",
    "tempfile",
    "cProfile",
    "profile",
}
"""Packages by which a pickle runs code. None of it would be run; but no checkpoint has them by accident."""
_HARMFUL_BUILTINS = {
    "eval",
    "exec",
    "compile",
    "open",
    "getattr",
    "setattr",
    "delattr",
    "vars",
    "globals",
    "locals",
    "apply",
    "execfile",
    "input",
    "breakpoint",
    "__import__",
}


class TorchTensor(Struct, frozen=True):
    """One tensor of the file."""

    dtype: str
    """The format's name for its type; torch's own where it has none."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""
    start: int
    """Where its first element is, in bytes from the start of the file."""
    storage: tuple[int, int]
    """Where the storage that it shares with others begins and ends."""

    @property
    def is_dense(self) -> bool:
        """Whether its elements lie in a row."""
        count, dense = 1, True
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            dense &= size == 1 or stride == count
            count *= size
        return dense or not count

    @property
    def size(self) -> int:
        """In bytes."""
        return _product(self.shape) * BITS[self.dtype] // 8

    @property
    def reach(self) -> int:
        """One past the last byte that it has."""
        if not _product(self.shape):
            return self.start
        far = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        return self.start + (far + 1) * BITS[self.dtype] // 8


def read_torch(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint that ``torch.save`` wrote; starts and ends count from the file's start.

    Raises ``BadInputError`` for a file that holds anything but plain tensors by name, each with its bytes in a row.
    """
    return read_run(path, None)[0]


def read_run(path: Path, key: str | None) -> tuple[dict[str, TensorInfo], list[str]]:
    """The same for what a training run saved, where the model is below a key, and the tensors beside it that are left.

    Args:
        path: the file.
        key: the key (``state_dict``, ``app.model``), where several fit; found out where it is ``None``.

    Raises ``BadInputError``.
    """
    left: list[str] = []

    def model_in(loaded: dict[Any, Any]) -> dict[Any, Any]:
        model, beside = _model_in(loaded, str(path), key)
        left.extend(beside)
        return model

    tensors, _ = _find_tensors(path, model_in)
    scattered = [
        Finding("not-tensors", "its elements do not lie in a row", str(path), key, fix=_FIX)
        for key, tensor in tensors.items()
        if not tensor.is_dense
    ]
    if scattered:
        raise BadInputError(scattered)
    infos = {
        key: TensorInfo(tensor.dtype, tensor.shape, tensor.start, tensor.start + tensor.size)
        for key, tensor in tensors.items()
    }
    return infos, left


def torch_names(path: Path, inside: str | None = None) -> list[str]:
    """The names that `open_torch` would give, without reading a tensor.

    Raises ``BadInputError``.
    """
    return list(_find_tensors(path, _below(inside))[0])


def _below(inside: str | None) -> Callable[[dict[Any, Any]], dict[Any, Any]]:
    def model_in(loaded: dict[Any, Any]) -> dict[Any, Any]:
        nested = loaded.get(inside)
        return nested if isinstance(nested, dict) else loaded

    return model_in


def open_torch(
    path: str | os.PathLike[str], inside: str | None = None
) -> dict[str, np.ndarray[Any, Any]]:
    """Read the tensors of an adapter that ``torch.save`` wrote, as read-only arrays.

    They may be one level down, under the key ``inside``.

    Bits are kept; bfloat16 and the 8-bit floats come as ml_dtypes types. Tensors that shared memory when they were
    saved still do.

    Returns:
        The tensors by name, in the file's order, with their own shapes and strides.

    Raises:
        BadInputError: the file cannot be read, is not a plain dict of names and dense tensors, or holds a type that
            safetensors has no name for; or it changed meanwhile.
    """
    path = Path(path)
    tensors, stamp = _find_tensors(path, _below(inside))
    wanted = {tensor.storage for tensor in tensors.values() if tensor.size}
    total = sum(end - start for start, end in wanted)
    if total > stamp.size:
        message = f"its storages are {total} bytes, and the whole file has {stamp.size}"
        raise BadInputError(Finding("bad-torch-file", message, where=str(path), fix=_FIX))
    whole = sum(tensor.size for tensor in tensors.values())
    if whole > _MOST_SHARED * stamp.size + _SMALL:
        message = (
            f"its tensors share their bytes: they are {whole} bytes, and the file has {stamp.size}"
        )
        raise BadInputError(Finding("bad-torch-file", message, where=str(path), fix=_FIX))
    file, _ = open_regular(path)
    with file:
        stamp.check(file)
        storages = {place: _read(file, path, place) for place in sorted(wanted)}
        stamp.check(file)
    return {key: _to_array(tensor, storages) for key, tensor in tensors.items()}


def _read(file: BinaryIO, path: Path, place: tuple[int, int]) -> memoryview:
    start, end = place
    data = np.empty(end - start, np.uint8)
    file.seek(start)
    if file.readinto(data.data) != end - start:  # type: ignore[attr-defined]
        raise changed(path, "it ended early")
    return data.data.toreadonly()


def _to_array(
    tensor: TorchTensor, storages: Mapping[tuple[int, int], memoryview]
) -> np.ndarray[Any, Any]:
    dtype = DTYPES[tensor.dtype].numpy
    if not tensor.size:
        empty = np.empty(tensor.shape, dtype)
        empty.flags.writeable = False
        return empty
    strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
    start = tensor.start - tensor.storage[0]
    return np.ndarray(tensor.shape, dtype, storages[tensor.storage], start, strides)


# ---------------------------------------------------------------------------------------------- the file


class Name(Struct, frozen=True):
    """A name of torch's: of a type (``dtype``) or of what is called."""

    kind: str
    text: str


class _Storage(Struct, frozen=True):
    dtype: str
    """Torch's name."""
    key: str
    count: int
    """In elements."""


class Tensor(Struct, frozen=True):
    """A tensor as the pickle speaks of it."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Opaque:
    """Something that is no plain tensor: nothing is wrong with it unless it is one of the tensors."""

    def __init__(self, what: str) -> None:
        self.what = what


_DEEPEST = 6
"""How far below others tensors are looked for."""


class RefusedError(Exception):
    """What a plain file of torch does not have."""


DAMAGE: tuple[type[Exception], ...] = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    EOFError,
    OSError,
    RuntimeError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
)
"""What walking a damaged pickle, or opening the archive around it, raises; ``OSError`` also where the disk fails."""


def _model_in(
    loaded: dict[Any, Any], where: str, key: str | None
) -> tuple[dict[Any, Any], list[str]]:
    """The dict with the model's tensors, and the names of those that are in others."""
    groups = dict(_groups(loaded, "", 0, set()))
    if key is None and ("" in groups or not groups):
        return loaded, []
    fitting = [
        name for name in groups if (STATES.search(name) is None if key is None else name == key)
    ]
    if len(fitting) != 1:
        raise which_key(where, fitting or ([] if key is None else groups))
    left = [
        f"{name}.{each}"
        for name, group in groups.items()
        if name != fitting[0]
        for each, value in group.items()
        if isinstance(value, Tensor)
    ]
    model = groups[fitting[0]]
    return model, left + [f"{name} ({what})" for name, what in _opaque(loaded, model, "", 0, set())]


def opaque_beside(loaded: dict[Any, Any]) -> list[str]:
    """What is known by its name only, each by the keys above it."""
    return [f"{name} ({what})" for name, what in _opaque(loaded, {}, "", 0, set())]


def _opaque(
    value: Any, model: dict[Any, Any], name: str, depth: int, seen: set[int]
) -> Iterator[tuple[str, str]]:
    """What is known by its name only and is outside the model, by the keys above it."""
    if isinstance(value, Opaque):
        yield name, value.what
    if not isinstance(value, (dict, list, tuple)) or depth > _DEEPEST or id(value) in seen:
        return
    seen.add(id(value))
    if value is not model:
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            at = key.what if isinstance(key, Opaque) else str(key)
            yield from _opaque(below, model, f"{name}.{at}" if name else at, depth + 1, seen)


def _groups(
    value: Any, name: str, depth: int, seen: set[int]
) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Every dict with tensors, by the keys above it; one that is at several places once."""
    if depth > _DEEPEST or not isinstance(value, (dict, list, tuple)) or id(value) in seen:
        return
    seen.add(id(value))
    items = value.items() if isinstance(value, dict) else enumerate(value)
    if isinstance(value, dict) and any(isinstance(each, Tensor) for each in value.values()):
        yield name, value
    for key, below in items:
        if not isinstance(below, Tensor):
            yield from _groups(below, f"{name}.{key}" if name else str(key), depth + 1, seen)


def _find_tensors(
    path: Path, model_in: Callable[[dict[Any, Any]], dict[Any, Any]]
) -> tuple[dict[str, TorchTensor], Stamp]:
    """The tensors by name, and what the file was; ``model_in`` finds the dict that they are in."""
    where = str(path)
    file, _ = open_regular(path)
    with file:
        stamp = Stamp.of(path, file)
        start = file.read(PROBE_SIZE)
        is_zip = start.startswith(b"PK")
        known = recognize_content(start, where)
        if known is not None and not is_zip:
            raise BadInputError(known)
        loaded, places = _load(file, is_zip=is_zip, size=stamp.size, where=where)
        if isinstance(loaded, dict):
            loaded = model_in(loaded)
        if not isinstance(loaded, dict):
            message = (
                f"expected a dict of names and tensors, and the file holds {_describe(loaded)}"
            )
            raise BadInputError(Finding("not-tensors", message, where=where, fix=_FIX))
        return _locate(loaded, places, stamp.size, where), stamp


def _load(file: BinaryIO, *, is_zip: bool, size: int, where: str) -> tuple[Any, Places]:
    """What the file's pickle says, and where the storages are."""
    try:
        if is_zip:
            return open_zip(file)
        return _open_stream(file, size)
    except RefusedError as error:
        found = find_form(Path(where))
        if found is not None:
            raise BadInputError(found) from None
        message = f"it holds {error}, and only plain tensors by name are read"
        raise BadInputError(Finding("not-tensors", message, where=where, fix=_FIX)) from None
    except DAMAGE as error:
        raise_unreadable(error, where)
        file.seek(0)
        if file.read(10)[8:] == b'{"':
            message = "this is a safetensors file, whatever its name says"
            fix = f"name it {Path(where).stem}.safetensors (model.safetensors in a checkpoint's folder)"
            raise BadInputError(Finding("bad-torch-file", message, where=where, fix=fix)) from error
        message = f"torch did not write this: {_shorten(error)}"
        raise BadInputError(Finding("bad-torch-file", message, where=where, fix=_FIX)) from error


def raise_unreadable(error: Exception, where: str) -> None:
    """Raise ``BadInputError`` if it was the system that could not read the file, and not its content."""
    # EINVAL is a place before the file's start, which a damaged archive names.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        message = f"the file cannot be read: {error.strerror}"
        raise BadInputError(Finding("unreadable-file", message, where=where)) from error


def _shorten(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _describe(value: object) -> str:
    if isinstance(value, Opaque):
        return value.what
    if isinstance(value, Name):
        return f"the name {value.text}"
    if isinstance(value, (Tensor, _Storage)):
        return f"a {type(value).__name__[1:].lower()}"
    return f"of type {type(value).__name__}"


def _locate(
    loaded: dict[Any, Any], places: Places, size: int, where: str
) -> dict[str, TorchTensor]:
    findings: list[Finding] = []
    result: dict[str, TorchTensor] = {}
    for key, value in loaded.items():
        shown = (key.what if isinstance(key, Opaque) else str(key))[:300]
        problem: Finding | None = None
        if not isinstance(key, str):
            message = f"the key must be text, and it is {_describe(key)}"
            problem = Finding("not-tensors", message, where=where, key=shown, fix=_FIX)
        elif (reason := name_problem(key)) is not None:
            problem = Finding("bad-name", reason, where=where, key=ascii(key)[1:-1][:300], fix=_FIX)
        elif not isinstance(value, Tensor):
            message = f"expected a tensor, and it is {_describe(value)}"
            problem = Finding("not-tensors", message, where=where, key=shown, fix=_FIX)
        elif value.dtype not in DTYPE_NAMES:
            problem = describe_unknown_dtype(value.dtype, where, shown)
        else:
            found = _place(value, places, size)
            if isinstance(found, TorchTensor):
                result[key] = found
            else:
                code, message = found
                problem = Finding(code, message, where=where, key=shown, fix=_FIX)
        if problem is not None:
            findings.append(problem)
    if findings:
        raise BadInputError(findings)
    return result


def _place(value: Tensor, places: Places, size: int) -> TorchTensor | tuple[str, str]:
    """Where a tensor is, or a finding's code and message."""
    place = places.find(value.storage)
    if place is None:
        return "bad-torch-file", f"its storage {value.storage.key[:100]!r} is not in the file"
    begin, end = place
    start = begin + value.offset * _bits(value.storage.dtype) // 8
    dtype = DTYPE_NAMES[value.dtype]
    tensor = TorchTensor(dtype, value.shape, value.strides, start, place)
    if tensor.size > size:
        message = f"the tensor of shape {list(value.shape)} is larger than the whole file"
        return "not-tensors", message
    if tensor.reach > end:
        return "bad-torch-file", f"it reaches {tensor.reach - end} bytes past its storage"
    return tensor


def _product(numbers: tuple[int, ...]) -> int:
    count = 1
    for number in numbers:
        count *= number
    return count


def _bits(dtype: str) -> int:
    return BITS[DTYPE_NAMES[dtype]] if dtype in DTYPE_NAMES else _UNKNOWN_BITS[dtype]


class Places:
    """Where storages are in a zip archive."""

    def __init__(self, file: BinaryIO, root: str, members: dict[str, zipfile.ZipInfo]) -> None:
        self._file, self._root, self._members = file, root, members
        self._found: dict[str, tuple[int, int] | None] = {}

    def find(self, storage: _Storage) -> tuple[int, int] | None:
        """Where a storage's bytes begin and end; ``None`` where there are none, or not as they are."""
        if storage.key not in self._found:
            self._found[storage.key] = self._look(storage.key)
        return self._found[storage.key]

    def _look(self, key: str) -> tuple[int, int] | None:
        info = self._members.get(f"{self._root}data/{key}")
        if info is None or not _is_stored(info):
            return None
        head = b""
        with suppress(ValueError, OSError):  # an offset that no file has
            self._file.seek(info.header_offset)
            head = self._file.read(30)
        if head[:4] != b"PK\x03\x04":
            return None
        names = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        begin = info.header_offset + 30 + names
        return begin, begin + info.file_size


class _Listed(Places):
    """Where storages are in a file of the older form."""

    def __init__(self, places: dict[str, tuple[int, int]]) -> None:
        self._found = dict(places)

    def find(self, storage: _Storage) -> tuple[int, int] | None:
        """Where a storage's bytes begin and end."""
        return self._found.get(storage.key)


_ENCRYPTED = 1
"""The bit of a member's flags."""


def _is_stored(info: zipfile.ZipInfo) -> bool:
    """Whether a member's bytes are in the file as they are."""
    plain = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & _ENCRYPTED
    return plain and info.compress_size == info.file_size


def open_zip(file: BinaryIO, machine: Machine | None = None) -> tuple[Any, Places]:
    """What a file of ``torch.save`` holds, and where its storages are; ``machine`` is the one that walks the pickle.

    Raises ``RefusedError`` for what is not plain, and what `zipfile` raises.
    """
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise RefusedError("two members of one name")
        names = [n for n in members if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(names) != 1:
            raise RefusedError("several files data.pkl" if names else "no data.pkl")
        (name,) = names
        root = name.removesuffix("data.pkl")
        order = members.get(f"{root}byteorder")
        for info in (members[name], order):
            if info is not None and not _is_stored(info):
                raise RefusedError(f"the compressed or encrypted member {info.filename[:100]!r}")
        if members[name].file_size > _MAX_PICKLE_BYTES:
            raise RefusedError(f"a pickle of {members[name].file_size} bytes")
        if order is not None and order.file_size < 10 and archive.read(order) != b"little":
            raise RefusedError("numbers in big-endian order")
        data = archive.read(name)
    compressed = next(
        (n for n, i in members.items() if n.startswith(f"{root}data/") and not _is_stored(i)), None
    )
    if compressed is not None:
        raise RefusedError(f"the compressed or encrypted member {compressed[:100]!r}")
    return _unpickle(io.BytesIO(data), machine), Places(file, root, members)


def _open_stream(file: BinaryIO, size: int) -> tuple[Any, Places]:
    """The form of before torch 1.6: pickles one after the other, then each storage with its number of elements."""
    file.seek(0)
    data = io.BytesIO(file.read(_MAX_PICKLE_BYTES))
    if _unpickle(data) != _MAGIC or _unpickle(data) != _PROTOCOL:
        raise ValueError("it begins with no number that torch writes")
    system = _unpickle(data)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise RefusedError("numbers in big-endian order")
    found: dict[str, _Storage] = {}
    loaded = _unpickle(data, Machine(found))
    keys = _unpickle(data)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("it has no list of its storages")
    places: dict[str, tuple[int, int]] = {}
    at = data.tell()
    for key in keys:
        if key not in found:
            raise ValueError("it lists a storage that no tensor has")
        file.seek(at)
        count = int.from_bytes(file.read(8), "little", signed=True)
        end = at + 8 + count * _bits(found[key].dtype) // 8
        if count < 0 or end > size:
            raise EOFError("it is cut off")
        places[key] = (at + 8, end)
        at = end
    return loaded, _Listed(places)


# ------------------------------------------------------------------------------------------ the pickle


_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"}
_TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8", "SHORT_BINSTRING", "BINSTRING"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


def _unpickle(stream: io.BytesIO, machine: Machine | None = None) -> Any:
    """The value of one pickle; the stream stands behind it afterwards."""
    machine = Machine({}) if machine is None else machine
    for opcode, argument, _ in opcodes(stream):
        if machine.do(opcode.name, argument):
            return machine.result()
    raise EOFError("the pickle has no end")


def opcodes(stream: io.BytesIO) -> Iterator[tuple[Any, Any, Any]]:
    """The opcodes of a pickle."""
    yield from pickletools.genops(stream)


class Machine(Struct):
    """A stack machine for the few opcodes that a plain state dict has."""

    storages: dict[str, _Storage]
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def do(self, name: str, argument: Any) -> bool:
        """Carry out one opcode; whether it was the last.

        Raises ``RefusedError`` for what is not among the few; ``IndexError``, ``KeyError`` or ``ValueError`` for a
        pickle that is none.
        """
        stack = self.stack
        if name in _NUMBERS or name in _TEXTS or name in _BYTES:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack.append(tuple(self._pop(count)))
        elif name == "TUPLE":
            stack.append(tuple(self._pop_to_mark()))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("EMPTY_SET", "FROZENSET"):
            if name == "FROZENSET":
                self._pop_to_mark()
            stack.append(Opaque("a set"))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = self._pop(1) if name == "APPEND" else self._pop_to_mark()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
            elif not isinstance(stack[-1], Opaque):
                raise ValueError("items for something that is no list")
        elif name in ("SETITEM", "SETITEMS"):
            self._set(self._pop(2) if name == "SETITEM" else self._pop_to_mark())
        elif name == "GLOBAL":
            stack.append(self.look_up(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(self.look_up(*self._pop(2)))
        elif name in ("REDUCE", "NEWOBJ"):
            called, arguments = self._pop(2)
            stack.append(self.call(called, arguments))
        elif name == "NEWOBJ_EX":
            called, arguments, _ = self._pop(3)
            stack.append(self.call(called, arguments))
        elif name == "BUILD":
            self._pop(1)  # attributes of an OrderedDict, such as its _metadata
        elif name == "BINPERSID":
            stack.append(self._storage(self._pop(1)[0]))
        elif name == "POP":
            self._pop(1)
        elif name == "POP_MARK":
            self._pop_to_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise RefusedError(f"the pickle's opcode {name}")
        return name == "STOP"

    def result(self) -> Any:
        """What is left at the end."""
        (value,) = self._pop(1)
        return value

    def look_up(self, module: Any, name: Any) -> Any:
        """What a name stands for."""
        return _look_up(module, name)

    def call(self, called: Any, arguments: Any) -> Any:
        """What a call makes."""
        return _call(called, arguments)

    def is_key(self, key: object) -> bool:
        """Whether something may be the key of a dict."""
        # A tuple that holds itself twice, a few dozen levels deep, would never be hashed.
        return isinstance(key, (str, Opaque)) or (isinstance(key, int) and abs(key) < 2**64)

    def _pop(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        if len(items) < count or any(item is _MARK for item in items):
            raise IndexError("the pickle's stack is empty")
        del self.stack[-count:]
        return items

    def _pop_to_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while at >= 0 and self.stack[at] is not _MARK:
            at -= 1
        if at < 0:
            raise IndexError("the pickle's stack has no mark")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def _set(self, items: list[Any]) -> None:
        table = self.stack[-1]
        if not isinstance(table, dict):
            if isinstance(table, Opaque):
                return
            raise ValueError("items for something that is no dict")
        if len(items) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            table[key if self.is_key(key) else Opaque(f"a key of type {type(key).__name__}")] = (
                value
            )

    def _storage(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise RefusedError("a storage that is none")
        kind, key, count = pid[1], pid[2], pid[4]
        if isinstance(kind, Name) and kind.kind == "opaque":
            return Opaque(kind.text)
        if not (
            isinstance(kind, Name)
            and kind.kind == "dtype"
            and isinstance(key, str)
            and _is_size(count)
        ):
            raise RefusedError("a storage that is none")
        if len(pid) > 5 and pid[5] is not None:
            raise RefusedError("a storage that is a part of another")
        return self.storages.setdefault(key, _Storage(kind.text, key, count))


def _look_up(module: Any, name: Any) -> Any:
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a name that is no text")
    called = _CALLED.get((module, name))
    if called is not None:
        return Name("called", called)
    if module in ("torch", "torch.storage"):
        dtype = _STORAGES.get(name) or (
            name if name in DTYPE_NAMES or name in _UNKNOWN_BITS else None
        )
        if dtype is not None:
            return Name("dtype", dtype)
    if (module, name) == ("torch", "Size"):
        return Name("called", "tuple")
    if module == "torch._utils" and name in _SUMMARY:
        return Name("opaque", _SUMMARY[name])
    shown = f"{module[:100]}.{name[:100]}"
    package = module.partition(".")[0]
    if package in _HARMFUL or (
        package in ("builtins", "__builtin__") and name.partition(".")[0] in _HARMFUL_BUILTINS
    ):
        raise RefusedError(f"{shown}, by which a pickle runs code")
    return Name("opaque", f"made by {shown}")


def _call(called: Any, arguments: Any) -> Any:
    if isinstance(called, Opaque):
        return called
    if not isinstance(called, Name) or not isinstance(arguments, tuple) or called.kind == "dtype":
        raise ValueError("a call of something that cannot be called")
    if called.kind == "opaque":
        return Opaque(called.text)
    if called.text == "dict":
        if arguments:
            raise RefusedError("an OrderedDict with arguments")
        return {}
    if called.text == "tuple":
        return arguments[0] if arguments and isinstance(arguments[0], tuple) else ()
    if called.text == "parameter":
        return arguments[0]
    if len(arguments) < 4:
        raise RefusedError("a tensor that lacks its storage, its shape or its strides")
    return _rebuild(*arguments)


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Any:
    if isinstance(storage, Opaque):
        return storage
    if not isinstance(storage, _Storage):
        raise RefusedError("a tensor without a storage")
    if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) != len(strides):
        raise RefusedError("a tensor whose shape is none")
    if len(shape) > 64 or not all(map(_is_size, (offset, *shape, *strides))):
        raise RefusedError("a tensor whose shape is none")
    dtype = next(
        (item.text for item in rest if isinstance(item, Name) and item.kind == "dtype"),
        storage.dtype,
    )
    if any(isinstance(item, dict) and (item.get("conj") or item.get("neg")) for item in rest):
        return Opaque("a tensor that is to be conjugated or negated when it is read")
    return Tensor(storage, dtype, offset, shape, strides)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62
