"""Tensors that are not read yet: what a plan makes of a file's tensors, as the strips that they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from regraft.errors import BadInputError, Finding
from regraft.names.keys import Ints
from regraft.planning.plan import Entry, Plan
from regraft.planning.slices import Region, Slicer, Strips, cut_whole
from regraft.planning.steps import demands_of
from regraft.storage.dtypes import DTYPES

Read = Callable[["Lazy"], bytes]


class Lazy:
    """A tensor of a file, or what a plan makes of such: its shape, its type, and what each region comes from.

    Two are equal where their bytes are; only then anything is read.
    """

    __slots__ = ("_made", "_read", "dtype", "row", "shape")

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: str,
        row: int = -1,
        made: tuple[Slicer, str, Ints] | None = None,
        read: Read | None = None,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        """The format's name, such as ``BF16``."""
        self.row = row
        """The file's tensor that it is as it stands; -1 where a plan makes it."""
        self._made = made
        """What a plan makes: its slicer, the target's name there, and the file's rows for the plan's ids."""
        self._read = read

    def cut(self, region: Region | None = None) -> list[Strips]:
        """The strips of a region, or of all; their sources are rows of the file's tensors."""
        if self._made is None:
            return cut_whole(self.row, self.shape, region)
        slicer, name, rows = self._made
        return [
            strips if strips.bits else strips.with_sources(rows[strips.sources])
            for strips in slicer.strips(name, region)
        ]

    def rows(self) -> Ints:
        """The file's tensors that it is made of."""
        if self._made is None:
            return np.array([self.row], dtype=np.int64)
        read = [strips.sources for strips in self.cut() if not strips.bits]
        found = np.sort(np.concatenate([np.zeros(0, np.int64), *read]))
        # np.unique imports numpy.ma, which takes longer than the load of a small model
        return found[np.diff(found, prepend=-1) > 0]

    def array(self) -> npt.NDArray[Any]:
        """The tensor, read whole."""
        assert self._read is not None
        return np.frombuffer(self._read(self), DTYPES[self.dtype].numpy).reshape(self.shape)

    def made_by(self, slicer: Slicer, name: str, rows: Ints) -> Lazy:
        """What a plan makes of this one and others of its type."""
        return Lazy(slicer.shape(name), self.dtype, -1, (slicer, name, rows), self._read)

    def __eq__(self, other: object) -> Any:
        if not isinstance(other, Lazy) or self._read is None:
            return np.array(self is other)
        return np.array(self._read(self) == self._read(other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{self.dtype} of {list(self.shape)}, not read yet>"


def apply_lazily(plan: Plan, tensors: Sequence[Lazy]) -> dict[str, Lazy]:
    """What a plan makes of tensors that are not read yet, each of which is a file's own.

    Raises ``BadInputError`` where tensors of different types would become one.
    """
    slicer = Slicer.of(plan)
    rows = np.array([tensor.row for tensor in tensors], dtype=np.int64)
    result: dict[str, Lazy] = {}
    findings: list[Finding] = []
    for entry in (*plan.entries, *plan.demands):
        findings += _check(entry, plan, tensors)
    for name, made in slicer.made.items():
        if isinstance(made, int):
            result[name] = tensors[made]
            continue
        entry = made.entry
        if entry.renames:
            result[name] = tensors[int(entry.sources[0][made.loop].reshape(-1)[made.slot])]
            continue
        ids = np.concatenate([part[made.loop].reshape(-1) for part in entry.sources]).tolist()
        dtypes = {tensors[i].dtype: i for i in ids}
        if len(dtypes) > 1:
            message = f"tensors of {', '.join(dtypes)} would become one tensor"
            findings.append(
                Finding(
                    "dtype",
                    message,
                    key=name,
                    rule=str(entry.rule),
                    fix="cast them to one dtype first",
                )
            )
            continue
        result[name] = tensors[ids[0]].made_by(slicer, name, rows)
    if findings:
        raise BadInputError(findings)
    return result


def _check(entry: Entry, plan: Plan, tensors: Sequence[Lazy]) -> Iterator[Finding]:
    """What an entry demands of what it reads, and what cannot be made of bytes alone."""
    from regraft.arrays.apply import FIXES, check_read

    demands = demands_of(entry)
    if not demands:
        return
    rule = str(entry.rule)
    for loop in range(len(entry)):
        ids = [part[loop].reshape(-1).tolist() for part in entry.sources]
        wrong = check_read(entry, demands, [[tensors[i].array() for i in some] for some in ids])
        if wrong is not None:
            code, message, term, slot = wrong
            key = plan.headers.name(ids[term][slot])
            yield Finding(code, message, key=key, rule=rule, fix=FIXES[code])
