"""Extracting: what tuning changed in a model, as an adapter for the model that it was tuned from."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from regraft.adapters.form import Array, is_finite
from regraft.arrays.pieces import HELD, Wide
from regraft.bridges.transformers.files import InstalledTransformers
from regraft.checkpoints.casting import parse_casts
from regraft.checkpoints.sharding import parse_size
from regraft.checkpoints.ties import is_input, is_output
from regraft.dialects.names import layout_named
from regraft.errors import BadInputError, Finding, RefusedError
from regraft.merging.base import Base, Reader, float_type, open_base
from regraft.merging.extraction import Extracted, Extraction
from regraft.merging.low_rank import NoRoomError, Spectrum, spectrum, spectrum_within
from regraft.merging.matrix import Matrix
from regraft.merging.output_image import ImageOutput
from regraft.merging.output_language import LanguageOutput
from regraft.report import logged, show_size
from regraft.rules.book import Rules, only_books, rules_words
from regraft.rules.kinds import IN, KINDS, OUT
from regraft.rules.said import saying
from regraft.sources.places import check_there
from regraft.storage.dtypes import DTYPES
from regraft.storage.folder import check_destination

Progress = Callable[[str, int, int], None]
Path_ = str | os.PathLike[str]

_SHOWN = 20
_LEAST_ROOM = 128 << 20
"""Bytes that may be held for one matrix in any case."""


@logged
def extract(
    base: Path_,
    tuned: Path_,
    dst: Path_,
    *,
    rank: int | None = None,
    error: float | None = None,
    to: str | None = None,
    full: bool = False,
    skip: Sequence[str] = (),
    dtype: str = "float32",
    memory: str | None = None,
    source: str | None = None,
    architecture: str | None = None,
    rules: Rules = (),
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Extraction:
    """Take what tuning changed in a model, as a LoRA of a rank or within an error.

    The change of each matrix (a convolution's too, and each expert's) is computed in float64 and replaced by factors
    of low rank: to 1e-4 as good as the best ones. How far they are off is measured on them as they are written.
    Tensors that did not change are left out, and counted. No more is held at a time than three times the models'
    largest tensor; factors that are done wait in a file.

    Args:
        base: the model that was tuned: a language, image or video model, as `regraft.merge` takes it.
        tuned: the tuned model, in the same layout, with the same tensors of the same shapes.
        dst: the adapter's folder, or its file where the dialect is one file.
        rank: the rank of the factors; lower where a matrix is smaller.
        error: instead of a rank: the lowest one for each matrix whose factors are off by no more than this, relative
            to the norm of its change (``0.1``).
        to: the dialect, or the layout, to write; PEFT for language models, diffusers for others where it is not
            given.
        full: keep as a whole what is no matrix of a module (norms, biases) where it changed. Refused otherwise.
        skip: patterns of names that may be left out although they changed. They are reported.
        dtype: the type of the factors.
        memory: how much may be held at a time (``4GB``), in place of three times the largest tensor.
        source: the family of the models, where names do not tell it.
        architecture: the class of the model, where its ``config.json`` names none that transformers has.
        rules: rule books to use in place of regraft's, as `regraft.convert` takes them.
        overwrite: replace ``dst`` if it exists.
        dry_run: do everything but write.
        progress: told how far it is.

    Returns:
        The rank, the relative error and the singular mass of each target, and what else changed.

    Raises:
        BadInputError: the two models have other layouts, tensors or shapes, or nothing changed.
        RefusedError: something changed that is no matrix, and nothing says what is to become of it; or the factors
            of a matrix take more memory than may be held.
    """
    with ExitStack() as stack:
        stack.enter_context(only_books(rules))
        stack.enter_context(saying(architecture=architecture))
        stack.enter_context(saying(family=source))
        wanted = _Wanted(rank, error, *(DTYPES[c.dtype].numpy for c in parse_casts([dtype])))
        foreign = InstalledTransformers()
        check_there(Path(base), Path(tuned))
        one, other = (open_base(Path(path), None, foreign) for path in (base, tuned))
        pairs = _paired(one, other)
        to_layout = layout_named(to) if to is not None else None
        kind: type[LanguageOutput | ImageOutput] = ImageOutput if one.is_image else LanguageOutput
        output = kind(one, Path(os.path.realpath(dst)), to_layout, foreign)
        made = Extraction(
            str(base),
            str(tuned),
            str(dst),
            one.layout or "any layout",
            output.to,
            written=not dry_run,
        )
        if not dry_run:
            for path in (base, tuned):
                check_destination(Path(path), output.dst, overwrite=overwrite, file=output.file)
        largest = int(one.tensors.sizes.max(initial=0))
        room = parse_size(memory) if memory is not None else max(3 * largest, _LEAST_ROOM)
        work = _Extracting(one, other, output, wanted, made, tuple(skip), full, room)
        work.run(pairs, progress)
        made.notes += output.write(made, overwrite=overwrite, dry_run=dry_run)
        return made


@dataclass(frozen=True, slots=True)
class _Wanted:
    """How good factors are to be, and of what type."""

    rank: int | None
    error: float | None
    dtype: np.dtype[Any]

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.error is None):
            message = "it takes a rank or an error, one of the two"
            raise BadInputError(Finding("option", message, fix="say --rank 32, or --error 0.1"))
        if self.rank is not None and self.rank < 1:
            raise BadInputError(Finding("option", f"a rank is at least 1, not {self.rank}"))
        if self.error is not None and not 0 <= self.error < 1:
            message = f"an error is relative to the change, from 0 to 1, not {self.error}"
            raise BadInputError(Finding("option", message))


# -- the two models


def _paired(one: Base, other: Base) -> list[tuple[str, int, int]]:
    """The tensors of both models: the name, and the row in each.

    Raises ``BadInputError`` with everything in which the two are not one model before and after.
    """
    where = str(other.path)
    if one.is_image != other.is_image or one.family != other.family:
        titles = [
            b.family.title if b.family is not None else "a language model" for b in (one, other)
        ]
        message = f"BASE is {titles[0]}, and TUNED is {titles[1]}"
        fix = "give the model that was tuned, and what became of it"
        raise BadInputError(Finding("wrong-base", message, where=where, fix=fix))
    if None not in (one.layout, other.layout) and one.layout != other.layout:
        raise BadInputError(
            Finding(
                "other-layouts",
                f"it is in the layout {other.layout}, and the base is in {one.layout}",
                where=where,
                fix="convert it first: "
                + shlex.join(
                    ["regraft", "convert", "TUNED", "OUT", "--to", str(one.layout), *rules_words()]
                ),
            )
        )
    rows = {**_tied(one, other), **one.rows}
    others = {**_tied(other, one), **other.rows}
    findings = []
    for name in sorted(rows.keys() ^ others.keys()):
        lacks, has = ("TUNED", "BASE") if name in rows else ("BASE", "TUNED")
        message = f"{lacks} does not have this tensor, and {has} does"
        fix = "give two models with the same parts, of the same size"
        findings.append(Finding("wrong-base", message, where=where, key=name, fix=fix))
    for name in rows.keys() & others.keys():
        shapes = [b.tensors.shapes[r] for b, r in ((one, rows[name]), (other, others[name]))]
        if shapes[0] != shapes[1]:
            message = f"it has the shape {shapes[1]} in TUNED, and {shapes[0]} in BASE"
            fix = "give the model that was tuned; a resized vocabulary is another one"
            findings.append(Finding("shape", message, where=where, key=name, fix=fix))
    for base, some in ((one, rows), (other, others)):
        faults = (
            base.fault(row, name, str(base.path))
            for name, row in some.items()
            if _packed(base, name)
        )
        findings += [fault for fault in faults if fault is not None]
    if findings:
        more = len(findings) - _SHOWN
        if more > 0:
            findings = findings[:_SHOWN]
            findings.append(Finding("wrong-base", f"and {more} tensors more", where=where))
        raise BadInputError(findings)
    return [(name, row, others[name]) for name, row in rows.items()]


def _packed(base: Base, name: str) -> bool:
    return name in base.quantised


def _tied(base: Base, other: Base) -> dict[str, int]:
    """An output that this model ties to its input embeddings, and that the other one has as a tensor."""
    inputs = [name for name in base.rows if is_input(name)]
    if base.is_image or not inputs or any(is_output(name) for name in base.rows):
        return {}
    return {name: base.rows[inputs[0]] for name in other.rows if is_output(name)}


# -- the changes


@dataclass(slots=True)
class _Extracting:
    one: Base
    other: Base
    output: LanguageOutput | ImageOutput
    wanted: _Wanted
    made: Extraction
    skip: tuple[str, ...]
    full: bool
    room: int
    """Bytes that may be held at a time."""
    lost: float = 0.0
    norm: float = 0.0

    def run(self, pairs: Sequence[tuple[str, int, int]], progress: Progress | None) -> None:
        """Look at every tensor; those that changed go to the output.

        Raises ``RefusedError`` with everything that is no matrix, ``BadInputError`` where nothing changed.
        """
        readers = Reader(self.one.source), Reader(self.other.source)
        findings: list[Finding] = []
        try:
            for number, (name, row, there) in enumerate(pairs):
                if progress is not None:
                    progress(name, number, len(pairs))
                if _same_bytes(readers, row, there):
                    self.made.unchanged += 1
                else:
                    findings += self._changed(name, row, there, readers)
        finally:
            for reader in readers:
                reader.close()
        if findings:
            raise RefusedError(findings)
        if not self.made.targets and not self.made.whole:
            raise BadInputError(
                Finding(
                    "empty",
                    "the two models are the same, so there is nothing to extract"
                    if not self.made.skipped
                    else "everything that changed was left out",
                    where=str(self.other.path),
                    fix="give the tuned model second",
                )
            )
        self.made.error = float(np.sqrt(self.lost / self.norm)) if self.norm else 0.0

    def _changed(
        self, name: str, row: int, there: int, readers: tuple[Reader, Reader]
    ) -> list[Finding]:
        types = [float_type(b.tensors.dtypes[r]) for b, r in ((self.one, row), (self.other, there))]
        if None in types:
            return [self._refusal(name, "it holds no floating-point numbers, and they changed")]
        change = _Change(readers, (row, there), self.one.tensors.shapes[row])
        differs, finite = change.look()
        if not differs:
            self.made.unchanged += 1
            return []
        if any(fnmatchcase(name, pattern) for pattern in self.skip):
            self.made.skipped.append(name)
            return []
        if not finite:
            return [self._refusal(name, "its change has NaN or infinite values", "not-finite")]
        kind = self.output.kind_of(name)
        if kind is not None:
            return self._factor(name, change, kind)
        why = self.output.why_not_whole(name)
        if not self.full or why is not None:
            reason = why or "it is no matrix of a module, so its change is not a LoRA"
            return [self._refusal(name, reason)]
        self.output.add_whole(name, change.whole(), readers[1].whole(there))
        self.made.whole.append(name)
        return []

    def _refusal(self, name: str, why: str, code: str = "no-image") -> Finding:
        fix = f"leave it out with --skip {name!r}"
        if not self.full and code == "no-image":
            fix = f"keep such changes as a whole with --full, or {fix}"
        return Finding(code, why, where=str(self.other.path), key=name, fix=fix)

    def _factor(self, name: str, change: _Change, kind: str) -> list[Finding]:
        """The best factors of a change; experts share one rank."""
        roles = KINDS[kind].roles or (OUT, IN)
        turned = not KINDS[kind].kernel and roles.index(OUT) > roles.index(IN)
        batched = not KINDS[kind].kernel and len(change.shape) == 3
        matrices = change.matrices() if batched else [change.matrix()]
        off = norm = kept = 0.0
        sides: tuple[Array, Array] | None = None
        try:
            spectra, rank = self._spectra(matrices)
            for number, found in enumerate(spectra):
                b, a = found.factors(rank, self.wanted.dtype)
                off, norm = off + found.lost(b, a), norm + found.norm**2
                found.matrix.let_go()
                kept += float((found.values[:rank] ** 2).sum())
                if turned:
                    a, b = b.T, a.T
                if not batched:
                    sides = a, b
                    continue
                if sides is None:
                    sides = _many(len(matrices), a), _many(len(matrices), b)
                sides[0][number], sides[1][number] = a, b
        except NoRoomError as full:
            return [self._no_room(name, full.needed)]
        assert sides is not None
        self.lost, self.norm = self.lost + off, self.norm + norm
        error = float(np.sqrt(off / norm))
        self.made.targets.append(Extracted(name, change.shape, rank, error, min(1.0, kept / norm)))
        self.output.add(name, kind, sides, change.shape)
        return []

    def _no_room(self, name: str, needed: int) -> Finding:
        return Finding(
            "memory",
            f"its factors take {show_size(needed)} of memory, and {show_size(self.room)} may be held",
            where=str(self.other.path),
            key=name,
            fix=f"allow it with --memory {-(-needed // 10**6)}MB, or ask for a lower rank",
        )

    def _spectra(self, matrices: Sequence[Matrix]) -> tuple[Iterable[Spectrum], int]:
        """What is kept of matrices, and at which rank: the one that was asked for, or that all of them need."""
        room = self.room
        if self.wanted.rank is not None:
            rank = min(self.wanted.rank, *matrices[0].shape)
            return (spectrum(matrix, rank, room) for matrix in matrices), rank
        error = self.wanted.error
        assert error is not None
        if len(matrices) == 1:
            found, rank = spectrum_within(matrices[0], error, room)
            return [found], rank
        rank = 1
        for matrix in matrices:
            rank = max(rank, spectrum_within(matrix, error, room)[1])
            matrix.let_go()
        return (spectrum(matrix, rank, room) for matrix in matrices), rank


def _many(count: int, one: Array) -> Array:
    return np.empty((count, *one.shape), one.dtype)


def _same_bytes(readers: tuple[Reader, Reader], row: int, there: int) -> bool:
    """Whether a tensor has the same type and bytes in both models; read in parts, until they differ."""
    one, other = (reader.source.tensors for reader in readers)
    if one.dtypes[row] != other.dtypes[there] or one.sizes[row] != other.sizes[there]:
        return False
    parts = zip(readers[0].pieces(row), readers[1].pieces(there), strict=True)
    return all(before == after for before, after in parts)


@dataclass(frozen=True, slots=True)
class _Change:
    """What tuning added to a tensor, in float64, read when it is asked for."""

    readers: tuple[Reader, Reader]
    numbers: tuple[int, int]
    """Its row in each model."""
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """What it is held in: of half types float32."""
        types = (
            reader.source.tensors.dtypes[row]
            for reader, row in zip(self.readers, self.numbers, strict=True)
        )
        return np.dtype(np.float32 if all(DTYPES[x].bits <= 16 for x in types) else np.float64)

    def entries(self, first: int, last: int) -> Wide:
        """Some entries along the first dim."""
        before, after = (
            reader.rows(row, first, last)
            for reader, row in zip(self.readers, self.numbers, strict=True)
        )
        change: Wide = after.astype(np.float64)
        change -= before.astype(np.float64)
        return change

    def blocks(self) -> Iterator[Wide]:
        """All entries, some at a time."""
        count = self.shape[0] if self.shape else 1
        step = max(1, HELD // max(1, prod(self.shape[1:])))
        for first in range(0, count, step):
            yield self.entries(first, min(first + step, count))

    def look(self) -> tuple[bool, bool]:
        """Whether anything differs, and whether all of it is finite."""
        differs, finite = False, True
        for block in self.blocks():
            differs |= bool(block.any())
            finite &= is_finite(block)
        return differs, finite

    def whole(self) -> Array:
        """All of it."""
        return np.concatenate([x.astype(self.dtype) for x in self.blocks()]).reshape(self.shape)

    def matrix(self) -> Matrix:
        """One matrix; the dims after the first one are joined."""
        columns = prod(self.shape[1:])

        def read(first: int, last: int) -> Wide:
            return self.entries(first, last).reshape(last - first, columns)

        return Matrix((self.shape[0], columns), self.dtype, read)

    def matrices(self) -> list[Matrix]:
        """A matrix for each entry along the first dim."""

        def reading(number: int) -> Matrix:
            def read(first: int, last: int) -> Wide:
                return self.entries(number, number + 1)[0, first:last]

            rows, columns = self.shape[1:]
            return Matrix((rows, columns), self.dtype, read)

        return [reading(number) for number in range(self.shape[0])]
