"""Slices of a checkpoint in another layout: which bytes of its files each part of a tensor needs, and reading them.

For readers that hold a part of a model each: ranks of tensor, expert or sharded data parallelism, engines with
loaders of their own, and people who want to know how much each of them will read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import numpy as np

from regraft.checkpoints.gather import Bytes, Files, Fill, byte_runs, fill_slices
from regraft.checkpoints.moves import size_of, slicer_of
from regraft.checkpoints.prepare import Prepared
from regraft.checkpoints.reads import check_reads
from regraft.checkpoints.source import Source
from regraft.errors import BadInputError, Finding, RefusedError
from regraft.planning.plan import Plan
from regraft.planning.slices import Region, Slicer, Strips, shape_of_region
from regraft.storage.dtypes import DTYPES

BoxLike = Sequence[Any] | None
"""For each dim a pair (from, to), a slice, a list of pairs, or ``None`` for all of it; ``None`` for the whole."""
Boxes = BoxLike | Mapping[str, BoxLike] | Callable[[str, tuple[int, ...]], BoxLike]
"""One for all tensors, some by name, or a function of a name and a shape."""


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes of a source file that lie side by side."""

    file: str
    """Relative to the checkpoint."""
    at: int
    """From the file's start, in bytes."""
    size: int
    """In bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """A part of one tensor of the result."""

    target: str
    whole: tuple[int, ...]
    """The shape of the tensor that it is a part of."""
    dtype: str
    """The format's name, such as ``BF16``."""
    region: Region
    """For each dim the ranges of indices that it has, side by side."""
    strips: tuple[Strips, ...]
    _source: Source

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the slice, in elements."""
        return shape_of_region(self.region)

    @property
    def bytes(self) -> int:
        """How many bytes the slice has; exactly these are read."""
        return size_of(self.dtype, self.shape)

    @property
    def runs(self) -> list[Run]:
        """The bytes that it is made of, file by file."""
        item = max(1, DTYPES[self.dtype].bits // 8)
        files = self._source.files
        found = byte_runs(self.strips, self._source.tensors, item)
        return [Run(files[number].name, at, size) for number, at, size in found]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `SliceReport` has it."""
        box: list[list[Any]] = [
            list(ranges[0]) if len(ranges) == 1 else [list(span) for span in ranges]
            for ranges in self.region
        ]
        return asdict(
            SliceReport(self.target, list(self.whole), self.dtype, box, self.runs, self.bytes)
        )


@dataclass(frozen=True, slots=True)
class SliceReport:
    """A part of one tensor of the result, and the bytes that it is made of."""

    target: str
    shape: list[int]
    """Of the whole tensor."""
    dtype: str
    """The format's name, such as ``BF16``."""
    box: list[list[Any]]
    """For each dim from where, and up to but without; several of such pairs where a dim has several ranges."""
    runs: list[Run]
    bytes: int
    """How many bytes the slice has; exactly these are read."""


@dataclass(frozen=True, slots=True)
class SlicesReport:
    """Which bytes of a checkpoint some parts of its tensors in another layout are made of."""

    layout: str
    bytes: int
    """Of all slices together."""
    slices: list[SliceReport]


