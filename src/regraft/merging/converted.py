"""Merging an adapter into its base: a new checkpoint, in whatever layout is asked for.

The base is converted file to file; then each adapted tensor is rewritten where it stands, with what the adapter adds
to it. Only one tensor is held at a time, and a sum is rounded once, to the tensor's own dtype.
"""

from __future__ import annotations

import mmap
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from regraft.adapters.base_weights import spellings
from regraft.adapters.convert import source_layout
from regraft.adapters.deltas import Deltas
from regraft.adapters.detect import load_model
from regraft.adapters.families.base import NoImageError
from regraft.adapters.form import Array, cast_down
from regraft.adapters.protocol import Opened
from regraft.arrays.pieces import Piece
from regraft.checking.certificate import moved_biases, moved_pieces
from regraft.checkpoints.companions import find_companions
from regraft.checkpoints.convert import convert_checkpoint
from regraft.checkpoints.prepare import model_of
from regraft.checkpoints.source import open_checkpoint
from regraft.errors import Finding, RefusedError
from regraft.layouts.names import Layout
from regraft.merging.language import check_biases, located
from regraft.planning.model import Foreign
from regraft.report import AdapterReport, CheckpointReport, Target
from regraft.storage.beside import narrow
from regraft.storage.dtypes import DTYPES
from regraft.storage.folder import staged_folder
from regraft.storage.header import read_header

Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class _Written:
    """The tensors of a checkpoint that was just written, to be changed in place."""

    tensors: dict[str, Array]
    quantised: frozenset[str] = frozenset()
    """Weights whose numbers are others than those that stand there."""
    method: str | None = None
    """What quantised them."""

    @staticmethod
    def of(folder: Path) -> _Written:
        source = open_checkpoint(folder)
        config = model_of(source, None)
        companions = find_companions(source, config.data if config is not None else None)
        found: dict[str, Array] = {}
        for file in sorted(folder.glob("*.safetensors")):
            header = read_header(file)
            with file.open("r+b") as opened:
                mapped = mmap.mmap(opened.fileno(), header.size, access=mmap.ACCESS_WRITE)
            for name, info in header.tensors.items():
                dtype = DTYPES[info.dtype]
                if dtype.per_cell == 1 and dtype.numpy is not None:
                    start = header.data_start + info.start
                    found[name] = np.ndarray(info.shape, dtype.numpy, mapped, start)
        told = companions.quantization
        if told is None:
            return _Written(found)
        names = (companions.headers.name(i) for i in companions.weights().tolist())
        return _Written(found, frozenset(names), told.title)

    def fault(self, name: str, where: str) -> Finding | None:
        """Why nothing can be added to a tensor; ``None`` where it can."""
        is_there = self.find(name) is not None
        if is_there and not self.quantised.intersection(spellings(name)):
            return None
        if self.method is None:
            return _absent(name, where)
        return Finding(
            "no-image",
            f"the base is quantised with {self.method}, and nothing can be added to packed or scaled numbers",
            where=where,
            key=name,
            fix="merge into the base as it was before it was quantised",
        )

    def find(self, name: str) -> Array | None:
        for spelled in spellings(name):
            if spelled in self.tensors:
                return self.tensors[spelled]
        return None


def merge_adapter(
    source: Opened,
    dst: Path,
    to: Layout,
    model: Path,
    layout: Layout | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    foreign: Foreign | None = None,
    files: Sequence[Path] = (),
) -> tuple[AdapterReport, CheckpointReport]:
    """Write the base at ``model`` with an adapter's deltas added, in a layout.

    ``files`` are the adapter's; the result gets no more permissions than they have.

    Raises ``BadInputError``, ``UnmatchedKeysError``, ``AmbiguousError`` or ``RefusedError`` with all findings.
    """
    base = model if model.is_dir() else model.parent
    config = load_model(model)
    here, known, evidence = source_layout(source, to, config, layout, foreign)
    before = source.deltas(known, here)
    check_biases(before)
    with staged_folder(dst, overwrite=overwrite) as staged:
        inner = staged / "base"
        done = convert_checkpoint(
            base, inner, to=to.name, model=model, progress=progress, foreign=foreign
        )
        report = AdapterReport(
            source.name, source.kind, here, to.name, evidence, tensors_in=len(source.tensors)
        )
        try:
            _add(before, _Written.of(inner), to.name, report)
        except NoImageError as error:
            raise RefusedError(
                Finding(
                    "needs-base-weights" if error.needs_base else "no-image",
                    f"it cannot be merged: {error.why}",
                    where=source.where,
                    fix="give the base that it was trained on"
                    if error.needs_base
                    else "merge it with PEFT, where it was trained",
                )
            ) from None
        for path in list(inner.iterdir()):
            shutil.move(str(path), str(staged / path.name))
        inner.rmdir()
        narrow(staged, files)
    report.tensors_out = done.tensors_out
    return report, done


def _add(before: Deltas, written: _Written, target: str, report: AdapterReport) -> None:
    findings: list[Finding] = []
    seen: set[str] = set()
    for piece in moved_pieces(before, target):
        tensor, fault = written.find(piece.key), written.fault(piece.key, before.source.where)
        sound = fault is None and tensor is not None and tensor.shape == piece.shape
        if sound and tensor is not None:
            with located(piece.key, before.source.where):
                _add_to(tensor, piece)
        if piece.key in seen:
            continue
        seen.add(piece.key)
        if sound:
            report.targets.append(Target(piece.key, 0, 0, 1.0, piece.rule, False, rung="merged"))
        else:
            findings.append(fault or _absent(piece.key, before.source.where))
    for name, value in _saved(before, target, findings):
        tensor, fault = written.find(name), written.fault(name, before.source.where)
        if fault is not None or tensor is None or tensor.shape != value.shape:
            findings.append(fault or _absent(name, before.source.where))
            continue
        with located(name, before.source.where):
            tensor[...] = cast_down(value, tensor.dtype)
        report.carried += 1
    if findings:
        raise RefusedError(findings)


def _absent(key: str, where: str) -> Finding:
    return Finding(
        "no-image",
        "the base has no weight that this could be merged into",
        where=where,
        key=key,
        fix="check that --model is the base it was trained on; rows of single tokens are merged by 'regraft merge', "
        "prompts and routers by nothing",
    )


def _add_to(tensor: Array, piece: Piece) -> None:
    """Add part of a delta to a stored tensor; where nothing is added, bits stay."""
    shape = tensor.shape
    takes = [
        np.arange(size) if take is None else take
        for size, take in zip_longest(shape, piece.takes[: len(shape)])
    ]
    where = np.ix_(*takes)
    old = tensor[where]
    new = cast_down(old.astype(np.float64) + piece.values, tensor.dtype)
    tensor[where] = np.where(piece.values == 0, old, new)


def _saved(before: Deltas, target: str, findings: list[Finding]) -> Iterator[tuple[str, Array]]:
    """Tensors of the base that the adapter has as they are to be, and biases that it changes."""
    shared = set(before.family.shared) if before.family is not None else set()
    for item in before.moved_others(target):
        if item.old not in shared:
            yield before.source.shown(item)[1], item.tensor
    yield from moved_biases(before, target).items()
