"""Adding to the tensors of a base that was just written: sums in float64, rounded once to each tensor's type.

A tensor that one adapter changes is rewritten slice by slice. Where several do, their slices are added up first, for
some rows of the tensor at a time, so that no more is held than a tensor of the base takes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from regraft.adapters.families.base import NoImageError
from regraft.adapters.form import Array, cast_down
from regraft.arrays.pieces import HELD, Piece, Want, Wide
from regraft.checkpoints.prepared import Prepared
from regraft.errors import BadInputError, Finding, RefusedError, RegraftError
from regraft.merging.addends import Addend, Replacement
from regraft.merging.base import Base, Reader, float_type, read_exactly
from regraft.merging.language import cannot, located
from regraft.storage.dtypes import DTYPES

Progress = Callable[[str, int, int], None]

_LEAST = 32 << 20
"""Bytes that may be held for sums of several adapters in any case."""


@dataclass(slots=True)
class Checked:
    """What is known of a merge before anything is written."""

    keys: dict[int, dict[str, str]] = field(default_factory=dict)
    """By addend: the rule that makes each tensor that it adds to, under the base's names."""
    asked: Counter[int] = field(default_factory=Counter)
    """How many addends may change a row of the base."""
    replaced: dict[int, list[tuple[Addend, Replacement]]] = field(default_factory=dict)
    """What takes the place of tensors, by row."""


def check(base: Base, addends: Sequence[Addend], failed: Sequence[RegraftError] = ()) -> Checked:
    """Whether everything that adapters add has its place in the base; one slice of each tensor is computed.

    ``failed`` is what is known to be wrong with other adapters.

    Raises ``BadInputError`` or ``RefusedError`` with everything that does not fit, of all adapters together.
    """
    checked = Checked()
    findings = [finding for error in failed for finding in error.findings]
    kinds = [type(error) for error in failed]
    for number, addend in enumerate(addends):
        try:
            found = _check_one(base, addend, checked, checked.keys.setdefault(number, {}))
        except RegraftError as error:
            kinds.append(type(error))
            findings += error.findings
            continue
        if found:
            refused = all(finding.code == "no-image" for finding in found)
            kinds.append(RefusedError if refused else BadInputError)
            findings += found
    if findings:
        raise (kinds[0] if len(set(kinds)) == 1 else BadInputError)(findings)
    return checked


def _check_one(base: Base, addend: Addend, checked: Checked, keys: dict[str, str]) -> list[Finding]:
    seen: set[tuple[str, ...]] = set()
    asked: set[int] = set()

    def once(names: Sequence[str]) -> Want:
        whole = tuple(names)
        if whole in seen:
            return "nothing"
        seen.add(whole)
        asked.update(row for row in map(addend.find, names) if row is not None)
        return "entries"

    findings: list[Finding] = []
    with _refusing(addend.where):
        for piece in addend.pieces(once):
            row = addend.find(piece.key)
            fault = _misfit(base, addend, piece.key, row, piece.shape)
            if fault is not None:
                findings.append(fault)
            elif row is not None and piece.key not in keys:
                keys[base.tensors.names[row]] = piece.rule
    for name, replacement in addend.replaced.items():
        row = addend.find(name)
        shape = tuple(replacement.values.shape)
        if replacement.rows is not None and row is not None:
            whole = base.tensors.shapes[row]
            fits = len(replacement.rows) == shape[0] and shape[1:] == whole[1:]
            fits = fits and bool((replacement.rows < whole[0]).all())
            shape = whole if fits else shape
        fault = _misfit(base, addend, name, row, shape)
        if fault is not None:
            findings.append(fault)
        elif row is not None:
            checked.replaced.setdefault(row, []).append((addend, replacement))
            asked.add(row)
    if not keys and not addend.replaced and not findings:
        findings.append(
            Finding(
                "wrong-base",
                "nothing of this adapter is for a weight of the base",
                where=addend.where,
                fix="give the base that it was trained on",
            )
        )
    checked.asked.update(asked)
    return findings


def _misfit(
    base: Base, addend: Addend, key: str, row: int | None, shape: tuple[int, ...]
) -> Finding | None:
    """Why something has no place in the base."""
    if row is None:
        return base.fault(row, key, addend.where)
    there = base.tensors.shapes[row]
    if not _same_rows(shape, there):
        return Finding(
            "wrong-base",
            f"it is for a weight of the shape {shape}, and the base's has {there}",
            where=addend.where,
            key=base.tensors.names[row],
            fix="give the base that it was trained on",
        )
    return base.fault(row, key, addend.where)


