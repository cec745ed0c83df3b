"""Reading and checking the header of a safetensors file.

Source: the format's description, https://huggingface.co/docs/safetensors: 8 bytes with the header's
length N as an unsigned little-endian integer; N bytes of UTF-8 JSON that begin with ``{`` and may
be padded with spaces; then the data, which the tensors cover without holes or overlaps. N is at
most 100 MB, and duplicate keys are not allowed.

A header is untrusted. A typed decode and a few comparisons accept a sound one; any doubt leads to a
slower reading that says everything that is wrong with it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from itertools import islice
from operator import mul
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Struct

from regraft.errors import BadInputError, Finding
from regraft.storage.dtypes import BITS
from regraft.storage.header_check import MAX_DIMS, MAX_FINDINGS, check_header, has_long
from regraft.storage.probe import PROBE_SIZE, open_regular, recognize_content

MAX_HEADER_BYTES = 100_000_000
"""The format's limit on the length of a header."""

_MAX_BYTES = 2**63 - 1
# A header that describes half a million tensors has about four million of these. The limit bounds
# the memory that decoding takes, since one byte of JSON can become a hundred bytes of objects; a
# short header needs no such limit.
_MAX_SEPARATORS = 5_000_000
_SHORT_HEADER_BYTES = 10_000_000


class TensorInfo(msgspec.Struct, frozen=True, gc=False):
    """One tensor as the header describes it.

    A Struct rather than a dataclass: a file may hold tens of thousands, and making one takes a
    third of the time.
    """

    dtype: str
    """The format's name for the element type, such as ``BF16``."""
    shape: tuple[int, ...]
    """The shape in elements."""
    start: int
    """Where the tensor's bytes begin, counted from the start of the data."""
    end: int
    """Where they end, one past the last byte."""


class Header(Struct, frozen=True):
    """The checked header of one file."""

    path: Path
    tensors: dict[str, TensorInfo]
    """The tensors by name, in the header's order."""
    metadata: dict[str, str]
    """The free-form text that the file carries; empty if it has none."""
    data_start: int
    """Where the data begins, in bytes from the start of the file."""
    size: int
    """The size of the file, in bytes."""


_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct, gc=False):
    # An absent field takes a value that no tensor can have. It may be absent because __metadata__
    # is decoded by this type too, and then dropped.
    dtype: str = ""
    shape: Annotated[tuple[_Count, ...], msgspec.Meta(max_length=MAX_DIMS)] = (-1,)
    data_offsets: tuple[_Count, _Count] = (1, 0)


class _Metadata(msgspec.Struct):
    raw: msgspec.Raw = msgspec.field(default=msgspec.Raw(b""), name="__metadata__")


