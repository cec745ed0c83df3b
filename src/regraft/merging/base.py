"""The base that adapters are added to, or that a tuned model is compared with: its headers, and what it is of.

A language model is one model under the names of its files. An image model has parts, each with names and a rule book
of its own, in one file or in the folders of a pipeline; a part alone, without the others, is a base as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from regraft.adapters.base_weights import spellings
from regraft.adapters.form import Array
from regraft.checkpoints.casting import TORCH, Cast, cast_dtypes
from regraft.checkpoints.companions import Companions, find_companions
from regraft.checkpoints.convert import file_name
from regraft.checkpoints.moves import Moves, identity
from regraft.checkpoints.parts import find_parts, is_parted
from regraft.checkpoints.per_expert import find_unstacked
from regraft.checkpoints.pipelines import DIFFUSERS, PIPELINES, part_by_book
from regraft.checkpoints.prepare import model_of
from regraft.checkpoints.prepared import Prepared
from regraft.checkpoints.result import write_prepared
from regraft.checkpoints.sharding import Layout, OutFile, lay_out
from regraft.checkpoints.source import CONFIG, Source, Tensors, open_checkpoint
from regraft.checkpoints.ties import without_ties
from regraft.checkpoints.tiles import read_into
from regraft.dialects.image.families import DENOISER, Family, family_named
from regraft.dialects.image.weights import SECOND
from regraft.errors import BadInputError, Finding, RegraftError, UnmatchedKeysError
from regraft.layouts.graph import Edge
from regraft.names.keys import group_names
from regraft.planning.build import build_plan
from regraft.planning.identify import Detected, detect
from regraft.planning.model import Foreign, ModelConfig
from regraft.planning.plan import Headers
from regraft.report import CheckpointReport
from regraft.rules.book import Book, built_in, library
from regraft.storage.dtypes import DTYPES
from regraft.storage.ranges import Ranges
from regraft.storage.weights import open_source
from regraft.values import replace


@dataclass(frozen=True, slots=True, eq=False)
class BasePart:
    """One model of an image model."""

    name: str
    """``denoiser``, or its folder's name."""
    layout: str
    """That of its names."""
    book: Book | None
    """What other layouts its names have; ``None`` where there are none."""
    rows: Mapping[str, int]
    """Rows of the base's tensors by the part's own names."""


@dataclass(slots=True, eq=False)
class Base:
    """A base, by its headers."""

    path: Path
    source: Source
    model: ModelConfig | None
    layout: str | None
    """``None`` where its names are the same in every layout."""
    evidence: tuple[str, ...]
    any_layout: str = ""
    """A layout for which its names may be taken where they are the same in all."""
    parts: dict[str, BasePart] = field(default_factory=dict)
    """Those of an image model by name; none of a language model."""
    family: Family | None = None
    """That of an image model."""
    quantised: frozenset[str] = frozenset()
    """Weights whose numbers are others than those that stand there."""
    method: str | None = None
    """What quantised them."""
    untied: bool = False
    """Whether it has one tensor more than its files: an output that was tied to the input embeddings."""
    rows: dict[str, int] = field(default_factory=dict)
    """Rows of the tensors by name."""

    @property
    def is_image(self) -> bool:
        """Whether it is a model of images or videos."""
        return self.family is not None

    @property
    def tensors(self) -> Tensors:
        """Names, shapes, types and places."""
        return self.source.tensors

    def find(self, name: str) -> int | None:
        """The row of a language model's tensor; a leading ``model.`` may be there or not."""
        return next((self.rows[x] for x in spellings(name) if x in self.rows), None)

    def dtype(self, row: int) -> np.dtype[np.generic] | None:
        """The type of a tensor's numbers; ``None`` where nothing can be added to them."""
        return float_type(self.tensors.dtypes[row])

    def fault(self, row: int | None, key: str, where: str) -> Finding | None:
        """Why nothing can be added to a tensor that is called ``key``; ``None`` where it can."""
        if row is None and self.method is None:
            return Finding(
                "wrong-base",
                "the base has no weight of this name",
                where=where,
                key=key,
                fix="give the base that it was trained on",
            )
        if row is None:  # its numbers stand under other names
            return self._packed(f"quantised with {self.method}", key, where)
        name = self.tensors.names[row]
        if self.dtype(row) is not None and not self.quantised.intersection(spellings(name)):
            return None
        how = f"quantised with {self.method}" if self.method else f"of {self.tensors.dtypes[row]}"
        return self._packed(how, name, where)

    @staticmethod
    def _packed(how: str, key: str, where: str) -> Finding:
        return Finding(
            "no-image",
            f"the base's tensor is {how}, and nothing can be added to packed or scaled numbers",
            where=where,
            key=key,
            fix="give the base as it was before it was quantised",
        )

    def untie(self, head: str, owner: int) -> None:
        """Give an output that is tied to the input embeddings a tensor of its own, with their bytes."""
        t = self.tensors
        made = Tensors(
            [*t.names, head],
            [*t.dtypes, t.dtypes[owner]],
            [*t.shapes, t.shapes[owner]],
            np.append(t.files, t.files[owner]),
            np.append(t.starts, t.starts[owner]),
            np.append(t.sizes, t.sizes[owner]),
        )
        self.source = replace(self.source, tensors=made)
        self.rows[head] = len(t)
        self.untied = True


