"""Checkpoints of several models: a pipeline as one file, or as a folder of diffusers with a folder for each part.

Every part is found by what stands before its names, planned by its own rule book, and moved on its own; what comes out
is one `Prepared`, so that writing and comparing know nothing of parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

import numpy as np
from msgspec import Struct

from regraft.checkpoints.moves import Moves, Runs, Strided, finish, identity, moves_of
from regraft.checkpoints.pipelines import (
    DENOISER,
    DIFFUSERS,
    EXTRAS,
    PIPELINES,
    PREFIXES,
    Part,
    Pipeline,
)
from regraft.checkpoints.source import Source, Tensors
from regraft.errors import (
    AmbiguousError,
    BadInputError,
    Choice,
    Finding,
    RegraftError,
    UnmatchedKeysError,
)
from regraft.layouts.graph import Edge
from regraft.names.keys import Ints, group_names
from regraft.planning.build import build_plan
from regraft.planning.plan import Headers, Plan
from regraft.planning.steps import output_of
from regraft.rules.book import Book, built_in, library
from regraft.rules.said import said
from regraft.rules.templates import match_group
from regraft.values import replace

_SHOWN = 20
_Part = TypeVar("_Part", Runs, Strided)
_UNUSED = (
    "if nothing needs it, leave it out with --drop PATTERN; otherwise give the family with --from"
)


class Piece(Struct, frozen=True, eq=False):
    """The tensors of one part, by their own names."""

    part: Part
    place: str
    """What stands before their names: a prefix, or the part's folder and a slash."""
    rows: Ints
    """Rows of the whole's tensors."""
    tensors: Tensors
    plan: Plan | None = None
    """How it moves, where that was found out as the part was recognised."""

    @property
    def headers(self) -> Headers:
        """Names, shapes and types."""
        tensors = self.tensors
        return Headers(group_names(tensors.names), list(tensors.shapes), list(tensors.dtypes))


class Parted(Struct, frozen=True, eq=False):
    """A pipeline that was found."""

    pipeline: Pipeline
    layout: str
    pieces: tuple[Piece, ...]
    books: tuple[Book, ...]
    evidence: str
    dropped: dict[str, list[str]]
    """Why: the names of what the other layout has no use for."""
    left: tuple[str, ...] = ()
    """Folders of parts that no single file holds."""

    @property
    def target(self) -> str:
        """The layout that it can be converted to."""
        return self.pipeline.native if self.layout == DIFFUSERS else DIFFUSERS


class MovedPiece(Struct, frozen=True, eq=False):
    """A part that was planned."""

    piece: Piece
    plan: Plan | None
    """``None`` where every tensor stays as it is."""
    moves: Moves


def is_parted(source: Source) -> bool:
    """Whether a checkpoint holds the parts of a pipeline: a folder of diffusers, or a file with a denoiser in it."""
    return source.parted or any(
        group.template.startswith(DENOISER) for group in source.tensors.groups
    )


def find_parts(source: Source, layout: str | None = None) -> Parted:
    """Which pipeline a checkpoint is, and which tensors belong to which of its parts.

    ``layout`` is what the user says that it is in; the family counts that was named.

    Raises ``UnmatchedKeysError`` where no pipeline fits, ``AmbiguousError`` where several do.
    """
    return _in_folder(source, layout) if source.parted else _in_file(source, layout)


def _in_file(source: Source, layout: str | None) -> Parted:
    groups: dict[str, list[int]] = {}
    rest: list[int] = []
    for row, name in enumerate(source.tensors.names):
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        (rest if prefix is None else groups.setdefault(prefix, [])).append(row)
    pipeline, denoiser = _choose(source, groups, DENOISER, layout, lambda part: part.prefixes)
    pieces: list[Piece] = []
    dropped: dict[str, list[str]] = {}
    for part in pipeline.parts:
        for prefix in part.prefixes:
            rows = groups.pop(prefix, [])
            if (part, prefix) == (denoiser.part, denoiser.place) and not part.unused:
                pieces.append(denoiser)
                continue
            names = [source.tensors.names[row][len(prefix) :] for row in rows]
            kept = []
            for row, name in zip(rows, names, strict=True):
                why = _why(name, part.unused)
                if why is None:
                    kept.append(row)
                else:
                    dropped.setdefault(why, []).append(source.tensors.names[row])
            if kept:
                piece = _usual(_piece(source, part, prefix, kept))
                pieces.append(_of_version(piece, source.where, to_diffusers=True))
    loose: list[str] = []
    for row in sorted([*rest, *(row for rows in groups.values() for row in rows)]):
        name = source.tensors.names[row]
        why = _why(name, EXTRAS)
        if why is None:
            loose.append(name)
        else:
            dropped.setdefault(why, []).append(name)
    if loose:
        raise UnmatchedKeysError(_loose(source, loose, pipeline))
    evidence = f"the names are those of {pipeline.title}, in one file with its parts"
    return _parted(pipeline, pipeline.native, pieces, evidence, dropped)


