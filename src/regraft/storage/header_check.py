"""Saying everything that is wrong with the header of a safetensors file.

`check_header` is the thorough reading behind `regraft.storage.header.read_header`, which turns to it
when a header is not sound beyond doubt.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection
from itertools import islice
from typing import Any

from regraft.errors import Finding
from regraft.storage.dtypes import BITS, describe_unknown_dtype

MAX_DIMS = 32
"""The most axes that every numpy can hold."""
MAX_NAME_LENGTH, MAX_NAME_PARTS = 512, 64
"""The longest name of a tensor that is read, in characters and in parts between dots."""
MAX_FINDINGS = 1000
"""How many problems of one file are listed."""

Row = tuple[str, tuple[int, ...], int, int]
"""A tensor's dtype, shape, start and end."""

_MAX_BYTES = 2**63 - 1
_FIELDS = ("dtype", "shape", "data_offsets")
_AGAIN = "download or save the file again"


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its duplicate keys."""


def check_header(
    text: bytes, data_size: int, where: str
) -> tuple[dict[str, Row], dict[str, str], list[Finding]]:
    """Read a header's JSON and find its problems.

    Args:
        text: the header's JSON with its padding.
        data_size: the number of bytes that follow the header.
        where: the file that the findings name.

    Returns:
        The tensors by name, the metadata and the problems; the first two are of use only if there
        are no problems.
    """
    parsed = _parse(text, where)
    if isinstance(parsed, Finding):
        return {}, {}, [parsed]
    findings = _find_duplicates(parsed, where, None, "the header")
    rows: dict[str, Row] = {}
    metadata: dict[str, str] = {}
    broken = False
    for name, value in parsed:
        if len(findings) > MAX_FINDINGS:
            return {}, {}, findings
        if name == "__metadata__":
            metadata, problems = _check_metadata(value, where)
            findings += problems
            continue
        row, problems = _check_entry(name, value, where)
        findings += problems
        if row is None:
            broken = True
        else:
            rows[name] = row
    findings += _check_layout(rows, data_size, where, broken=broken)
    return rows, metadata, findings


def _parse(text: bytes, where: str) -> _Pairs | Finding:
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        message = f"the header is not UTF-8 (byte {error.start} of it)"
        return Finding("header-not-utf8", message, where=where, fix=_AGAIN)
    if not decoded.startswith("{"):
        message = f"the header must be a JSON object, and it begins with {decoded[:20]!r}"
        return Finding("header-not-object", message, where=where, fix=_AGAIN)
    try:
        parsed = json.loads(decoded, object_pairs_hook=_Pairs, parse_int=_parse_int)
    except json.JSONDecodeError as error:
        message = f"the header is not JSON: {error.msg} at character {error.pos} of it"
        return Finding("header-not-json", message, where=where, fix=_AGAIN)
    except ValueError:
        message = "the header holds a number with thousands of digits"
        return Finding("header-not-json", message, where=where, fix=_AGAIN)
    except RecursionError:
        message = "the header's JSON is nested too deep"
        return Finding("header-not-json", message, where=where, fix=_AGAIN)
    assert isinstance(parsed, _Pairs)
    return parsed


def _parse_int(digits: str) -> int | float:
    # The reference implementation takes -0 for a fraction.
    return -0.0 if digits == "-0" else int(digits)


def _find_duplicates(pairs: _Pairs, where: str, key: str | None, place: str) -> list[Finding]:
    counts = Counter(name for name, _ in pairs)
    if len(counts) == len(pairs):
        return []
    repeated = (item for item in counts.items() if item[1] > 1)
    return [
        Finding(
            "duplicate-key",
            f"{place} has {_show(name)} {count} times, and the format allows each key once",
            where=where,
            key=_shorten(name) if key is None else key,
            fix="save the file again with each name once",
        )
        for name, count in islice(repeated, MAX_FINDINGS + 1)
    ]


def _check_metadata(value: Any, where: str) -> tuple[dict[str, str], list[Finding]]:
    if value is None:
        return {}, []
    key, fix = "__metadata__", "save the file again with text metadata"
    if not isinstance(value, _Pairs):
        message = f"the metadata must map text to text, and it is {_show(value)}"
        return {}, [Finding("metadata-not-text", message, where=where, key=key, fix=fix)]
    findings = _find_duplicates(value, where, key, "the metadata")
    for name, text in value:
        if not isinstance(text, str):
            message = f"the metadata must map text to text, and {_show(name)} is {_show(text)}"
            findings.append(Finding("metadata-not-text", message, where=where, key=key, fix=fix))
        elif not (_is_unicode(name) and _is_unicode(text)):
            message = f"the metadata's {_show(name)} holds half of a surrogate pair"
            findings.append(Finding("metadata-not-text", message, where=where, key=key, fix=fix))
    return dict(value), findings


def name_problem(name: str) -> str | None:
    """What is wrong with a tensor's name; ``None`` where nothing is."""
    if not _is_unicode(name):
        return "the tensor's name holds half of a surrogate pair"
    if is_long(name):
        return (
            f"the tensor's name has {len(name)} characters in {name.count('.') + 1} parts, and no model's has more "
            f"than {MAX_NAME_LENGTH} in {MAX_NAME_PARTS}"
        )
    return None


def is_long(name: str) -> bool:
    """Whether a name is longer than any model's: what matches names takes time in proportion to more than that.

    >>> is_long("model.layers.0.mlp.experts.127.down_proj.weight")
    False
    """
    size = len(name)
    return size > 2 * MAX_NAME_PARTS and (
        size > MAX_NAME_LENGTH or name.count(".") >= MAX_NAME_PARTS
    )