def float_type(dtype: str) -> np.dtype[np.generic] | None:
    """The numpy type of floating-point numbers by the format's name; ``None`` for others, and for packed ones."""
    found = DTYPES[dtype]
    kind = found.numpy.name.startswith(("float", "bfloat")) and dtype != "F8_E8M0"
    return found.numpy if found.per_cell == 1 and kind else None


class Reader:
    """Rows of a base's tensors, read from its files when they are asked for, and nothing else."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._open: dict[int, Ranges] = {}

    def rows(self, row: int, first: int, last: int) -> Array:
        """Some entries along the first dim of a tensor, as they are stored."""
        t = self.source.tensors
        dtype, shape = DTYPES[t.dtypes[row]].numpy, t.shapes[row]
        if not shape:
            first, last, shape = 0, 1, (1,)
        each = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        data = self._read(row, (last - first) * each, int(t.starts[row]) + first * each)
        return np.frombuffer(data, dtype).reshape(last - first, *shape[1:])

    def pieces(self, row: int, size: int = 4 << 20) -> Iterator[bytearray]:
        """The bytes of a tensor, some at a time."""
        t = self.source.tensors
        start, end = int(t.starts[row]), int(t.starts[row] + t.sizes[row])
        for at in range(start, end, size):
            yield self._read(row, min(size, end - at), at)

    def _read(self, row: int, size: int, start: int) -> bytearray:
        number = int(self.source.tensors.files[row])
        if number not in self._open:
            self._open[number] = open_source(self.source.files[number])
        return read_exactly(self._open[number], size, start)

    def whole(self, row: int) -> Array:
        """A whole tensor."""
        shape = self.source.tensors.shapes[row]
        return self.rows(row, 0, shape[0] if shape else 1).reshape(shape)

    def close(self) -> None:
        """Close its files."""
        for file in self._open.values():
            file.close()
        self._open.clear()


def read_exactly(file: int | Ranges, size: int, start: int) -> bytearray:
    """Bytes of a file from a place.

    Raises ``EOFError`` where it ends before.
    """
    data = bytearray(size)
    read_into(file, memoryview(data), start)
    return data


# -- opening


def open_base(path: Path, source: str | None, foreign: Foreign | None) -> Base:
    """Read the headers of a base and find out what it is.

    ``source`` is what was said of its layout.

    Raises what opening and detecting a checkpoint raise.
    """
    opened = open_checkpoint(path)
    if is_parted(opened):
        return _of_parts(path, opened, source)
    config = model_of(opened, None)
    companions = find_companions(opened, config.data if config is not None else None)
    try:
        known = detect(
            companions.headers,
            config,
            opened.where,
            source,
            foreign,
            unstack=partial(find_unstacked, companions),
        )
    except UnmatchedKeysError:
        alone = _same_in_both(companions.headers) if config is None else None
        if alone is None:
            raise
        known = alone
    usual = known.layout or _usual_layout(known)
    base = Base(path, opened, config, known.layout, known.evidence, usual)
    base.rows = {name: row for row, name in enumerate(opened.tensors.names)}
    _note_quantised(base, companions)
    part = part_by_book(known.books) if config is None else None
    if part is not None:
        pipeline = next(p for p in PIPELINES if part in p.parts)
        base.family = family_named(pipeline.name)
        name = DENOISER if part is pipeline.parts[0] else part.name
        layout = known.layout or DIFFUSERS
        base.parts = {name: BasePart(name, layout, known.books[0], base.rows)}
    return base


def open_result(ready: Prepared, layout: str) -> Base:
    """The base that a conversion is about to make, by its headers: what is added to it is added where it stands then.

    There is nothing to read of it before it is made.
    """
    moves = ready.moves
    files = np.zeros(len(moves.names), dtype=np.int64)
    starts = files.copy()
    for number, file in enumerate(ready.layout.files):
        files[file.targets], starts[file.targets] = number, file.starts
    tensors = Tensors(moves.names, ready.dtypes, moves.shapes, files, starts, moves.sizes)
    source = replace(ready.source, tensors=tensors, files=())
    model = model_of(ready.source, None)
    base = Base(ready.source.root, source, model, layout, ready.known.evidence, layout)
    base.rows = {name: row for row, name in enumerate(moves.names)}
    _note_quantised(base, find_companions(source, json.loads(ready.config or b"{}")))
    return base


def _note_quantised(base: Base, companions: Companions) -> None:
    told = companions.quantization
    if told is not None:
        ids = companions.weights().tolist()
        base.quantised = frozenset(companions.headers.name(i) for i in ids)
        base.method = told.title


def _same_in_both(headers: Headers) -> Detected | None:
    """A denoiser by itself whose names are diffusers' in its single file, too, so that they tell no layout."""
    for pipeline in PIPELINES:
        book = next(b for b in (*library(), *built_in()) if b.name == pipeline.parts[0].book)
        try:
            plan = build_plan(headers, [Edge.out_of(book, DIFFUSERS)])
        except RegraftError:
            continue
        if {group.template for group in plan.targets()} == {g.template for g in headers.groups}:
            told = f"the names are those of {pipeline.title}"
            return Detected((book,), {}, None, (told,))
    return None