def _in_folder(source: Source, layout: str | None) -> Parted:
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(source.tensors.names):
        groups.setdefault(name.partition("/")[0] + "/", []).append(row)
    denoiser = next((place for place in ("unet/", "transformer/") if place in groups), None)
    if denoiser is None:
        message = "there is neither a unet nor a transformer with weights in it"
        fix = "give the folder of a pipeline with its denoiser, or that of one part"
        raise BadInputError(Finding("no-weights", message, where=source.where, fix=fix))
    pipeline, first = _choose(source, groups, denoiser, layout, lambda part: (f"{part.name}/",))
    pieces: list[Piece] = []
    for part in pipeline.parts:
        rows = groups.pop(f"{part.name}/", None)
        if part == first.part:
            pieces.append(first)
        elif rows is not None:
            piece = _usual(_piece(source, part, f"{part.name}/", rows))
            pieces.append(_of_version(piece, source.where, to_diffusers=False))
    evidence = f"the folders and names are those of {pipeline.title}"
    found = _parted(pipeline, DIFFUSERS, pieces, evidence, {})
    return replace(found, left=tuple(place.rstrip("/") for place in groups))


def _parted(
    pipeline: Pipeline,
    layout: str,
    pieces: list[Piece],
    evidence: str,
    dropped: dict[str, list[str]],
) -> Parted:
    books = tuple(dict.fromkeys(_book(piece.part.book) for piece in pieces if piece.part.book))
    return Parted(pipeline, layout, tuple(pieces), books, evidence, dropped)


def _choose(
    source: Source,
    groups: dict[str, list[int]],
    denoiser: str,
    layout: str | None,
    places: Callable[[Part], tuple[str, ...]],
) -> tuple[Pipeline, Piece]:
    """The pipeline whose denoiser's rule book explains every tensor of the one that is there, and that denoiser.

    Those that have a place for all parts that are there come first; only where none of these fits, the others may.
    """
    fitting: list[tuple[Pipeline, Piece, Plan]] = []
    failed: list[RegraftError] = []
    family = said().family
    given = [p for p in PIPELINES if family in (None, p.name)] or PIPELINES
    known = [p for p in given if layout in (None, p.native, DIFFUSERS)]
    whole = [p for p in known if set(groups) <= {x for part in p.parts for x in places(part)}]
    for candidates in (whole, [p for p in known if p not in whole]):
        for pipeline in candidates:
            if denoiser not in places(pipeline.parts[0]):
                continue
            piece = _piece(source, pipeline.parts[0], denoiser, groups[denoiser])
            if len(known) > 1 and not _may_explain(piece, to_diffusers=not source.parted):
                continue
            try:
                plan = _plan(piece, source.where, to_diffusers=not source.parted)
            except RegraftError as error:
                failed.append(error)
            else:
                fitting.append((pipeline, replace(piece, plan=plan), plan))
        if fitting:
            break
    made = {frozenset(group.template for group in plan.targets()) for _, _, plan in fitting}
    if len(made) == 1:
        return fitting[0][:2]
    if not fitting:
        if len(failed) == 1:
            raise failed[0]
        names = ", ".join(pipeline.name for pipeline in PIPELINES)
        message = f"the names of its denoiser are those of no family that is known: {names}"
        raise UnmatchedKeysError(
            Finding(
                "unknown-model",
                message,
                where=source.where,
                key=source.tensors.names[groups[denoiser][0]],
                fix="give the family with --from: then every name is shown that does not fit",
            )
        )
    raise AmbiguousError(
        Finding(
            "which-model",
            f"the names fit several families: {', '.join(p.name for p, *_ in fitting)}",
            where=source.where,
            fix="give one of these with --from",
            choices=tuple(
                Choice(
                    p.name, f"the names are those of {p.title}", f"its denoiser is {p.parts[0].cls}"
                )
                for p, *_ in fitting
            ),
        )
    )


def move_pieces(source: Source, found: Parted) -> list[MovedPiece]:
    """Plan every part.

    Raises what `build_plan` raises, for all parts together.
    """
    moved: list[MovedPiece] = []
    findings: list[Finding] = []
    kind: type[RegraftError] = UnmatchedKeysError
    for piece in found.pieces:
        try:
            if piece.part.book:
                to_diffusers = found.layout != DIFFUSERS
                plan = piece.plan or _plan(piece, source.where, to_diffusers=to_diffusers)
                outputs = [output_of(entry) for entry in plan.entries]
                moves = finish(moves_of(outputs, plan.carried, piece.tensors), piece.tensors)
                moved.append(MovedPiece(piece, plan, moves))
            else:
                moved.append(MovedPiece(piece, None, identity(piece.tensors)))
        except RegraftError as error:
            kind = type(error) if not findings or isinstance(error, BadInputError) else kind
            findings += (
                dataclasses.replace(f, key=f.key and piece.place + f.key) for f in error.findings
            )
    if findings:
        raise kind(findings)
    return moved


