"""Checking that a checkpoint is another one in a different layout, bit for bit, without holding either."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from regraft.adapters.provenance import read_remembered
from regraft.checkpoints.companions import find_companions
from regraft.checkpoints.gather import Files
from regraft.checkpoints.parts import find_parts, is_parted
from regraft.checkpoints.per_expert import find_unstacked
from regraft.checkpoints.prepare import model_of, prepare
from regraft.checkpoints.prepared import Prepared
from regraft.checkpoints.sharding import OutFile
from regraft.checkpoints.source import Source, open_checkpoint
from regraft.checkpoints.stream import WINDOW, Stream
from regraft.checkpoints.ties import FIELD, unequal_ties
from regraft.checkpoints.tiles import Mover, read_into
from regraft.checkpoints.units import Cutter, Run
from regraft.errors import Finding
from regraft.errors.codes import Status
from regraft.names.keys import Ints
from regraft.planning.identify import detect
from regraft.planning.model import Foreign, ModelConfig
from regraft.report import Trace
from regraft.rules.book import Rules, only_books
from regraft.rules.said import saying
from regraft.shown import Shown
from regraft.storage.ranges import Ranges
from regraft.storage.stamp import changed
from regraft.storage.stand_ins import named
from regraft.storage.weights import open_source

_BUFFER = 4 << 20
_JOBS = 8
"""Threads that read from a store."""


@dataclass(slots=True, repr=False)
class Verification(Shown):
    """What comparing two checkpoints found."""

    source: str
    destination: str
    source_layout: str
    target_layout: str
    tensors: int = 0
    """How many of the second were compared."""
    bytes: int = 0
    """How many bytes were compared."""
    differences: list[Finding] = field(default_factory=list)
    """Tensors that are missing, too many, or differ."""
    trace: Trace | None = field(default=None, repr=False, compare=False)

    @property
    def equal(self) -> bool:
        """Whether every element of the one is in the other, at its place and nowhere else."""
        return not self.differences

    @property
    def status(self) -> Status:
        """The exit status of the command that found it."""
        return Status.DONE if self.equal else Status.NO

    def __bool__(self) -> bool:
        """Whether nothing differs."""
        return self.equal

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        data = asdict(replace(self, trace=None))
        del data["trace"]
        data["equal"] = self.equal
        data["differences"] = [finding.to_dict() for finding in self.differences]
        return data


def verify(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    foreign: Foreign | None = None,
    architecture: str | None = None,
    rules: Rules = (),
) -> Verification:
    """Check that ``dst`` is ``src`` in its own layout: every element accounted for, and no bit changed.

    ``architecture`` is the model's class, where its config names none that transformers has; ``rules`` are rule books
    to use in place of regraft's, as `regraft.convert` takes them.

    Raises ``BadInputError`` and its kin where one of the two cannot be read or planned.
    """
    with only_books(rules), saying(architecture=architecture):
        return _verify(
            Path(src), Path(dst), Path(model) if model is not None else None, progress, foreign
        )


def _verify(
    src: Path,
    dst: Path,
    told: Path | None,
    progress: Callable[[str, int, int], None] | None,
    foreign: Foreign | None,
) -> Verification:
    other = open_checkpoint(dst)
    if is_parted(other):
        first = prepare(src, find_parts(other).layout, model=told, name=_one_file(dst))
        return _compare(
            first, other, Verification(named(str(src)), named(str(dst)), "", ""), progress
        )
    config = model_of(other, told) or model_of(open_checkpoint(src), None)
    companions = find_companions(other, config.data if config is not None else None)
    target = detect(
        companions.headers,
        config,
        other.where,
        foreign=foreign,
        unstack=partial(find_unstacked, companions),
    ).layout
    if target is None:
        target = _layout_beside(open_checkpoint(src), config, foreign)
    untie, drop = _settled(src, other, told, foreign)
    asked = [read_remembered(file.metadata) for file in other.files]
    drop += [name for entry in asked for name in entry.dropped if name not in drop]
    keep = [name for entry in asked for name in entry.set_aside]
    first = prepare(src, target, model=told, foreign=foreign, untie=untie, drop=drop, keep=keep)
    return _compare(first, other, Verification(named(str(src)), named(str(dst)), "", ""), progress)


def _layout_beside(
    source: Source, config: ModelConfig | None, foreign: Foreign | None
) -> str | None:
    """The layout whose names are the same in others, too, where the source is in the names of a tool."""
    headers = find_companions(source, config.data if config is not None else None).headers
    found = detect(headers, config, source.where, foreign=foreign)
    ends = (
        book.layout("left" if book.tells == "right" else "right")
        for book in found.books
        if book.tells != "both" and found.layout == book.layout(book.tells)
    )
    return next(ends, None)


def _one_file(path: Path) -> str | None:
    return path.name if path.is_file() else None


def _compare(
    first: Prepared,
    other: Source,
    result: Verification,
    progress: Callable[[str, int, int], None] | None,
) -> Verification:
    result.source_layout = first.report.source_layout
    result.target_layout = first.report.target_layout
    same = _compare_names(first, other, result)
    result.trace = first.report.trace
    _Comparison(first, other, result, progress).run(same)
    return result


def _settled(
    src: Path, other: Source, told: Path | None, foreign: Foreign | None
) -> tuple[bool, list[str]]:
    """What was said, when the second was made, of tied weights that have other values in the first."""
    source = open_checkpoint(src)
    ties = unequal_ties(source, model_of(source, told), foreign).unequal
    names = set(other.tensors.names)
    drop = [tie.other for tie in ties if tie.other not in names]
    config = model_of(other, None)
    kept = len(drop) < len(ties)
    return kept and config is not None and config.data.get(FIELD) is False, drop


def _compare_names(ready: Prepared, other: Source, result: Verification) -> dict[int, int]:
    """The targets that are there with their shape and type: target to row in the other."""
    rows = {name: row for row, name in enumerate(other.tensors.names)}
    same: dict[int, int] = {}
    for target, name in enumerate(ready.moves.names):
        row = rows.pop(name, None)
        if row is None:
            result.differences.append(
                Finding("missing", "it is not there", where=result.destination, key=name)
            )
            continue
        for what, expected, found in (
            ("shape", list(ready.moves.shapes[target]), list(other.tensors.shapes[row])),
            ("dtype", ready.dtypes[target], other.tensors.dtypes[row]),
        ):
            if expected != found:
                message = f"its {what} is {found}, and {expected} was expected"
                result.differences.append(
                    Finding(what, message, where=result.destination, key=name)
                )
                break
        else:
            same[target] = row
    result.differences += [
        Finding("extra", "nothing in the source leads to it", where=result.destination, key=name)
        for name in rows
    ]
    return same


class _Comparison:
    def __init__(
        self,
        ready: Prepared,
        other: Source,
        result: Verification,
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self.ready, self.other, self.result, self.progress = ready, other, result, progress
        self.mover = Mover(_BUFFER)
        self.second = np.empty(_BUFFER, np.uint8)
        self.open: dict[int, Ranges] = {}
        self.wrong: dict[int, int] = {}
        self.remote = False

    def run(self, same: dict[int, int]) -> None:
        """Compare the bytes of targets with rows of the other checkpoint."""
        cutter = Cutter(self.ready.moves, self.ready.dtypes, self.ready.source.tensors)
        self.remote = self.ready.source.is_remote or self.other.is_remote
        total = int(self.other.tensors.sizes.sum())
        by_file: dict[int, list[int]] = {}
        for target, row in same.items():
            by_file.setdefault(int(self.other.tensors.files[row]), []).append(target)
        for number, targets in sorted(by_file.items()):
            file = self.other.files[number]
            rows = [same[target] for target in targets]
            starts = self.other.tensors.starts[rows]
            order = np.argsort(starts, kind="stable")
            out = OutFile(file.name, b"", np.array(targets)[order], starts[order], file.size)
            if self.remote:
                self._stream(number, out, total)
                self.result.tensors += len(targets)
                continue
            there = open_source(file)
            try:
                for unit in cutter.units(out):
                    for op in unit:
                        if isinstance(op, Run):
                            self._run(op, there, out)
                        else:
                            self._block(op[0], op[1], there, out)
                    if self.progress is not None:
                        self.progress(file.name, self.result.bytes, total)
                for at, data in cutter.padding(out, zeros=True):
                    self._padding(np.frombuffer(data, np.uint8), there, at, out)
            except EOFError:
                raise changed(file.path, "it ended early") from None
            finally:
                there.close()
                for opened in self.open.values():
                    opened.close()
                self.open.clear()
            self.result.tensors += len(targets)
        for target, count in self.wrong.items():
            message = f"{count} of its {int(self.ready.moves.sizes[target])} bytes differ"
            self.result.differences.append(
                Finding(
                    "differs",
                    message,
                    where=self.result.destination,
                    key=self.ready.moves.names[target],
                )
            )

    def _stream(self, number: int, out: OutFile, total: int) -> None:
        """Compare one file window by window, where one of the two is beyond this machine."""
        sizes = self.ready.moves.sizes[out.targets]
        with Stream(self.ready, _JOBS) as stream, Files(self.other.files) as files:

            def read(start: int, stop: int) -> tuple[Any, Any]:
                expected = stream.windows.read(stream.files, out, start, stop)
                found = np.empty(stop - start, np.uint8)
                files[number].fill([found.data], start)
                return expected, found

            spans = []
            for start, stop in _joined(out.starts, sizes):
                spans += [(at, min(at + WINDOW, stop)) for at in range(start, stop, WINDOW)]
            for at, (expected, found) in stream.each(read, spans):
                self._note(expected, found, at, out)
                if self.progress is not None:
                    self.progress(out.name, self.result.bytes, total)

    def source(self, number: int) -> Ranges:
        if number not in self.open:
            if len(self.open) > 32:
                self.open.pop(next(iter(self.open))).close()
            self.open[number] = open_source(self.ready.source.files[number])
        return self.open[number]

    def _run(self, op: Run, there: Ranges, out: OutFile) -> None:
        here = self.source(op.file)
        first = self.mover.buffers()[0]
        for at in range(0, op.size, _BUFFER):
            size = min(_BUFFER, op.size - at)
            read_into(here, first[:size].data, op.source_at + at)
            read_into(there, self.second[:size].data, op.target_at + at)
            self._note(first[:size], self.second[:size], op.target_at + at, out)

    def _block(self, number: int, block: Any, there: Ranges, out: OutFile) -> None:
        item = block.written.itemsize
        for side, data, at in self.mover.tiles(block, self.source(number), there):
            size = side.span * item
            for part, start in enumerate(side.segments):
                found = self.second[:size]
                read_into(there, found.data, at + start * item)
                self._note(data[part * size : (part + 1) * size], found, at + start * item, out)

    def _padding(self, expected: Any, there: Ranges, at: int, out: OutFile) -> None:
        for start in range(0, len(expected), _BUFFER):
            part = expected[start : start + _BUFFER]
            read_into(there, self.second[: len(part)].data, at + start)
            self._note(part, self.second[: len(part)], at + start, out)

    def _note(self, expected: Any, found: Any, at: int, out: OutFile) -> None:
        self.result.bytes += len(found)
        if np.array_equal(expected, found):
            return
        for place in np.flatnonzero(expected != found).tolist():
            row = int(np.searchsorted(out.starts, at + place, side="right")) - 1
            while self.ready.moves.sizes[out.targets[row]] == 0:
                row -= 1
            target = int(out.targets[row])
            self.wrong[target] = self.wrong.get(target, 0) + 1


def _joined(starts: Ints, sizes: Ints) -> list[tuple[int, int]]:
    """Parts of a file, in order, joined where they meet.

    >>> _joined(np.array([8, 12, 20]), np.array([4, 4, 2]))
    [(8, 16), (20, 22)]
    """
    spans: list[tuple[int, int]] = []
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], start + size)
        elif size:
            spans.append((start, start + size))
    return spans


__all__ = ["Verification", "verify"]