def _usual_layout(known: Detected) -> str:
    """The layout that names are taken for which are the same in several."""
    layouts = [layout for book in known.books for layout in book.layouts]
    usual = (layout for layout in layouts if layout.startswith("transformers"))
    return next(usual, layouts[0] if layouts else "")


def _of_parts(path: Path, source: Source, layout: str | None) -> Base:
    found = find_parts(source, layout)
    base = Base(path, source, None, found.layout, (found.evidence,))
    base.family = family_named(found.pipeline.name)
    base.rows = {name: row for row, name in enumerate(source.tensors.names)}
    books = {book.name: book for book in (*library(), *found.books)}
    for piece in found.pieces:
        name = DENOISER if piece.part is found.pipeline.parts[0] else piece.part.name
        rows = dict(zip(piece.tensors.names, piece.rows.tolist(), strict=True))
        base.parts[name] = BasePart(name, found.layout, books.get(piece.part.book), rows)
    second = {
        name.removeprefix(f"{SECOND}/"): row
        for name, row in base.rows.items()
        if source.parted and name.startswith(f"{SECOND}/")
    }
    if second and DENOISER in base.parts:
        first = base.parts[DENOISER]
        base.parts[SECOND] = BasePart(SECOND, first.layout, first.book, second)
    return base


# -- writing one like it


def prepare_like(
    base: Base,
    dst: Path,
    casts: Sequence[Cast],
    shard_size: int | None = None,
) -> tuple[Prepared, str | None]:
    """A copy of a base, ready to be written, and the file's name where it is one file.

    Raises ``BadInputError`` where the destination does not fit.
    """
    source = base.source
    if source.parted and dst.suffix == ".safetensors" and not dst.is_dir():
        message = "the base is the folder of a pipeline, and this is the name of one file"
        raise BadInputError(
            Finding("destination-is-file", message, where=str(dst), fix="name a folder to write")
        )
    name = file_name(base.path, dst, shard_size)
    moves = identity(source.tensors)
    kept = base.quantised & set(moves.names)
    dtypes, changed = cast_dtypes(moves.names, moves.dtypes, casts, kept)
    indexes: dict[str, bytes] = {}
    if source.parted:
        layout, indexes = _lay_out_folders(source, dtypes, shard_size)
    else:
        layout = lay_out(source, moves, dtypes, shard_size, name)
        if layout.index is not None and not layout.files[0].name.startswith("model"):
            indexes[_index_of(layout)] = layout.index
            layout = replace(layout, index=None)
    said = base.layout or "any layout"
    report = CheckpointReport(
        said,
        said,
        list(base.evidence),
        tensors_in=len(source.tensors) - base.untied,
        tensors_out=len(moves.names),
        bytes=layout.size,
        files=[file.name for file in layout.files],
        others=[str(path) for path in source.others],
        carried=len(moves.names),
        casts=changed,
        notes=list(source.notes),
    )
    if source.left_out:
        report.notes.append(
            "left out, because they hold weights in another form or lie elsewhere: "
            + ", ".join(source.left_out)
        )
    known = Detected((), {}, base.layout, base.evidence)
    config = _config(base, casts, report)
    if name is not None and report.config:
        report.notes.append(
            f"a file is written, and {source.root / CONFIG} stays as it is; the result's would be another: "
            + "; ".join(report.config)
        )
    ready = Prepared(source, known, None, moves, dtypes, layout, config, report, written=indexes)
    return ready, name


