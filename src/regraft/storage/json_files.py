"""Reading the JSON files that stand beside weights."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from msgspec import Struct

from regraft.errors import BadInputError, Finding
from regraft.storage.probe import PROBE_SIZE, open_regular, recognize_content

_MAX_JSON_BYTES = 100_000_000
_MAX_JSON_DEPTH = 64
"""Configs are nested a handful of levels; whatever walks or writes one recursively stays far below Python's limit."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonFile(Struct, frozen=True):
    """A JSON file as it was when it was read, once for all who ask."""

    path: Path
    text: str
    """What is in it, byte for byte; empty where it cannot be read."""
    data: dict[str, Any]
    """The object that it holds; nobody may change it."""
    error: BadInputError | None
    """What is wrong with it: raised by who needs it, since not everybody does."""


def read_json(path: Path) -> JsonFile:
    """Read a JSON file that holds an object, and keep what is wrong with it; see `load_json`."""
    text = ""
    try:
        text = _read_text(path)
        return JsonFile(path, text, parse_json(text, str(path)), None)
    except BadInputError as error:
        return JsonFile(path, text, {}, error)


def load_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    ``NaN`` and the infinities are read as Python's json module reads them, since it writes them.

    Raises:
        BadInputError: the file cannot be read, is not UTF-8 or JSON, holds something other than an
            object, or has an object with the same key twice.
    """
    path = Path(path)
    return parse_json(_read_text(path), str(path))


def parse_json(text: str, where: str, key: str | None = None) -> dict[str, Any]:
    """The JSON object that some text is, of a file or of one entry of it (``key``).

    Raises ``BadInputError`` as `load_json` does.
    """
    duplicates: Counter[str] = Counter()

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            duplicates.update({name: count for name, count in counts.items() if count > 1})
        return fields

    try:
        value = json.loads(text, object_pairs_hook=build)
    except json.JSONDecodeError as error:
        place = where if key is not None else f"{where}:{error.lineno}"
        message = f"not JSON: {error.msg}, at line {error.lineno}, column {error.colno}"
        raise BadInputError(
            Finding("not-json", message, where=place, key=key, fix="correct the file")
        ) from error
    except ValueError as error:
        message = "not JSON that can be read: it holds a number with thousands of digits"
        raise BadInputError(Finding("not-json", message, where=where, key=key)) from error
    except RecursionError as error:
        message = "not JSON that can be read: it is nested too deep"
        raise BadInputError(Finding("not-json", message, where=where, key=key)) from error
    if _depth_exceeds(value, text, _MAX_JSON_DEPTH):
        message = f"not JSON that can be read: it is nested more than {_MAX_JSON_DEPTH} deep"
        raise BadInputError(
            Finding("not-json", message, where=where, key=key, fix="correct the file")
        )
    if _SURROGATE.search(text) and not _is_text(value):
        message = "a string holds half of a surrogate pair (such as \\ud800), which is not text"
        raise BadInputError(
            Finding("not-json", message, where=where, key=key, fix="correct the file")
        )
    if not isinstance(value, dict):
        what = "the file" if key is None else "it"
        message = f"expected a JSON object, and {what} holds {_name_json(value)}"
        raise BadInputError(Finding("not-an-object", message, where=where, key=key))
    if duplicates:
        raise BadInputError(
            Finding(
                "duplicate-key",
                f"the key stands {count} times in one object, and which is meant is unclear",
                where=where,
                key=name[:300],
                fix="keep one of them",
            )
            for name, count in duplicates.items()
        )
    return value


def folder_with_config(named: object) -> Path | None:
    """The folder that a file names as its base, where it is one and has a ``config.json``; a name may be anything.

    >>> folder_with_config("a" * 5000), folder_with_config(["x"]), folder_with_config("org/model")
    (None, None, None)
    """
    if not isinstance(named, str) or not named:
        return None
    try:
        return Path(named) if (Path(named) / "config.json").is_file() else None
    except (OSError, ValueError):
        return None  # too long a name, or one with a zero byte


def told_in_json(text: str | bytes) -> Any:
    """What some JSON says that tells something besides; ``None`` where it is none, or none that can be read.

    >>> told_in_json('{"a": [1]}'), told_in_json("[" * 100000)
    ({'a': [1]}, None)
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _depth_exceeds(value: object, text: str, most: int) -> bool:
    """Whether JSON is nested deeper than ``most``; one with few brackets cannot be."""
    if text.count("[") + text.count("{") <= most:
        return False
    level: list[Any] = [value]
    for _ in range(most + 1):
        level = [
            item
            for container in level
            if isinstance(container, (dict, list))
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return False
    return True


def _is_text(value: object) -> bool:
    """Whether all strings of a JSON value can be encoded."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_text(path: Path) -> str:
    where = str(path)
    file, size = open_regular(path)
    with file:
        if size > _MAX_JSON_BYTES:
            message = f"the file has {size} bytes, and at most {_MAX_JSON_BYTES} are read as JSON"
            raise BadInputError(Finding("file-too-large", message, where=where))
        try:
            content = file.read(min(size + 1, _MAX_JSON_BYTES))  # it makes room for so much
        except OSError as error:
            message = f"the file cannot be read: {error.strerror}"
            raise BadInputError(Finding("unreadable-file", message, where=where)) from error
    if known := recognize_content(content[:PROBE_SIZE], where):
        raise BadInputError(known)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"not UTF-8 text (byte {error.start}, on line {line})"
        raise BadInputError(
            Finding("not-utf8", message, where=where, fix="save the file again as UTF-8")
        ) from error
    if text.startswith("\ufeff"):
        message = "the file begins with a byte order mark, which JSON does not allow"
        raise BadInputError(
            Finding("not-json", message, where=where, fix="save the file as UTF-8 without it")
        )
    return text


def _name_json(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return "a list"
    return "text" if isinstance(value, str) else "a number"
