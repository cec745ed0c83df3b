"""From a checkpoint and a layout to everything that is known before a byte is moved."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from regraft.adapters.provenance import KEY, Remembered
from regraft.checkpoints.aliases import add_aliases, use_owners
from regraft.checkpoints.aside import Aside, check_kept, drop_rows, find_aside
from regraft.checkpoints.casting import TORCH, Cast, cast_dtypes
from regraft.checkpoints.companions import (
    add_companions,
    check_quantised,
    check_step_by_step,
    find_companions,
)
from regraft.checkpoints.config import V4
from regraft.checkpoints.config import convert_config as rename_fields
from regraft.checkpoints.moves import (
    finish,
    identity,
    moves_of,
    pairs_from,
)
from regraft.checkpoints.part_files import (
    PartFiles,
    files_of_part,
    is_of_diffusers,
    says_diffusers,
)
from regraft.checkpoints.parts import is_parted
from regraft.checkpoints.pipelines import DIFFUSERS, part_by_book
from regraft.checkpoints.prepared import Prepared
from regraft.checkpoints.sharding import lay_out
from regraft.checkpoints.source import ADAPTER, CONFIG, Source, is_checkpoint, open_checkpoint
from regraft.checkpoints.spelling import read_config, read_spelling, remembered_in, write_note
from regraft.checkpoints.ties import (
    FIELD,
    Ties,
    leave_out,
    nothing_to_untie,
    refuse,
    refuse_rest,
    undecided_note,
    unequal_ties,
    without_ties,
)
from regraft.checkpoints.wrappers import refuse_adapters, strip_wrappers
from regraft.errors import BadInputError, Finding, UnmatchedKeysError
from regraft.errors.extras import or_ask_transformers
from regraft.names.keys import Group
from regraft.planning.identify import Detected, detect, make_plan
from regraft.planning.model import Foreign, ModelConfig, load_model
from regraft.planning.notes import notes_of
from regraft.planning.plan import Plan
from regraft.planning.steps import output_of
from regraft.report import CheckpointReport, Trace
from regraft.rules.book import own_books, rules_words
from regraft.rules.mtp import check_mtp
from regraft.storage.json_files import JsonFile
from regraft.values import Struct, replace

_UNUSED = (
    "check the prefix and the model; if the model does not use it, leave it out with --drop PATTERN or carry it over "
    "as it is with --keep PATTERN; or add the key to a rule book"
)


def _way_out(path: Path, model: Path | None) -> str:
    """What to do about keys that no rule matches; where ``model`` has weights, they are a twin with good names."""
    if model is None or not is_checkpoint(model) or model.resolve() == path.resolve():
        return (
            f"{_UNUSED} (`regraft diff SRC GOOD -o fix.toml` writes one, from the same weights under good names)"
            f"{or_ask_transformers()}"
        )
    command = shlex.join(
        ["regraft", "diff", str(path), str(model), "-o", "fix.toml", *rules_words()]
    )
    return (
        f"`{command}` writes a rule book from the weights that have the same values; or {_UNUSED}"
    )


def prepare(
    path: Path,
    to: str | None,
    *,
    model: Path | None = None,
    source_layout: str | None = None,
    shard_size: int | None = None,
    casts: Sequence[Cast] = (),
    foreign: Foreign | None = None,
    name: str | None = None,
    untie: bool = False,
    drop: Sequence[str] = (),
    keep: Sequence[str] = (),
) -> Prepared:
    """Read headers and plan; nothing is written. Without ``to``, everything stays as it is.

    With a ``name`` the result is one file of that name, and nothing else. Of tied weights with other values,
    ``untie`` keeps both. ``drop`` are patterns of names that are left out; where one of them is tied to another that
    has other values, that other one is kept. ``keep`` are those that stay as they are.

    Raises what opening, detecting and planning raise.
    """
    opened = open_checkpoint(path)
    if to is not None and is_parted(opened):
        if keep:
            message = "--keep: the parts of a pipeline have no place for tensors that no rule moves"
            fix = "leave them out with --drop PATTERN"
            raise BadInputError(Finding("option", message, where=opened.where, fix=fix))
        from regraft.checkpoints.prepare_parts import prepare_parts

        return prepare_parts(
            opened,
            to,
            model=model,
            source_layout=source_layout,
            shard_size=shard_size,
            casts=casts,
            name=name,
            drop=drop,
        )
    config = model_of(opened, model)  # a broken one fails nothing that needs none
    source, stripped = strip_wrappers(opened)
    if stripped:
        source = replace(source, notes=(*source.notes, *stripped))
    if to is not None:
        refuse_adapters(source)
    options = _Options(
        to, model, source_layout, shard_size, casts, foreign, name, untie, drop, keep
    )
    return _prepare(source, config, options)


class _Options(Struct, frozen=True):
    """What `prepare` was told, under its names."""

    to: str | None
    model: Path | None
    source_layout: str | None
    shard_size: int | None
    casts: Sequence[Cast]
    foreign: Foreign | None
    name: str | None
    untie: bool
    drop: Sequence[str]
    keep: Sequence[str]


def _prepare(
    whole: Source, config: ModelConfig | None, options: _Options, *, repaired: bool = False
) -> Prepared:
    """The same for a checkpoint that was opened; one that is ``repaired`` is not repaired again."""
    to, foreign, name, untie = options.to, options.foreign, options.name, options.untie
    model, drop, keep, casts = options.model, options.drop, options.keep, options.casts
    source, remembered = whole, remembered_in(whole)
    found = unequal_ties(source, _read_there(config, to), foreign) if to is not None else Ties()
    ties = found.unequal
    aside = find_aside(source, drop, keep, remembered)
    dropped = set(aside.dropped)
    halves = [tie for tie in ties if len(dropped & {tie.kept, tie.other}) == 1]
    refuse_rest(source, ties, aside.dropped)
    source, said = leave_out(source, halves, aside.dropped)
    halved = {name for tie in halves for name in (tie.kept, tie.other)}
    source = drop_rows(source, dropped - halved)
    left = [tie for tie in ties if not dropped & {tie.kept, tie.other}]
    tensors = source.tensors
    companions = find_companions(source, config.data if config is not None else None)
    spelled = read_spelling(remembered, to)
    headers = companions.headers
    if aside.kept:
        companions = replace(companions, groups=aside.without(headers.groups))
    rest = companions.headers
    unstack = None
    if companions.quantization is not None:
        from regraft.checkpoints.per_expert import find_unstacked

        unstack = partial(find_unstacked, companions)
    known = detect(rest, config, source.where, options.source_layout, foreign, spelled, unstack)
    if to is not None and known.mtp.groups:
        check_mtp(known.books, known.mtp, (known.layout or "", to), source.where)
    try:
        way_out = partial(_way_out, Path(source.where), model)
        plan = make_plan(rest, known, to, source.where, way_out) if to is not None else None
    except UnmatchedKeysError:
        from regraft.checkpoints.misspelled import read_misspelled

        spelled_right = None if repaired else read_misspelled(whole, rest, known)
        if spelled_right is None:
            raise
        return _prepare(spelled_right, config, options, repaired=True)
    if plan is not None and aside.kept:
        check_kept(known, plan.books, aside.kept, headers, config, source.where)
        plan = aside.beside(plan, headers)
    if plan is not None and companions.of:
        check_quantised(plan, companions)
        check_step_by_step(plan, companions, source.where)
    named = plan
    if plan is not None and companions.aliases:
        plan = use_owners(plan, companions.aliases)
    here = plan.source_layout if plan is not None else known.layout or to or ""
    rules, notes = ({}, []) if plan is None else (plan.fired(), notes_of(plan, known))
    demanding = plan is not None and bool(plan.demanding())
    outputs = [output_of(entry) for entry in plan.entries] if plan is not None else []
    if untie and not left and not found.undecided:
        raise BadInputError(nothing_to_untie(source))
    if plan is not None and (
        asked := [t for t in left if not untie or (to == V4 and not t.is_head)]
    ):
        refuse(source.where, asked)
    said += [
        f"untied: {t.other} and {t.kept} are both kept, with their own values"
        if untie
        else f"{t.other} is tied to {t.kept}, and the two have other values; both stay as they are"
        for t in left
    ]
    gone = set(aside.dropped)
    said += [
        undecided_note(tie, config)
        for tie in found.undecided
        if not untie and not gone & {tie.kept, tie.other}
    ]
    untied: list[str] = []
    if plan is None:
        moves = identity(tensors)
        kept = frozenset(tensors.names[row] for row in companions.rows())
        beside = [(name, name) for name in kept]
    else:
        moves = moves_of(outputs, plan.carried, tensors)
        if named is not None and companions.aliases:
            untied = add_aliases(moves, named, companions.aliases, tensors)
        count = len(moves.names)
        if companions.of:
            add_companions(moves, plan, companions, source)
        kept = frozenset(moves.names[count:])
        beside = pairs_from(moves, count, tensors)
        moves = finish(moves, tensors)
    dtypes, changed = cast_dtypes(moves.names, moves.dtypes, casts, kept)
    note = _note(source, known, plan, here, to, aside)
    part = part_by_book(known.books) if to == DIFFUSERS and plan is not None else None
    part = None if name is not None else part
    stem = part.stem if part is not None else None
    layout = lay_out(source, moves, dtypes, options.shard_size, name, note, stem)
    report = CheckpointReport(
        known.layout or to or "",
        to or known.layout or "",
        list(known.evidence),
        tensors_in=len(tensors),
        tensors_out=len(moves.names),
        bytes=layout.size,
        files=[file.name for file in layout.files],
        others=[str(path) for path in source.others],
        rules=rules,
        carried=sum(len(c.group.ids) for c in plan.carried) if plan is not None else len(tensors),
        renamed=len(moves.kept),
        casts=changed,
    )
    made = (moves.names, moves.shapes, dtypes)
    report.trace = Trace(headers, plan, len(tensors), beside=tuple(beside), made=made)
    text = (
        _convert_config(source, known, to, casts, report, remembered, untie=untie)
        if to is not None
        else None
    )
    files = PartFiles()
    if part is not None and (text is None or model is not None):
        text = None
        shapes = dict(zip(moves.names, moves.shapes, strict=True))
        files = files_of_part(known.books[0].model_types[0], part, shapes, model)
        report.others += [*files.written, *files.copied]
        report.notes += files.notes
    if to in _OWN_FORMS:
        report.notes.append(
            f"the names and shapes are those of {to}, in safetensors files; {_OWN_FORMS[to]}"
        )
    report.dropped, report.kept = list(aside.dropped), list(aside.kept)
    report.notes += [*known.notes, *source.notes, *said, *aside.words(), *notes]
    if untied:
        report.notes.append(
            "these were other names of tensors and have bytes of their own now: "
            + ", ".join(untied)
        )
    if plan is not None and text is not None and known.layout != to:
        report.notes += _class_notes(plan, text)
    if name is not None and report.config:
        report.notes.append(
            f"a file is written, and {source.root / CONFIG} stays as it is; the result's would be another: "
            + "; ".join(report.config)
        )
        report.config = []
    if source.left_out:
        report.notes.append(
            "left out, because they hold weights in another form or lie elsewhere: "
            + ", ".join(source.left_out)
        )
    adapters = [str(path.parent) for path in source.others if path.name == ADAPTER]
    if adapters and name is None and plan is not None:
        report.notes.append(
            "adapters beside the weights stay in their own layout, convert each of them by itself: "
            + ", ".join(adapters)
        )
    return Prepared(
        source,
        known,
        plan,
        moves,
        dtypes,
        layout,
        text,
        report,
        note,
        files.written,
        files.copied,
        demanding,
    )


_OWN_FORMS = {
    "gguf": "a .gguf file for llama.cpp is not written (its own convert_hf_to_gguf.py makes one)",
    "litgpt": "a lit_model.pth is not written (litgpt convert_to_litgpt makes one)",
    "megatron": "Megatron's distributed checkpoint is not written (Megatron-Bridge makes one)",
}
"""Layouts of tools that read weights in a form of their own, and what the user may expect and does not get."""


def _read_there(config: ModelConfig | None, to: str | None) -> ModelConfig | None:
    """The config as transformers 4 reads it, whether it is the source's or the result's."""
    if config is None or to != V4:
        return config
    return replace(config, data=rename_fields(config.data, V4)[0])


def _note(
    source: Source, known: Detected, plan: Plan | None, here: str, to: str | None, aside: Aside
) -> str | None:
    """The note for the metadata of a result of the layout ``here``; that of a source that stays as it is."""
    if plan is None or to is None:
        if aside.dropped or aside.kept:
            return write_note((), here, here, {}, {}, aside.dropped, aside.kept)
        texts = (file.metadata.get(KEY) for file in source.files)
        return next((text for text in texts if text is not None), None)
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    groups: Sequence[Group] = ()
    if to != plan.books[0].left:
        groups = plan.headers.groups if known.imported else ()
        if source.config is not None:
            before = source.config_data
            after, _ = rename_fields(before, to)
            if rename_fields(after, here)[0] == before:
                before = after
    return write_note(groups, here, to, before, after, aside.dropped, aside.kept)


def model_of(source: Source, model: Path | None) -> ModelConfig | None:
    """The config of the model: the one that was given, or the one beside the weights.

    ``None`` for one of diffusers: names tell its books.
    """
    told = told_of_model(source, model)
    return load_model(told) if told is not None else None


def told_of_model(source: Source, model: Path | None) -> Path | JsonFile | None:
    """The file that `model_of` takes for the config of the model, as far as it is read already."""
    if model is not None:
        return None if is_of_diffusers(model) else model
    return None if says_diffusers(source.config_data) else source.config


def _class_notes(plan: Plan, config: bytes) -> list[str]:
    """That a config still names the class that it was saved from: a book of the user's own says nothing of classes."""
    architectures = json.loads(config).get("architectures")
    own = {book.path for book in own_books()}
    if not architectures or not any(book.path in own for book in plan.books):
        return []
    named = ", ".join(map(str, architectures)) if isinstance(architectures, list) else architectures
    return [
        f"architectures in {CONFIG} is still {named}, since rule books say nothing of classes: change it where "
        f"{plan.target_layout} is the layout of another class"
    ]


