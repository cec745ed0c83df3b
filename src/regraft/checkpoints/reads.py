"""What a plan demands of the tensors that it reads: copies that are equal, and padding that is padding.

Only rules with ``copies`` or ``fill`` demand anything; then the tensors that they speak of are read once more, as much
of them as is looked at. They are never mapped: a mapped file that becomes shorter ends the process.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from regraft.arrays.apply import FIXES, check_read, padded
from regraft.checkpoints.source import Source
from regraft.checkpoints.tiles import read_into
from regraft.errors import BadInputError, Finding
from regraft.planning.plan import Entry, Plan
from regraft.planning.steps import demands_of
from regraft.storage.dtypes import DTYPES
from regraft.storage.ranges import Ranges
from regraft.storage.stamp import changed
from regraft.storage.weights import open_source

Array = npt.NDArray[Any]


def check_reads(plan: Plan, source: Source) -> None:
    """Compare copies, and look at padding that would be cut off, before anything is written.

    Raises ``BadInputError`` with every rule's first tensor that is wrong, or where a file is not what it was.
    """
    findings: list[Finding] = []
    reader = _Reader(source)
    try:
        for entry in plan.demanding():
            findings += _wrong_of(entry, plan, source, reader)
    finally:
        reader.close()
    if findings:
        raise BadInputError(findings)


def _wrong_of(entry: Entry, plan: Plan, source: Source, reader: _Reader) -> list[Finding]:
    demands = demands_of(entry)
    for loop in range(len(entry)):
        ids = [each[loop].reshape(-1).tolist() for each in entry.sources]
        wrong = check_read(entry, demands, reader.tensors(entry, ids))
        if wrong is not None:
            code, message, term, slot = wrong
            key = plan.headers.name(ids[term][slot])
            rule = str(entry.rule)
            return [Finding(code, message, source.where, key, rule, FIXES[code])]
    return []


class _Reader:
    """Reads what is looked at; its files stay open."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.opened: dict[int, Ranges] = {}

    def tensors(self, entry: Entry, ids: list[list[int]]) -> list[list[Array]]:
        """The tensors of one loop value. Where copies are not compared, only padding is filled."""
        blank = {row: self._blank(row) for some in ids for row in some}
        tensors = [[blank[row] for row in some] for some in ids]
        if entry.repeats:
            for row, tensor in blank.items():
                self._fill(row, tensor, 0, tensor.nbytes)
            return tensors
        for padding in entry.paddings(written=False):
            for slot, view in padded(entry, entry.read, padding, tensors[padding.term]):
                row = ids[padding.term][slot]
                start = view.ctypes.data - blank[row].ctypes.data
                last = sum((n - 1) * step for n, step in zip(view.shape, view.strides, strict=True))
                if view.size:
                    self._fill(row, blank[row], start, start + last + view.itemsize)
        return tensors

    def _blank(self, row: int) -> Array:
        """A tensor of no numbers yet, which takes no memory before they are filled in."""
        table = self.source.tensors
        return np.empty(table.shapes[row], DTYPES[table.dtypes[row]].numpy)

    def _fill(self, row: int, tensor: Array, start: int, stop: int) -> None:
        table = self.source.tensors
        number = int(table.files[row])
        file = self.source.files[number]
        if number not in self.opened:
            self.opened[number] = open_source(file)
        place = tensor.reshape(-1).view(np.uint8)[start:stop]
        try:
            read_into(self.opened[number], place.data, int(table.starts[row]) + start)
        except EOFError:
            raise changed(file.path, "it ended early") from None

    def close(self) -> None:
        for file in self.opened.values():
            file.close()