def join_moves(parts: Sequence[tuple[str, Moves, Ints]]) -> Moves:
    """What several parts move, as one: what stands before the names of each, its moves, and the rows of its sources."""
    whole = Moves()
    firsts, sizes = [], []
    for before, moves, rows in parts:
        at = len(whole.names)
        whole.names += (before + name for name in moves.names)
        whole.shapes += moves.shapes
        whole.dtypes += moves.dtypes
        whole.runs += (_shift(run, rows, at) for run in moves.runs)
        whole.strided += (_shift(block, rows, at) for block in moves.strided)
        whole.wholes += ((at + first, rows[ids]) for first, ids in moves.wholes)
        whole.made += (
            (
                replace(entry, sources=tuple(rows[ids] for ids in entry.sources)),
                [at + base for base in bases],
            )
            for entry, bases in moves.made
        )
        whole.whole = whole.whole and moves.whole
        firsts.append(rows[moves.first])
        sizes.append(moves.sizes)
    whole.first, whole.sizes = np.concatenate(firsts), np.concatenate(sizes)
    return whole


def _shift(part: _Part, rows: Ints, at: int) -> _Part:
    return replace(part, sources=rows[part.sources], targets=part.targets + at)


def part_source(source: Source, piece: Piece) -> Source:
    """One part as a checkpoint of its own: its tensors and the files that they are in."""
    numbers, files = np.unique(piece.tensors.files, return_inverse=True)
    return replace(
        source,
        files=tuple(source.files[number] for number in numbers.tolist()),
        tensors=replace(piece.tensors, files=files.astype(np.int64)),
        index=None,
        others=(),
        parted=False,
    )


def _plan(piece: Piece, where: str, *, to_diffusers: bool) -> Plan:
    book = _book(piece.part.book)
    edge = Edge.to(book, DIFFUSERS) if to_diffusers else Edge.out_of(book, DIFFUSERS)
    return build_plan(piece.headers, [edge], where=where, unmatched_fix=lambda: _UNUSED)


def _of_version(piece: Piece, where: str, *, to_diffusers: bool) -> Piece:
    """A part with the rule book of the version that it is, where there are several; the first where none fits."""
    part = piece.part
    for book in (part.book, *part.others) if part.others else ():
        this = replace(piece, part=replace(part, book=book or part.book))
        try:
            plan = _plan(this, where, to_diffusers=to_diffusers if book else False)
        except RegraftError:
            continue
        return replace(piece, part=replace(part, book=book), plan=plan if book else None)
    return piece


def _may_explain(piece: Piece, *, to_diffusers: bool) -> bool:
    """Whether a part's rule book has a rule for every kind of name, as a glance at the names says."""
    book = _book(piece.part.book)
    edge = Edge.to(book, DIFFUSERS) if to_diffusers else Edge.out_of(book, DIFFUSERS)
    keys = [term.key for rule in book.rules for term in edge.sides(rule)[0] if term.key]
    keys += [carry.term.key for carry in book.carries if carry.term.key]
    keys += [drop.key for drop in book.drops]
    return all(
        any(match_group(key, group) is not None for key in keys) for group in piece.headers.groups
    )


def _piece(source: Source, part: Part, place: str, rows: list[int]) -> Piece:
    whole, taken = source.tensors, np.array(rows, dtype=np.int64)
    return Piece(
        part,
        place,
        taken,
        Tensors(
            [whole.names[row][len(place) :] for row in rows],
            [whole.dtypes[row] for row in rows],
            [whole.shapes[row] for row in rows],
            whole.files[taken],
            whole.starts[taken],
            whole.sizes[taken],
        ),
    )


def _usual(piece: Piece) -> Piece:
    """A part by its usual names: with what transformers 5 leaves out, and not as older releases have them."""
    root, tensors = piece.part.root, piece.tensors
    names = tensors.names
    if root and not any(name.startswith(root) for name in names):
        names = [root + name for name in names]
    for old, new in piece.part.older:
        names = [name.replace(old, new) for name in names]
    return replace(piece, tensors=replace(tensors, names=names))


def _book(name: str) -> Book:
    """A part's rule book: the user's of that name, otherwise regraft's."""
    return next(book for book in (*library(), *built_in()) if book.name == name)


def _why(name: str, patterns: Iterable[tuple[str, str]]) -> str | None:
    return next((why for pattern, why in patterns if fnmatchcase(name, pattern)), None)


def _loose(source: Source, names: list[str], pipeline: Pipeline) -> list[Finding]:
    more = f" (and {len(names) - _SHOWN} more)" if len(names) > _SHOWN else ""
    message = f"it belongs to no known part of {pipeline.title}"
    return [
        Finding("unmatched", message + more * (not number), source.where, name, fix=_UNUSED)
        for number, name in enumerate(names[:_SHOWN])
    ]