class Slices(Sequence[Slice]):
    """Slices of one checkpoint, in the order of the result's tensors."""

    def __init__(
        self, source: Source, layout: str, items: Iterable[Slice], plan: Plan | None = None
    ) -> None:
        self.source, self.layout, self.plan = source, layout, plan
        self._items = tuple(items)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, at: Any) -> Any:
        return self._items[at]

    def __iter__(self) -> Iterator[Slice]:
        return iter(self._items)

    @property
    def bytes(self) -> int:
        """Of all slices together."""
        return sum(item.bytes for item in self._items)

    @property
    def runs(self) -> list[Run]:
        """All bytes that are read, file by file, joined where they meet."""
        found = sorted(
            ((run.file, run.at, run.size) for item in self._items for run in item.runs),
        )
        joined: list[Run] = []
        for file, at, size in found:
            last = joined[-1] if joined else None
            if last is not None and last.file == file and last.at + last.size == at:
                joined[-1] = Run(file, last.at, last.size + size)
            else:
                joined.append(Run(file, at, size))
        return joined

    def read(self, out: Mapping[str, Any] | None = None, jobs: int | None = None) -> dict[str, Any]:
        """Read the slices; each as a numpy array of its shape and type.

        Args:
            out: for some or all targets what to read into: a writable buffer or numpy array, or a torch tensor on the
                CPU, contiguous and of the slice's size.
            jobs: how many threads read; as many as there are cores where it is not given.

        Raises:
            BadInputError: a file changed since its header was read; a buffer does not fit; copies that would become one
                tensor differ.
        """
        out = out or {}
        targets = [item.target for item in self._items]
        findings = [_no_target(name, targets) for name in out if name not in targets]
        made: dict[str, Any] = {}
        fills = []
        for item in self._items:
            try:
                made[item.target], view = _memory(item, out.get(item.target))
            except BadInputError as error:
                findings += error.findings
                continue
            fills.append(Fill(view, item.strips, max(1, DTYPES[item.dtype].bits // 8)))
        if findings:
            raise BadInputError(findings)
        if self.plan is not None:
            check_reads(self.plan, self.source)
        with Files(self.source.files) as files:
            fill_slices(fills, self.source.tensors, files, jobs or os.cpu_count() or 1)
            files.check()
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `SlicesReport` has it."""
        items = [item.to_dict() for item in self._items]
        return {"layout": self.layout, "bytes": self.bytes, "slices": items}


def _memory(item: Slice, buffer: Any) -> tuple[Any, Bytes]:
    """Where a slice is read to: the array for the caller, and its bytes."""
    dtype = DTYPES[item.dtype]
    if buffer is None:
        view = np.empty(item.bytes, np.uint8)
        shape = item.shape
        if dtype.per_cell > 1:
            shape = (*shape[:-1], shape[-1] // dtype.per_cell)
        return view.view(dtype.numpy).reshape(shape), view
    try:
        if hasattr(buffer, "untyped_storage"):
            torch = import_module("torch")
            view = buffer.detach().reshape(-1).view(torch.uint8).numpy()
            dense = buffer.is_contiguous()
        else:
            array = np.asarray(memoryview(buffer)) if not hasattr(buffer, "reshape") else buffer
            dense = array.flags.c_contiguous
            view = array.reshape(-1).view(np.uint8) if dense else np.empty(0, np.uint8)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _no_room(item, f"it takes no bytes ({error})") from None
    if not dense:
        raise _no_room(item, "its elements do not lie side by side")
    if not view.flags.writeable:
        raise _no_room(item, "it is read-only")
    if view.nbytes != item.bytes:
        raise _no_room(item, f"it has {view.nbytes} bytes, and the slice {item.bytes}")
    return buffer, view


def _no_room(item: Slice, why: str) -> BadInputError:
    fix = f"give a writable array of the shape {list(item.shape)} and the type {item.dtype}"
    return BadInputError(
        Finding("out-buffer", f"it cannot be read into `out`: {why}", key=item.target, fix=fix)
    )


def cut(
    ready: Prepared,
    names: Iterable[str] | None = None,
    box: Boxes = None,
) -> Slices:
    """The slices of a conversion that is ready; see `regraft.slices`.

    Raises ``BadInputError`` for a name that the result does not have, or a box that does not fit.
    """
    moves, tensors = ready.moves, ready.source.tensors
    slicer = slicer_of(moves, tensors)
    at = {name: number for number, name in enumerate(moves.names)}
    findings: list[Finding] = []
    wanted = list(moves.names) if names is None else list(dict.fromkeys(names))
    asked = [*wanted, *box] if isinstance(box, Mapping) else wanted
    findings += [_no_target(name, moves.names) for name in dict.fromkeys(asked) if name not in at]
    items = []
    for name in wanted:
        if name not in at:
            continue
        number = at[name]
        shape, dtype = moves.shapes[number], moves.dtypes[number]
        given = _box_for(box, name, shape)
        try:
            region = read_region(given, shape, name)
            strips = strips_of(slicer, name, shape, dtype, region)
        except (BadInputError, RefusedError) as error:
            findings += error.findings
            continue
        items.append(Slice(name, shape, dtype, region, tuple(strips), ready.source))
    if findings:
        raise BadInputError(findings)
    return Slices(ready.source, ready.report.target_layout, items, ready.plan)


def strips_of(
    slicer: Slicer, name: str, shape: tuple[int, ...], dtype: str, region: Region
) -> list[Strips]:
    """What fills a region of a target; of elements below a byte as bytes, and whole tensors only.

    Raises ``RefusedError``.
    """
    if DTYPES[dtype].bits % 8 == 0:
        return slicer.strips(name, region)
    if region != tuple(((0, size),) for size in shape):
        message = f"its elements are packed ({dtype}), and a part of it is asked for"
        raise RefusedError(Finding("packed", message, key=name, fix="ask for the whole tensor"))
    one, none = np.full(1, slicer.first(name)), np.zeros(1, dtype=np.int64)
    return [Strips((size_of(dtype, shape),), (1,), (1,), one, none, none)]


def _box_for(box: Any, name: str, shape: tuple[int, ...]) -> BoxLike:
    if callable(box):
        return box(name, shape)  # type: ignore[no-any-return]
    return box.get(name) if isinstance(box, Mapping) else box


def read_region(box: BoxLike, shape: tuple[int, ...], name: str) -> Region:
    """A box as people write it; dims that it does not speak of are whole.

    >>> read_region([(0, 2), None, [(0, 1), (3, 4)]], (4, 5, 6, 7), "w")
    (((0, 2),), ((0, 5),), ((0, 1), (3, 4)), ((0, 7),))

    Raises ``BadInputError`` for one that does not fit the shape.
    """
    given = list(box) if box is not None else []
    if len(given) > len(shape):
        raise _bad_box(name, shape, f"it has {len(given)} dims")
    given += [None] * (len(shape) - len(given))
    return tuple(_ranges(part, size, shape, name) for part, size in zip(given, shape, strict=True))


def _ranges(part: Any, size: int, shape: tuple[int, ...], name: str) -> tuple[tuple[int, int], ...]:
    if part is None:
        return ((0, size),)
    if isinstance(part, slice):
        if part.step not in (None, 1):
            raise _bad_box(name, shape, f"{part} has a step")
        low, high, _ = part.indices(size)
        return ((low, max(low, high)),)
    several = isinstance(part, list) and all(isinstance(span, tuple | list) for span in part)
    ranges = []
    for span in part if several else [part]:
        if not isinstance(span, tuple | list) or len(span) != 2 or not all(map(_is_index, span)):
            raise _bad_box(name, shape, f"{part!r} is no range")
        low, high = (int(edge) for edge in span)
        if not 0 <= low <= high <= size:
            raise _bad_box(name, shape, f"the range {low} to {high} is not within 0 to {size}")
        ranges.append((low, high))
    return tuple(ranges)


def _is_index(edge: Any) -> bool:
    return hasattr(edge, "__index__") and not isinstance(edge, bool)


def _bad_box(name: str, shape: tuple[int, ...], why: str) -> BadInputError:
    fix = "give a pair (from, to) for each dim, or None for all of it"
    message = f"the box does not fit the shape {list(shape)}: {why}"
    return BadInputError(Finding("bad-box", message, key=name, fix=fix))


def _no_target(name: str, names: Iterable[str]) -> Finding:
    near = get_close_matches(name, list(names), 1)
    fix = (
        f"names are those of the result; the nearest is {near[0]}"
        if near
        else "names are those of the result"
    )
    return Finding("no-such-key", "the result has no tensor of this name", key=name, fix=fix)
