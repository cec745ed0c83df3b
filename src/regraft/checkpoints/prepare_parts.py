"""From the parts of a pipeline and a layout to everything that is known before a byte is moved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regraft.checkpoints.aside import drop_rows, find_aside
from regraft.checkpoints.casting import Cast, cast_dtypes
from regraft.checkpoints.moves import Moves
from regraft.checkpoints.part_files import PartFiles, files_beside
from regraft.checkpoints.parts import (
    MovedPiece,
    Parted,
    find_parts,
    join_moves,
    move_pieces,
    part_source,
)
from regraft.checkpoints.pipelines import DIFFUSERS
from regraft.checkpoints.prepared import Prepared
from regraft.checkpoints.sharding import Layout, OutFile, lay_out
from regraft.checkpoints.source import Source
from regraft.checkpoints.spelling import remembered_in
from regraft.errors import BadInputError, Finding
from regraft.names.patterns import patterns
from regraft.planning.identify import Detected
from regraft.report import CheckpointReport, count_in_words
from regraft.values import replace


def prepare_parts(
    source: Source,
    to: str,
    *,
    model: Path | None,
    source_layout: str | None,
    shard_size: int | None,
    casts: Sequence[Cast],
    name: str | None,
    drop: Sequence[str],
) -> Prepared:
    """Plan the conversion of a pipeline: a single file to a folder of diffusers, or the other way.

    ``model`` is a folder of diffusers that has the configs, the scheduler and the tokenizers.

    Raises what finding and planning raise.
    """
    aside = find_aside(source, drop, (), remembered_in(source))
    source = drop_rows(source, aside.dropped)
    found = find_parts(source, source_layout)
    _check_target(source, found, to, name)
    moved = move_pieces(source, found)
    folder = to == DIFFUSERS and name is None
    places = [_place(each, to, folder=folder, alone=len(moved) == 1) for each in moved]
    moves = join_moves([(p, m.moves, m.piece.rows) for p, m in zip(places, moved, strict=True)])
    dtypes, changed = cast_dtypes(moves.names, moves.dtypes, casts, frozenset())
    beside = PartFiles()
    if folder:
        layout, beside = _lay_out_folder(source, found, moved, dtypes, shard_size, model)
    else:
        layout = lay_out(source, moves, dtypes, shard_size, name)
    report = _report(source, found, moved, moves, to, layout)
    report.casts, report.dropped = changed, list(aside.dropped)
    report.others = [*beside.written, *beside.copied]
    report.notes += [*aside.words(), *_words(found, moved, to), *beside.notes]
    known = Detected(found.books, {}, found.layout, (found.evidence,))
    bare = replace(source, others=(), config=None)
    return Prepared(
        bare,
        known,
        None,
        moves,
        dtypes,
        layout,
        None,
        report,
        written=beside.written,
        copied=beside.copied,
    )


def _check_target(source: Source, found: Parted, to: str, name: str | None) -> None:
    """Raise where a pipeline has no such layout, is in it, or cannot be one file in it."""
    if to != found.target:
        if to == found.layout:
            message = f"it is in the layout {to} already"
        else:
            message = f"the parts of {found.pipeline.title} are in {found.layout}, and {to} is not one of theirs"
        fix = f"say --to {found.target}"
        raise BadInputError(Finding("other-layouts", message, where=source.where, fix=fix))
    if to == DIFFUSERS and name is not None and len(found.pieces) > 1:
        parts = ", ".join(piece.part.name for piece in found.pieces)
        message = (
            f"diffusers keeps the parts ({parts}) in folders, and this is the name of one file"
        )
        fix = "name a folder to write"
        raise BadInputError(Finding("destination-is-file", message, where=name, fix=fix))


def _place(each: MovedPiece, to: str, *, folder: bool, alone: bool) -> str:
    """What stands before the names of a part in the result."""
    part = each.piece.part
    if folder:
        return f"{part.name}/"
    return "" if to == DIFFUSERS and alone else part.prefixes[0]


def _lay_out_folder(
    source: Source,
    found: Parted,
    moved: Sequence[MovedPiece],
    dtypes: Sequence[str],
    shard_size: int | None,
    model: Path | None,
) -> tuple[Layout, PartFiles]:
    """The weights files of every part, and what stands beside them."""
    files: list[OutFile] = []
    indexes: dict[str, bytes] = {}
    at = 0
    for each in moved:
        count = len(each.moves.names)
        part, own = each.piece.part, part_source(source, each.piece)
        layout = lay_out(own, each.moves, dtypes[at : at + count], shard_size, stem=part.stem)
        files += (
            replace(file, name=f"{part.name}/{file.name}", targets=file.targets + at)
            for file in layout.files
        )
        if layout.index is not None:
            indexes[f"{part.name}/{part.stem}.safetensors.index.json"] = layout.index
        at += count
    beside = files_beside(found.pipeline, moved, model)
    beside.written.update(indexes)
    return Layout(tuple(files), None), beside


def _report(
    source: Source,
    found: Parted,
    moved: Sequence[MovedPiece],
    moves: Moves,
    to: str,
    layout: Layout,
) -> CheckpointReport:
    rules: dict[str, int] = {}
    carried = 0
    for each in moved:
        if each.plan is None:
            carried += len(each.moves.names)
            continue
        carried += sum(len(c.group) for c in each.plan.carried)
        rules.update({rule: times for rule, times in each.plan.fired().items() if times})
    parts = ", ".join(piece.part.name for piece in found.pieces)
    return CheckpointReport(
        found.layout,
        to,
        [found.evidence, f"its parts: {parts}"],
        tensors_in=len(source.tensors),
        tensors_out=len(moves.names),
        bytes=layout.size,
        files=[file.name for file in layout.files],
        rules=rules,
        carried=carried,
        renamed=sum(len(each.moves.kept) for each in moved),
    )


def _words(found: Parted, moved: Sequence[MovedPiece], to: str) -> list[str]:
    """What was dropped, what is not there, and what a single file does not hold."""
    notes = []
    for why, names in found.dropped.items():
        shown = ", ".join(pattern for pattern, _ in patterns(names))
        notes.append(f"dropped {count_in_words(len(names), 'tensor')}: {shown}: {why}")
    for each in moved:
        if each.plan is None:
            continue
        for dropped in each.plan.dropped:
            names = [each.piece.place + name for name in dropped.group.names()]
            shown = ", ".join(pattern for pattern, _ in patterns(names))
            notes.append(
                f"dropped {count_in_words(len(names), 'tensor')}: {shown}: {dropped.drop.why}"
            )
        for drop in each.plan.lacking():
            notes.append(
                f"{to} has {each.piece.part.prefixes[0]}{drop.key}, too, and it is not made: {drop.why}"
            )
    there = {piece.part.name for piece in found.pieces}
    absent = [part.name for part in found.pipeline.parts if part.name not in there]
    if absent:
        notes.append(f"{', '.join(absent)}: not in the source, and not made")
    if found.left:
        notes.append(f"left out, because no single file holds them: {', '.join(found.left)}")
    if to != DIFFUSERS:
        notes.append(
            "configs, scheduler and tokenizers stay behind: a single file holds weights only"
        )
    return notes
