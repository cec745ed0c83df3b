"""Extracting: what tuning changed in a model, as an adapter for the model that it was tuned from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from regraft.adapters.base_weights import oriented
from regraft.adapters.form import Array, cast_down
from regraft.arrays.pieces import HELD
from regraft.bridges.transformers.files import InstalledTransformers
from regraft.checkpoints.casting import parse_casts
from regraft.checkpoints.ties import is_input, is_output
from regraft.dialects.names import layout_named
from regraft.errors import BadInputError, Finding, RefusedError
from regraft.merging.base import Base, Reader, float_type, open_base
from regraft.merging.extraction import Extracted, Extraction
from regraft.merging.low_rank import Spectrum, spectrum, spectrum_within
from regraft.merging.output_image import ImageOutput
from regraft.merging.output_language import LanguageOutput
from regraft.report import logged
from regraft.rules.book import Rules, only_books
from regraft.rules.kinds import KINDS
from regraft.rules.said import saying
from regraft.storage.dtypes import DTYPES
from regraft.storage.folder import check_destination

Progress = Callable[[str, int, int], None]
Path_ = str | os.PathLike[str]

_SHOWN = 20


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
    Tensors that did not change are left out, and counted.

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
        RefusedError: something changed that is no matrix, and nothing says what is to become of it.
    """
    with ExitStack() as stack:
        stack.enter_context(only_books(rules))
        stack.enter_context(saying(architecture=architecture))
        stack.enter_context(saying(family=source))
        wanted = _Wanted(rank, error, *(DTYPES[c.dtype].numpy for c in parse_casts([dtype])))
        foreign = InstalledTransformers()
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
        work = _Extracting(one, other, output, wanted, made, tuple(skip), full)
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
                fix=f"convert it first: regraft convert TUNED OUT --to {one.layout}",
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
        delta = _difference(readers, row, there, self.one.tensors.shapes[row])
        if not delta.any():
            self.made.unchanged += 1
            return []
        if any(fnmatchcase(name, pattern) for pattern in self.skip):
            self.made.skipped.append(name)
            return []
        if not np.isfinite([delta.min(), delta.max()]).all():
            return [self._refusal(name, "its change has NaN or infinite values", "not-finite")]
        kind = self.output.kind_of(name)
        if kind is not None:
            self._factor(name, delta, kind)
            return []
        why = self.output.why_not_whole(name)
        if not self.full or why is not None:
            reason = why or "it is no matrix of a module, so its change is not a LoRA"
            return [self._refusal(name, reason)]
        self.output.add_whole(name, delta, readers[1].whole(there))
        self.made.whole.append(name)
        return []

    def _refusal(self, name: str, why: str, code: str = "no-image") -> Finding:
        fix = f"leave it out with --skip {name!r}"
        if not self.full and code == "no-image":
            fix = f"keep such changes as a whole with --full, or {fix}"
        return Finding(code, why, where=str(self.other.path), key=name, fix=fix)

    def _factor(self, name: str, delta: Array, kind: str) -> None:
        """The best factors of a change; experts share one rank."""
        kernel = KINDS[kind].kernel
        matrices = delta.reshape(len(delta), -1) if kernel else oriented(delta, kind)
        batched = matrices.ndim == 3
        each = list(matrices) if batched else [matrices]
        spectra, rank = self._spectra(each)
        made: list[tuple[Array, Array]] = []
        off = norm = kept = 0.0
        for found in spectra:
            b, a = (cast_down(side, self.wanted.dtype) for side in found.factors(rank))
            off, norm = off + found.lost(b, a), norm + found.norm**2
            kept += float((found.values[:rank] ** 2).sum())
            made.append((a, b))
        self.lost, self.norm = self.lost + off, self.norm + norm
        error = float(np.sqrt(off / norm))
        target = Extracted(name, tuple(delta.shape), rank, error, min(1.0, kept / norm))
        self.made.targets.append(target)
        a, b = (np.stack(side) for side in zip(*made, strict=True)) if batched else made[0]
        self.output.add(name, kind, (a, b), tuple(delta.shape))

    def _spectra(self, matrices: Sequence[Array]) -> tuple[Iterable[Spectrum], int]:
        """What is kept of matrices, and at which rank: the one that was asked for, or that all of them need."""
        side = min(matrices[0].shape)
        if self.wanted.rank is not None:
            rank = min(self.wanted.rank, side)
            return (spectrum(matrix, rank) for matrix in matrices), rank
        assert self.wanted.error is not None
        if len(matrices) == 1:
            found, rank = spectrum_within(matrices[0], self.wanted.error)
            return [found], rank
        rank = max(spectrum_within(matrix, self.wanted.error)[1] for matrix in matrices)
        return (spectrum(matrix, rank) for matrix in matrices), rank


def _same_bytes(readers: tuple[Reader, Reader], row: int, there: int) -> bool:
    """Whether a tensor has the same type and bytes in both models; read in parts, until they differ."""
    one, other = (reader.source.tensors for reader in readers)
    if one.dtypes[row] != other.dtypes[there] or one.sizes[row] != other.sizes[there]:
        return False
    parts = zip(readers[0].pieces(row), readers[1].pieces(there), strict=True)
    return all(before == after for before, after in parts)


def _difference(
    readers: tuple[Reader, Reader], row: int, there: int, shape: tuple[int, ...]
) -> Array:
    """What tuning added to a tensor, computed in float64; of half types it is kept as float32."""
    narrow = all(
        DTYPES[reader.source.tensors.dtypes[r]].bits <= 16
        for reader, r in zip(readers, (row, there), strict=True)
    )
    made = np.zeros(shape or (1,), np.float32 if narrow else np.float64)
    step = max(1, HELD // max(1, prod(made.shape[1:])))
    for first in range(0, len(made), step):
        last = min(first + step, len(made))
        before, after = (
            reader.rows(r, first, last).astype(np.float64)
            for reader, r in zip(readers, (row, there), strict=True)
        )
        made[first:last] = after - before
    return made.reshape(shape)