def _config(base: Base, casts: Sequence[Cast], report: CheckpointReport) -> bytes | None:
    """The config.json of the result."""
    beside = base.source.config
    if beside is None:
        return None
    config = dict(base.source.config_data)
    ordered = list(config) == sorted(config)
    whole = next((cast for cast in reversed(casts) if cast.pattern == "*"), None)
    for name in ("dtype", "torch_dtype"):
        if whole is not None and config.get(name) not in (None, TORCH[whole.dtype]):
            config[name] = TORCH[whole.dtype]
            report.config.append(f"{name} is now {config[name]}")
    if base.untied:
        config = without_ties(config)
        report.config.append("tie_word_embeddings is now false")
    if not report.config:
        return beside.text.encode()
    return (json.dumps(config, indent=2, sort_keys=ordered) + "\n").encode()


def _lay_out_folders(
    source: Source, dtypes: Sequence[str], shard_size: int | None
) -> tuple[Layout, dict[str, bytes]]:
    """The files of a pipeline's folders, as they are."""
    files: list[OutFile] = []
    indexes: dict[str, bytes] = {}
    folders: dict[str, list[int]] = {}
    for row, name in enumerate(source.tensors.names):
        folders.setdefault(name.partition("/")[0], []).append(row)
    for folder, rows in folders.items():
        own = _folder_of(source, folder, rows)
        moves: Moves = identity(own.tensors)
        layout = lay_out(own, moves, [dtypes[row] for row in rows], shard_size)
        taken = np.array(rows, dtype=np.int64)
        files += (
            replace(file, name=f"{folder}/{file.name}", targets=taken[file.targets])
            for file in layout.files
        )
        if len(layout.files) > 1 and layout.index is not None:
            indexes[f"{folder}/{_index_of(layout)}"] = layout.index
    return Layout(tuple(files), None), indexes


def _index_of(layout: Layout) -> str:
    """What the index of some shards is called."""
    stem = layout.files[0].name.rpartition("-of-")[0].rpartition("-")[0]
    return f"{stem or 'model'}.safetensors.index.json"


def _folder_of(source: Source, folder: str, rows: list[int]) -> Source:
    """One folder of a pipeline as a checkpoint of its own."""
    whole, taken = source.tensors, np.array(rows, dtype=np.int64)
    numbers, files = np.unique(whole.files[taken], return_inverse=True)
    before = f"{folder}/"
    tensors = Tensors(
        [whole.names[row].removeprefix(before) for row in rows],
        [whole.dtypes[row] for row in rows],
        [whole.shapes[row] for row in rows],
        files.astype(np.int64),
        whole.starts[taken],
        whole.sizes[taken],
    )
    own = (source.files[number] for number in numbers.tolist())
    return replace(
        source,
        files=tuple(replace(file, name=file.name.removeprefix(before)) for file in own),
        tensors=tensors,
        index=None,
        others=(),
        parted=False,
    )


def headers_of(names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Headers:
    """Headers of tensors of which only names and shapes matter."""
    return Headers(group_names(list(names)), list(shapes), ["float32"] * len(names))


__all__ = [
    "CONFIG",
    "Base",
    "BasePart",
    "Reader",
    "float_type",
    "headers_of",
    "open_base",
    "prepare_like",
    "read_exactly",
    "write_prepared",
]
