"""The renames of the installed transformers for lint: in order, with the lines of its conversion mapping."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from transformers import conversion_mapping

from regraft.bridges.transformers.registry import check_version, entries, look_up
from regraft.errors import BadInputError, Finding
from regraft.rules.lint.book import Fault, Linted, in_order
from regraft.rules.lint.renames import Rename, lint_renames


def renames_of(entry: str) -> list[Rename]:
    """The renames of one entry, those of guarded groups and converters left out: they do not act by themselves.

    Raises ``BadInputError`` where there is no such entry.
    """
    found = look_up(entry)
    if found is None:
        message = f"transformers {check_version()} has no entry {entry!r} in its registry"
        raise BadInputError(Finding("unknown-model", message, fix="check the model type"))
    place = f"{_file().name}:{_line(entry)}"
    return [
        Rename(str(transform), source, transform.forward.targets[0], place)
        for transform in found
        if not transform.operations and not transform.guarded and not transform.forward.offset
        for source in transform.forward.sources
    ]


def lint_registry(entry: str | None = None) -> Linted:
    """What lint finds in the registry, or in one entry of it.

    Raises ``BadInputError`` where there is no such entry.
    """
    faults: list[Fault] = []
    count = 0
    for name in [entry] if entry is not None else entries():
        renames = renames_of(name)
        count += len(renames)
        faults += lint_renames(renames)
    title = f"transformers {check_version()}" + (f", {entry}" if entry is not None else "")
    return Linted(title, str(_file()), count, 0, {}, in_order(faults))


def _file() -> Path:
    return Path(inspect.getfile(conversion_mapping))


def _line(entry: str) -> int:
    """Where an entry is written down; the first line for one that is made by a program."""
    for number, line in enumerate(_file().read_text(encoding="utf-8").splitlines(), 1):
        if re.search(rf"""["']{re.escape(entry)}["']""", line):
            return number
    return 1
