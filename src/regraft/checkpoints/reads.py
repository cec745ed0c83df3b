"""What a plan demands of the tensors that it reads: copies that are equal, and padding that is padding.

Only rules with ``copies`` or ``fill`` demand anything; then the tensors that they speak of are read once more.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from regraft.arrays.apply import FIXES, check_read
from regraft.checkpoints.source import Source
from regraft.errors import BadInputError, Finding
from regraft.planning.plan import Entry, Plan
from regraft.storage.dtypes import DTYPES
from regraft.storage.ranges import open_ranges
from regraft.storage.stand_ins import remote_at


def check_reads(plan: Plan, source: Source) -> None:
    """Compare copies, and look at padding that would be cut off, before anything is written.

    Raises ``BadInputError`` with every rule's first tensor that is wrong.
    """
    findings: list[Finding] = []
    maps: dict[int, npt.NDArray[Any]] = {}
    for entry in (*plan.entries, *plan.demands):
        if entry.repeats or entry.paddings(written=False):
            findings += _wrong_of(entry, plan, source, maps)
    if findings:
        raise BadInputError(findings)


def _wrong_of(
    entry: Entry, plan: Plan, source: Source, maps: dict[int, npt.NDArray[Any]]
) -> list[Finding]:
    for loop in range(len(entry)):
        ids = [each[loop].reshape(-1).tolist() for each in entry.sources]
        wrong = check_read(entry, [[_tensor(source, i, maps) for i in some] for some in ids])
        if wrong is not None:
            code, message, term, slot = wrong
            key = plan.headers.name(ids[term][slot])
            rule = str(entry.rule)
            return [Finding(code, message, source.where, key, rule, FIXES[code])]
    return []


def _tensor(source: Source, row: int, maps: dict[int, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    table = source.tensors
    number, start = int(table.files[row]), int(table.starts[row])
    file = source.files[number]
    dtype, shape = DTYPES[table.dtypes[row]].numpy, table.shapes[row]
    if remote_at(file.path) is not None:
        read = np.empty(int(table.sizes[row]), np.uint8)
        open_ranges(file.path, file.stamp).fill([read.data], start)
        return np.frombuffer(read, dtype, prod(shape)).reshape(shape)
    if number not in maps:
        maps[number] = np.memmap(file.path, np.uint8, "r")
    data = maps[number][start : start + int(table.sizes[row])]
    return np.frombuffer(data, dtype, prod(shape)).reshape(shape)