def _convert_config(
    source: Source,
    known: Detected,
    to: str,
    casts: Sequence[Cast],
    report: CheckpointReport,
    remembered: Sequence[Remembered],
    *,
    untie: bool,
) -> bytes | None:
    if source.config is None:
        return None
    config = dict(source.config_data)
    changes: list[str] = []
    is_sorted = list(config) == sorted(config)
    saved_by = str(config.get("transformers_version") or "")
    # transformers 5 saves old names, too, and its own config beside them.
    if known.layout != to or (to == V4 and saved_by.startswith("5.")):
        old = config
        config, changes = rename_fields(config, to)
        before = read_config(remembered, to, old)
        # A note decides how fields are spelled, and not what they say: it has to lead to what is there.
        there = known.layout or to
        if before not in (None, config) and rename_fields(before or {}, there)[0] == old:
            config = before or {}
            changes = changes or ["its fields are those that it had before"]
    whole = next((cast for cast in reversed(casts) if cast.pattern == "*"), None)
    for name in ("dtype", "torch_dtype"):
        if whole is not None and config.get(name) not in (None, TORCH[whole.dtype]):
            config[name] = TORCH[whole.dtype]
            changes.append(f"{name} is now {config[name]}")
    if untie:
        config = without_ties(config)
        changes = [*changes, f"{FIELD} is now false"]
    report.config = changes
    if not changes:
        return source.config.text.encode()
    return (json.dumps(config, indent=2, sort_keys=is_sorted) + "\n").encode()


__all__ = ["CONFIG", "Prepared", "prepare"]