def _same_rows(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two shapes are one, save for dims of one position at the end (a linear and a 1x1 convolution).

    >>> _same_rows((4, 3), (4, 3, 1, 1)), _same_rows((4, 3), (3, 4))
    (True, False)
    """
    return all(a == b for a, b in zip_longest(one, other, fillvalue=1))


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    try:
        yield
    except NoImageError as error:
        raise cannot(error, where) from None


# -- where a tensor stands in the result


@dataclass(frozen=True, slots=True)
class _Place:
    file: Path
    start: int
    dtype: np.dtype[Any]


class Writer:
    """The tensors of a result that was just written, some rows at a time.

    Tensors of which columns are changed are held as a whole until they are done, or others need the room.
    """

    def __init__(self, folder: Path, ready: Prepared, limit: int) -> None:
        self.limit = limit
        """Bytes of tensors that are held."""
        self._places: dict[int, _Place] = {}
        for made in ready.layout.files:
            for target, start in zip(made.targets.tolist(), made.starts.tolist(), strict=True):
                dtype = DTYPES[ready.dtypes[target]].numpy
                self._places[target] = _Place(folder / made.name, start, dtype)
        self._open: dict[Path, int] = {}
        self._held: dict[int, Array] = {}

    def _file(self, place: _Place) -> int:
        if place.file not in self._open:
            self._open[place.file] = os.open(place.file, os.O_RDWR)
        return self._open[place.file]

    def read(self, row: int, first: int, shape: tuple[int, ...]) -> Array:
        """Entries from ``first`` on along the first dim."""
        if row in self._held:
            return self._held[row][first : first + shape[0]]
        place = self._places[row]
        size = prod(shape) * place.dtype.itemsize
        each = prod(shape[1:]) * place.dtype.itemsize
        data = read_exactly(self._file(place), size, place.start + first * each)
        return np.frombuffer(data, place.dtype).reshape(shape)

    def hold(self, row: int, shape: tuple[int, ...]) -> None:
        """Keep a whole tensor, to be written when it is done."""
        if row in self._held:
            self._held[row] = self._held.pop(row)
            return
        size = prod(shape) * self._places[row].dtype.itemsize
        while self._held and size + sum(x.nbytes for x in self._held.values()) > self.limit:
            self._let_go(next(iter(self._held)))
        self._held[row] = self.read(row, 0, shape)

    def _let_go(self, row: int) -> None:
        self.write(row, 0, self._held.pop(row))

    def write(self, row: int, first: int, values: Array) -> None:
        """Put entries in their place."""
        if row in self._held:
            self._held[row][first : first + len(values)] = values
            return
        place = self._places[row]
        each = prod(values.shape[1:]) * place.dtype.itemsize
        data = memoryview(np.ascontiguousarray(values).view(np.uint8).reshape(-1).data)
        at = place.start + first * each
        while data:
            done = os.pwrite(self._file(place), data[: 64 << 20], at)
            data, at = data[done:], at + done

    def dtype(self, row: int) -> np.dtype[Any]:
        """The type of a tensor in the result."""
        return self._places[row].dtype

    def finish(self) -> None:
        """Bring everything to disk."""
        for row in list(self._held):
            self._let_go(row)
        for file in self._open.values():
            os.fsync(file)

    def close(self) -> None:
        """Close the files."""
        self._held.clear()
        for file in self._open.values():
            os.close(file)
        self._open.clear()


# -- adding


def add_all(
    base: Base,
    addends: Sequence[Addend],
    checked: Checked,
    ready: Prepared,
    folder: Path,
    progress: Progress | None = None,
) -> None:
    """Add everything to a copy of the base that was written into a folder.

    Raises ``RefusedError`` where a sum leaves the range of its tensor's type.
    """
    largest = int(base.tensors.sizes.max(initial=0))
    reader, writer = Reader(base.source), Writer(folder, ready, max(_LEAST, largest))
    work = _Adding(base, addends, checked, reader, writer, progress)
    try:
        work.alone()
        work.together()
        writer.finish()
    finally:
        reader.close()
        writer.close()


@dataclass(slots=True)
class _Adding:
    base: Base
    addends: Sequence[Addend]
    checked: Checked
    reader: Reader
    writer: Writer
    progress: Progress | None
    done: set[int] = field(default_factory=set)
    bytes_done: int = 0
    bytes_asked: int = field(init=False)
    """Of all tensors that are changed."""

    def __post_init__(self) -> None:
        self.bytes_asked = int(self.base.tensors.sizes[list(self.checked.asked)].sum())

    def advance(self, row: int) -> None:
        if row not in self.done:
            self.done.add(row)
            self.bytes_done += int(self.base.tensors.sizes[row])
        if self.progress is not None:
            name = self.base.tensors.names[row]
            self.progress(f"adding {name}", self.bytes_done, self.bytes_asked)

    # -- what one adapter changes

    def alone(self) -> None:
        """Tensors that one addend changes."""
        alone = frozenset(row for row, count in self.checked.asked.items() if count == 1)
        for addend in self.addends:
            for piece in addend.pieces(partial(_any_of, addend, alone)):
                row = addend.find(piece.key)
                fault = _misfit(self.base, addend, piece.key, row, piece.shape)
                if fault is not None or row is None:
                    raise BadInputError(fault or ())
                if self.checked.asked[row] == 1 and row not in self.checked.replaced:
                    with _located(self.base.tensors.names[row], addend.where):
                        self._add_piece(row, piece, addend.weight)
                    self.advance(row)
        for row, found in self.checked.replaced.items():
            if self.checked.asked[row] == 1 and len(found) == 1:
                addend, replacement = found[0]
                with _located(self.base.tensors.names[row], addend.where):
                    self._put(row, replacement, addend.weight)
                self.advance(row)

    def _add_piece(self, row: int, piece: Piece, weight: float) -> None:
        shape = self.base.tensors.shapes[row]
        takes, values = _fitted(piece, shape)
        first, region = _rows(takes)
        count = int(takes[0].max()) + 1 - first if len(takes[0]) else 0
        if not count:
            return
        if any(len(take) < size for take, size in zip(takes[1:], shape[1:], strict=False)):
            self.writer.hold(row, shape)
        old = self.writer.read(row, first, (count, *shape[1:]))
        base = old
        if self.writer.dtype(row) != self.base.dtype(row):
            base = self.reader.rows(row, first, first + count)
        wide = base[region].astype(np.float64)
        if weight == 1.0:
            wide += values
        else:
            wide += values * weight
        new = cast_down(wide, old.dtype)
        old[region] = np.where(values == 0, old[region], new)
        self.writer.write(row, first, old)

    def _put(self, row: int, replacement: Replacement, weight: float) -> None:
        """A tensor, or rows of one, that one adapter has as they are to be."""
        shape, dtype = self.base.tensors.shapes[row] or (1,), self.writer.dtype(row)
        given = replacement.values
        if replacement.rows is not None:
            for at, number in enumerate(replacement.rows.tolist()):
                values = given[at : at + 1].astype(np.float64)
                self.writer.write(row, number, self._towards(row, number, values, weight, dtype))
            return
        step = max(1, HELD // max(1, prod(shape[1:])))
        given = given.reshape(shape)
        for first in range(0, shape[0], step):
            values = given[first : first + step].astype(np.float64)
            self.writer.write(row, first, self._towards(row, first, values, weight, dtype))

    def _towards(
        self, row: int, first: int, values: Wide, weight: float, dtype: np.dtype[Any]
    ) -> Array:
        if weight != 1.0:
            there = self.reader.rows(row, first, first + len(values)).astype(np.float64)
            values = there + (values - there) * weight
        return cast_down(values, dtype)

    # -- what several change

    def together(self) -> None:
        """Tensors that several addends may change: summed up before they are rounded."""
        rows = [row for row, count in self.checked.asked.items() if row not in self.done]
        rows = [row for row in rows if self._is_summed(row)]
        for batch in self._batches(rows):
            sums = {row: np.zeros((last - first, *shape[1:])) for row, first, last, shape in batch}
            begins = {row: first for row, first, _, _ in batch}
            for addend in self.addends:
                wanted = partial(_any_of, addend, frozenset(sums))
                for piece in addend.pieces(wanted):
                    row = addend.find(piece.key)
                    if row in sums:
                        self._sum(sums[row], begins[row], row, piece, addend.weight)
            for row, first, last, _ in batch:
                self._sum_replaced(sums[row], first, row)
                with _located(self.base.tensors.names[row], self.base.source.where):
                    self._add_rows(row, first, sums.pop(row))
                if last == (self.base.tensors.shapes[row] or (1,))[0]:
                    self.advance(row)

    def _is_summed(self, row: int) -> bool:
        return self.checked.asked[row] > 1 or row in self.checked.replaced

    def _batches(
        self, rows: Sequence[int]
    ) -> Iterator[list[tuple[int, int, int, tuple[int, ...]]]]:
        """Rows of tensors of which the sums are held at once: tensor, first and last row, shape."""
        tensors = self.base.tensors
        limit = max(_LEAST, int(tensors.sizes.max(initial=0))) // 8
        batch: list[tuple[int, int, int, tuple[int, ...]]] = []
        held = 0
        for row in rows:
            shape = tensors.shapes[row] or (1,)
            each = max(1, prod(shape[1:]))
            step = max(1, limit // each)
            for first in range(0, shape[0], step):
                last = min(first + step, shape[0])
                size = (last - first) * each
                # A tensor is in a batch once: the next rows of it are in another.
                if batch and (held + size > limit or batch[-1][0] == row):
                    yield batch
                    batch, held = [], 0
                batch.append((row, first, last, shape))
                held += size
        if batch:
            yield batch

    def _sum(self, total: Wide, begin: int, row: int, piece: Piece, weight: float) -> None:
        takes, values = _fitted(piece, self.base.tensors.shapes[row])
        inside = (takes[0] >= begin) & (takes[0] < begin + len(total))
        if not inside.any():
            return
        if not inside.all():
            takes, values = (takes[0][inside], *takes[1:]), values[inside]
        total[_index((takes[0] - begin, *takes[1:]))] += values * weight

    def _sum_replaced(self, total: Wide, begin: int, row: int) -> None:
        for addend, replacement in self.checked.replaced.get(row, ()):
            values = replacement.values
            if replacement.rows is None:
                values = values.reshape(self.base.tensors.shapes[row] or (1,))
                step = max(1, HELD // max(1, prod(values.shape[1:])))
                places = [(at, at, min(step, len(total) - at)) for at in range(0, len(total), step)]
                places = [(begin + source, at, count) for source, at, count in places]
            else:
                inside = [
                    (source, number - begin, 1)
                    for source, number in enumerate(replacement.rows.tolist())
                    if begin <= number < begin + len(total)
                ]
                places = inside
            for source, at, count in places:
                there = self.reader.rows(row, begin + at, begin + at + count).astype(np.float64)
                given = values[source : source + count].astype(np.float64)
                total[at : at + count] += (given - there) * addend.weight

    def _add_rows(self, row: int, begin: int, total: Wide) -> None:
        step = max(1, HELD // max(1, prod(total.shape[1:])))
        for at in range(0, len(total), step):
            values = total[at : at + step]
            takes = np.arange(begin + at, begin + at + len(values))
            piece = Piece("", "", "", (), (takes, *[None] * (values.ndim - 1)), values)
            self._add_piece(row, piece, 1.0)


def _any_of(addend: Addend, rows: frozenset[int], names: Sequence[str]) -> Want:
    """Asks for the tensors that are, or stand beside, some rows of the base."""
    return "entries" if any(addend.find(name) in rows for name in names) else "nothing"


def _fitted(piece: Piece, shape: tuple[int, ...]) -> tuple[tuple[Any, ...], Wide]:
    """Where a slice stands, dim by dim, and its values; ``shape`` may have dims of one position more or less."""
    values = piece.values
    sizes = shape or (1,)
    if piece.shape and len(piece.shape) != len(sizes):
        values = values.reshape(values.shape[: len(sizes)] + (1,) * (len(sizes) - values.ndim))
    takes = [
        np.arange(size) if take is None else np.asarray(take)
        for size, take in zip_longest(sizes, piece.takes[: len(sizes)])
    ]
    return tuple(takes), values


def _rows(takes: tuple[Any, ...]) -> tuple[int, Any]:
    """The first row of a slice, and where it stands from there on."""
    first = int(takes[0].min()) if len(takes[0]) else 0
    return first, _index((takes[0] - first, *takes[1:]))


def _index(takes: Sequence[Any]) -> Any:
    """An index for positions dim by dim; slices where positions follow one another, which copies nothing."""
    parts: list[Any] = []
    for take in takes:
        if (
            len(take)
            and int(take[-1]) - int(take[0]) == len(take) - 1
            and (np.diff(take) == 1).all()
        ):
            parts.append(slice(int(take[0]), int(take[-1]) + 1))
        else:
            return np.ix_(*takes)
    return tuple(parts)


@contextmanager
def _located(key: str, where: str) -> Iterator[None]:
    """Give what cannot be added the tensor and the adapter that it is about."""
    with _refusing(where), located(key, where):
        yield


__all__ = ["Checked", "add_all", "check", "float_type"]
