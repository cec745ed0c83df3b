"""How a checkpoint spelled its names, noted in the result's metadata for the way back.

Old names may have more than one spelling in a release's registry. A result has one name of each kind that its source
had; the way back then writes these, and takes the note away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np

from regraft.adapters.remembered import FORMAT, KEY, Origin, Remembered, read_remembered
from regraft.names.keys import MARK, Group, fill


def read_spelling(metadata: Iterable[Mapping[str, str]], layout: str | None) -> list[str]:
    """The names that a layout's tensors had before, by the metadata of a checkpoint's files."""
    for entry in metadata:
        found = read_remembered(entry)
        if found.names and found.source.layout == layout:
            return found.names
    return []


def write_spelling(groups: Sequence[Group], source: str, target: str) -> str:
    """The note for a result: one name of each kind that its source had."""
    names = sorted(name for group in groups for name in _one_of_each(group))
    entry = Remembered(format=FORMAT, layout=target, source=Origin(source), names=names)
    return msgspec.json.encode(entry).decode()


def with_note(metadata: Mapping[str, str], note: str | None) -> dict[str, str]:
    """A file's metadata with this note, and without any other."""
    rest = {key: value for key, value in metadata.items() if key != KEY}
    return rest if note is None else {**rest, KEY: note}


def _one_of_each(group: Group) -> Iterable[str]:
    """Names that differ in more than whole segments that are numbers."""
    segments = group.template.split(".")
    inner = [
        number
        for number, segment in enumerate(s for s in segments for _ in range(s.count(MARK)))
        if segment != MARK
    ]
    _, rows = np.unique(group.numbers[:, inner], axis=0, return_index=True)
    for row in rows.tolist():
        yield fill(group.template, group.numbers[row].tolist())