def has_long(names: Collection[str]) -> bool:
    """Whether one of many names is longer than any model's."""
    return max(map(len, names), default=0) > 2 * MAX_NAME_PARTS and any(map(is_long, names))


def _check_entry(name: str, value: Any, where: str) -> tuple[Row | None, list[Finding]]:
    """One tensor; the row is None if its place in the data is not known."""
    key = _shorten(name)
    findings: list[Finding] = []

    def report(code: str, message: str, fix: str = _AGAIN) -> None:
        findings.append(Finding(code, message, where=where, key=key, fix=fix))

    problem = name_problem(name)
    if problem is not None:
        report("bad-name", problem)
    if not isinstance(value, _Pairs):
        expected = f"expected an object with {', '.join(_FIELDS)}"
        report("bad-entry", f"{expected}, and it is {_show(value)}")
        return None, findings
    findings += _find_duplicates(value, where, key, "the tensor's entry")
    fields = dict(value)
    for field in _FIELDS:
        if field not in fields:
            report("missing-field", f"the tensor's entry has no {field}")
    for field in fields:
        if field not in _FIELDS:
            report("unknown-field", f"the tensor's entry has the unknown field {_show(field)}")

    dtype = fields.get("dtype")
    bits = BITS.get(dtype) if isinstance(dtype, str) else None
    if "dtype" in fields and bits is None:
        findings.append(describe_unknown_dtype(dtype, where, key))

    shape = fields.get("shape")
    if "shape" in fields and (problem := _find_shape_problem(shape, bits)):
        report("bad-shape", problem)
        shape = None

    offsets: Any = fields.get("data_offsets")
    if not _are_counts(offsets) or len(offsets) != 2:
        if "data_offsets" in fields:
            expected = "data_offsets must be two whole numbers of at least 0"
            report("bad-offsets", f"{expected}, and it is {_show(offsets)}")
        return None, findings
    start, end = offsets
    if end > _MAX_BYTES:
        report("bad-offsets", f"data_offsets {_show(offsets)} lie beyond the largest file")
        return None, findings
    if start > end:
        report("bad-offsets", f"data_offsets {_show(offsets)} end before they begin")
        return None, findings
    if shape is None or bits is None or not isinstance(dtype, str):
        return ("", (), start, end), findings
    size_bits = math.prod(shape) * bits
    if size_bits != 8 * (end - start):
        expected = f"{size_bits / 8:g}" if size_bits % 8 else str(size_bits // 8)
        message = f"{dtype} of shape {list(shape)} takes {expected} bytes"
        report("size-mismatch", f"{message}, and data_offsets [{start}, {end}] give {end - start}")
    return (dtype, tuple(shape), start, end), findings


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _find_shape_problem(shape: Any, bits: int | None) -> str | None:
    if isinstance(shape, _Pairs) or not _are_counts(shape):
        return f"the shape must be a list of whole numbers of at least 0, and it is {_show(shape)}"
    if len(shape) > MAX_DIMS:
        return f"the shape has {len(shape)} axes, and at most {MAX_DIMS} can be held"
    if math.prod(filter(None, shape)) * max(bits or 8, 8) // 8 > _MAX_BYTES:
        return f"the shape {_show(shape)} has more elements than memory can address"
    return None


def _check_layout(
    rows: dict[str, Row], data_size: int, where: str, *, broken: bool
) -> list[Finding]:
    """Find where the tensors overlap, leave holes or do not end with the file.

    ``broken`` says that some tensor's place is not known, so that what looks like a hole may not
    be one.
    """
    findings: list[Finding] = []
    at, last = 0, ""
    beyond: list[str] = []
    for name, (_, _, start, end) in sorted(rows.items(), key=lambda item: item[1][2:]):
        if len(findings) > MAX_FINDINGS:
            return findings
        key = _shorten(name)
        if end > data_size:
            beyond.append(key)
        if start < at:
            message = f"the tensor's bytes begin at {start} of the data, within {_show(last)},"
            message += f" which ends at {at}"
            findings.append(Finding("overlap", message, where=where, key=key, fix=_AGAIN))
        elif start > at and not broken:
            message = f"no tensor covers the bytes {at} to {start} of the data, before this one"
            findings.append(Finding("hole", message, where=where, key=key, fix=_AGAIN))
        if end >= at:
            at, last = end, name
    if beyond:
        counted = "1 tensor reaches" if len(beyond) == 1 else f"{len(beyond)} tensors reach"
        message = f"the tensors need {at} bytes of data and the file has {data_size}: it is cut off"
        message += f", or its offsets are wrong ({counted} past its end,"
        message += f" first {_show(beyond[0])})"
        findings.append(Finding("file-truncated", message, where=where, key=beyond[0], fix=_AGAIN))
    elif at < data_size and not broken:
        message = f"the tensors end at byte {at} of the data, and {data_size - at} bytes follow"
        findings.append(Finding("trailing-bytes", message, where=where, fix=_AGAIN))
    return findings


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text) if not text.isascii() else True


def _shorten(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}…"


def _show(value: Any) -> str:
    """A value as the message of a finding quotes it, never long."""
    if isinstance(value, _Pairs):
        return "an object"
    if isinstance(value, str):
        return repr(value if len(value) <= 120 else f"{value[:120]}…")
    if isinstance(value, list):
        shown = [_show(item) if not isinstance(item, list) else "[…]" for item in value[:8]]
        return f"[{', '.join([*shown, '…'] if len(value) > 8 else shown)}]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int) and value.bit_length() > 200:
        return "a huge number"
    return repr(value)
