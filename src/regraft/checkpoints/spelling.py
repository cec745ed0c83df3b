"""What a result's metadata notes for the way back: how its source spelled names, and what the config said.

Old names may have more than one spelling in a release's registry, and a config more than one form. A result has one
name of each kind that its source had, and what changed; the way back writes these, and takes the note away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from regraft.adapters.components import Record
from regraft.adapters.provenance import (
    KEY,
    KeptTable,
    Origin,
    Remembered,
    read_remembered,
    write_remembered,
)
from regraft.checkpoints.source import Source
from regraft.names.keys import MARK, Group, fill


def remembered_in(source: Source) -> list[Remembered]:
    """What the metadata of a checkpoint's files notes, file by file; nothing of those that note nothing."""
    return [read_remembered(file.metadata) for file in source.files if KEY in file.metadata]


def read_spelling(remembered: Iterable[Remembered], layout: str | None) -> list[str]:
    """The names that a layout's tensors had before."""
    for found in remembered:
        if found.names and found.source.layout == layout:
            return found.names
    return []


def read_config(
    remembered: Iterable[Remembered], layout: str, config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The config as it was in a layout; ``None`` where no note tells it, or it was changed since."""
    for found in remembered:
        if found.config and found.source.layout == layout:
            return found.config_before(config)
    return None


def write_note(
    groups: Sequence[Group],
    source: str,
    target: str,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    dropped: Sequence[str] = (),
    set_aside: Sequence[str] = (),
) -> str | None:
    """The note for a result: one name of each kind that its source had, and what changed in the config.

    ``dropped`` and ``set_aside`` are what the user had left out, and kept as it is.

    ``None`` where there is nothing to note.
    """
    names = sorted(name for group in groups for name in _one_of_each(group))
    if not names and before == after and not dropped and not set_aside:
        return None
    return write_remembered(
        target, Origin(source), before, after, Record(), KeptTable(), names, dropped, set_aside
    )


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
