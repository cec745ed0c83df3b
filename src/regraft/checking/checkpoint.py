"""Whether a checkpoint loads as it is."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

from regraft.bridges.transformers.files import InstalledTransformers
from regraft.bridges.transformers.release import installed_layout
from regraft.bridges.transformers.trial import (
    Loading,
    as_a_folder,
    is_there,
    try_checkpoint,
)
from regraft.checking.verdict import Verdict, rows_of
from regraft.checkpoints.companions import find_companions
from regraft.checkpoints.convert import convert_checkpoint
from regraft.checkpoints.parts import find_parts, is_parted
from regraft.checkpoints.per_expert import find_unstacked
from regraft.checkpoints.pipelines import DIFFUSERS, part_by_book
from regraft.checkpoints.prepare import model_of
from regraft.checkpoints.source import Source, open_checkpoint
from regraft.errors import RegraftError, is_unreadable
from regraft.errors.extras import lacking
from regraft.layouts.names import Layout
from regraft.planning.identify import Detected, detect
from regraft.planning.model import load_model
from regraft.report import CheckpointReport, count_in_words
from regraft.rules.book import rules_words
from regraft.rules.mtp import WHY as MTP
from regraft.rules.mtp import mtp_among


def check_checkpoint(path: Path, told: Path | None, to: Layout) -> Verdict:
    """What a loader of a layout would make of a checkpoint; ``told`` is the model's folder or config.

    Raises ``BadInputError`` where ``told`` is no config, or a file cannot be read at all.
    """
    verdict = Verdict("", "checkpoint", healthy=False)
    report: CheckpointReport | None = None
    try:
        report = convert_checkpoint(
            path, path, to=to.name, model=told, foreign=InstalledTransformers(), dry_run=True
        )
        verdict.layout = report.source_layout
    except RegraftError as error:
        if is_unreadable(error):
            raise
        verdict.findings = list(error.findings)
    place = told if told is not None else path if path.is_dir() else path.parent
    if is_there() and installed_layout() == to.name:
        with as_a_folder(path) as folder:
            _try(Loading(load_model(place), folder), verdict)
    else:
        line = lacking("transformers", "torch")
        how = "" if line is None else f": {line}"
        verdict.notes.append(f"nothing was tried: there is no transformers of {to.name} here{how}")
        if report is not None and not verdict.findings:
            verdict.healthy = report.source_layout == to.name or not any(report.rules.values())
            if not verdict.healthy:
                verdict.causes.append(
                    f"it uses the {report.source_layout} layout; names or shapes differ in {to.name}"
                )
    if not verdict.healthy:
        _mend(path, told, to, report, verdict)
    return verdict


def is_image(path: Path) -> bool:
    """Whether a checkpoint is of an image or video model: the parts of a pipeline, or a denoiser by itself."""
    opened = open_checkpoint(path)
    return is_parted(opened) or _alone(opened) is not None


def _alone(opened: Source) -> Detected | None:
    """What a part of an image model by itself is; ``None`` for everything else."""
    if model_of(opened, None) is not None:
        return None
    companions = find_companions(opened, None)
    try:
        known = detect(
            companions.headers,
            None,
            opened.where,
            None,
            None,
            unstack=partial(find_unstacked, companions),
        )
    except RegraftError:
        return None
    return known if part_by_book(known.books) is not None else None


def check_image_checkpoint(path: Path, told: Path | None, tool: str) -> Verdict:
    """Whether a checkpoint of an image model has the names and shapes that a tool takes.

    diffusers' `from_pretrained` takes folders in its own layout, ComfyUI the layout of the model's own code.
    """
    verdict = Verdict("", "checkpoint", healthy=False)
    report: CheckpointReport | None = None
    opened = open_checkpoint(path)
    try:
        layout, other = _layouts(opened)
        verdict.layout = layout
        single = other != DIFFUSERS and opened.parted
        out = path.with_name(f"{path.stem}-{other}{'.safetensors' if single else ''}")
        report = convert_checkpoint(path, out, to=other, model=told, dry_run=True)
    except RegraftError as error:
        verdict.findings = list(error.findings)
        first = verdict.findings[0]
        key = f"{first.key}: " if first.key else ""
        verdict.no_remedy = f"regraft cannot convert it: {key}{first.message}"
        return verdict
    verdict.notes = ["nothing was loaded: names and shapes were compared with the rule books"]
    verdict.healthy = (layout == DIFFUSERS) == (tool == DIFFUSERS)
    if not verdict.healthy:
        verdict.notes += report.notes
        verdict.causes.append(f"it is in the layout {layout}, and {tool} takes the layout {other}")
        if tool == DIFFUSERS:
            verdict.causes.append("diffusers' from_single_file takes it as it is")
        words = ["regraft", "convert", str(path), str(out), "--to", other, *rules_words()]
        verdict.remedy = [shlex.join(words)]
    return verdict


def _layouts(opened: Source) -> tuple[str, str]:
    """The layout that an image model is in, and the other one.

    Raises what `find_parts` raises.
    """
    if is_parted(opened):
        found = find_parts(opened)
        return found.layout, found.target
    known = _alone(opened)
    assert known is not None
    (book, *_) = known.books
    native = book.left if book.right == DIFFUSERS else book.right
    layout = known.layout or DIFFUSERS
    return layout, native if layout == DIFFUSERS else DIFFUSERS


def _try(question: Loading, verdict: Verdict) -> None:
    try:
        loaded = try_checkpoint(question)
    except RegraftError as error:
        verdict.findings += error.findings
        return
    verdict.tried = f"{loaded.versions}, {loaded.model_class}"
    verdict.error = loaded.error
    if loaded.guessed is not None:
        verdict.notes.append(loaded.guessed)
    mtp = mtp_among(loaded.unexpected, (part for _, part in question.model.parts())).names()
    unexpected = [key for key in loaded.unexpected if key not in mtp]
    if mtp:
        verdict.notes.append(f"{MTP}: {count_in_words(len(mtp), 'tensor')}")
    bad = {
        "missing": loaded.missing,
        "unexpected": unexpected,
        "mismatched": loaded.mismatched,
    }
    wrong = {key for keys in bad.values() for key in keys}
    rows = [(key, {"outcome": outcome}) for outcome, keys in bad.items() for key in keys]
    if loaded.error is None:
        rows += [(key, {"outcome": "lands"}) for key in loaded.tensors if key not in wrong]
    verdict.rows = rows_of(rows)
    verdict.causes += loaded.failed
    if loaded.missing:
        verdict.causes.append(
            "transformers fills what is missing with random numbers, and only warns of it"
        )
    if unexpected:
        verdict.causes.append("tensors that the model has no place for are left out")
    verdict.healthy = not (wrong or loaded.error or loaded.failed or verdict.findings)


def _mend(
    path: Path, told: Path | None, to: Layout, report: CheckpointReport | None, verdict: Verdict
) -> None:
    if report is None or verdict.findings:
        first = verdict.findings[0]
        key = f"{first.key}: " if first.key else ""
        verdict.no_remedy = f"regraft cannot convert it: {key}{first.message}"
    elif report.source_layout == to.name:
        verdict.no_remedy = f"it is in {to.name} already: its tensors are not those of this model"
    else:
        out = path.with_name(f"{path.stem}-{to.name.rpartition('-')[2]}")
        end = [] if told is None else ["--model", str(told)]
        words = ["regraft", "convert", str(path), str(out), "--to", to.name, *end]
        words += rules_words()
        verdict.remedy = [shlex.join(words)]