_decode_entries = msgspec.json.Decoder(dict[str, _Entry]).decode
_decode_metadata = msgspec.json.Decoder(_Metadata).decode
_decode_text = msgspec.json.Decoder(dict[str, str]).decode


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the header of a safetensors file and check it against the file.

    Reads the header alone, never the data. Takes memory in proportion to the header, which may have
    100 MB and about half a million tensors at most.

    Raises:
        BadInputError: the file cannot be read or breaks a rule of the format. Its findings name
            every problem (the first 1000 of them), each with the file and the tensor.
    """
    path = Path(path)
    where = str(path)
    text, size = _read_text(path)
    data_start = 8 + len(text)
    separators = 0
    if len(text) > _SHORT_HEADER_BYTES:
        separators = text.count(b",") + text.count(b"{") + text.count(b"[")
    if separators > _MAX_SEPARATORS:
        raise BadInputError(
            Finding(
                "header-too-large",
                f"the header holds about {separators} values, and at most {_MAX_SEPARATORS} are"
                " read",
                where=where,
                fix="split the file into shards",
            )
        )
    sound = _decode_sound(text, size - data_start)
    if sound is not None:
        tensors, metadata = sound
        return Header(path, tensors, metadata, data_start, size)
    rows, metadata, findings = check_header(text, size - data_start, where)
    if findings:
        raise BadInputError(_limit_findings(findings, where))
    tensors = {name: TensorInfo(*row) for name, row in rows.items()}
    return Header(path, tensors, metadata, data_start, size)


def first_names(path: Path) -> list[str]:
    """The names of the first tensors of a safetensors file, as they are spelled there; none of what is no such file.

    A look at some kilobytes, for whoever asks whether a file may be theirs: nothing in it is checked.

    Raises ``BadInputError`` for what is no regular file, ``OSError`` where it cannot be read.
    """
    file, _ = open_regular(path)
    with file:
        text = file.read(8 + _FIRST_BYTES)[8:]
    return [name.decode(errors="replace") for name in _NAME.findall(text)]


_FIRST_BYTES = 1 << 15
_NAME = re.compile(rb'"([^"\\]+)"\s*:\s*\{\s*"(?:dtype|shape|data_offsets)"')


def _limit_findings(findings: Iterable[Finding], where: str) -> list[Finding]:
    found = list(islice(findings, MAX_FINDINGS + 1))
    if len(found) > MAX_FINDINGS:
        found[-1] = Finding(
            "more-problems", f"only the first {MAX_FINDINGS} problems are listed", where=where
        )
    return found


def _read_text(path: Path) -> tuple[bytes, int]:
    """The header's JSON text with its padding, and the size of the file."""
    where = str(path)
    again = "download or save the file again"
    file, size = open_regular(path)
    try:
        with file:
            start = file.read(min(size, PROBE_SIZE))
            if len(start) < 8:
                message = f"the file has {size} bytes, and a safetensors file has at least 10"
                raise BadInputError(Finding("file-truncated", message, where=where, fix=again))
            length = int.from_bytes(start[:8], "little")
            if length > size - 8 or length > MAX_HEADER_BYTES:
                if known := recognize_content(start, where):
                    raise BadInputError(known)
                if length > MAX_HEADER_BYTES:
                    message = f"the header's length is given as {length} bytes, and the format"
                    message += f" allows {MAX_HEADER_BYTES}; this is hardly a safetensors file"
                    code = "header-too-large"
                else:
                    message = f"the header's length is given as {length} bytes, and the file has"
                    message += f" {size - 8} after that number; the file is cut off"
                    code = "file-truncated"
                raise BadInputError(Finding(code, message, where=where, fix=again))
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        message = f"the file cannot be read: {error.strerror}"
        raise BadInputError(Finding("unreadable-file", message, where=where)) from error
    if not text.startswith(b"{") and (known := recognize_content(start, where)):
        raise BadInputError(known)  # its first eight bytes are small as a number by chance
    if len(text) < length:
        message = "the file became shorter while it was read"
        raise BadInputError(Finding("file-changed", message, where=where, fix="try again"))
    return text, size


def _decode_sound(
    text: bytes, data_size: int
) -> tuple[dict[str, TensorInfo], dict[str, str]] | None:
    """The tensors and the metadata of a header that is sound beyond doubt, or else None."""
    if not text.startswith(b"{"):
        return None
    # A `-0` is no whole number of the format, and the decoder would take it for 0.
    odd = text.count(b"-0") if b"-" in text else 0
    try:
        text.decode()
        entries = _decode_entries(text)
        metadata: dict[str, str] = {}
        colons = text.count(b":")
        if entries.pop("__metadata__", None) is not None:
            raw = bytes(_decode_metadata(text).raw)
            metadata = _decode_text(raw)
            if json.loads(raw, object_pairs_hook=len) != len(metadata):
                return None
            colons -= 1 + raw.count(b":")
            odd -= raw.count(b"-0") if odd else 0
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    if odd:
        return None
    # A duplicate key leaves no other trace than its colon. An entry with all three fields has four
    # colons, its own among them; a field or an entry that was written twice adds at least one more,
    # as does an unknown field or a colon within a name.
    if colons != 4 * len(entries):
        return None
    if has_long(entries):
        return None
    tensors = _check_entries(entries, data_size)
    return None if tensors is None else (tensors, metadata)


def _check_entries(entries: dict[str, _Entry], data_size: int) -> dict[str, TensorInfo] | None:
    """The tensors if all are sound, or else None."""
    dtypes = [entry.dtype for entry in entries.values()]
    shapes = [entry.shape for entry in entries.values()]
    spans = [entry.data_offsets for entry in entries.values()]
    try:
        bits = [BITS[dtype] for dtype in dtypes]
    except KeyError:
        return None
    counts = list(map(math.prod, shapes))
    if -1 in counts:
        return None
    if list(map(mul, counts, bits)) != [8 * (end - start) for start, end in spans]:
        return None
    if 0 in counts and any(math.prod(filter(None, shape)) * 8 > _MAX_BYTES for shape in shapes):
        return None
    if not _covers(sorted(spans), data_size):
        return None
    rows = zip(dtypes, shapes, spans, strict=True)
    infos = [TensorInfo(dtype, shape, start, end) for dtype, shape, (start, end) in rows]
    return dict(zip(entries, infos, strict=True))


def _covers(spans: list[tuple[int, int]], data_size: int) -> bool:
    """Whether spans, in order, lie end to end over the whole of the data."""
    starts = [start for start, _ in spans]
    return [*starts, data_size] == [0, *(end for _, end in spans)]
