"""An adapter's files converted: opened by their dialect, moved, compared where that is asked for, and written whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.adapters.convert import Converted, convert_adapter
from regraft.adapters.detect import load_model
from regraft.adapters.form import not_finite
from regraft.adapters.home import at_home
from regraft.adapters.protocol import Opened
from regraft.adapters.ranks import MERGE, Options
from regraft.dialects.base import Found
from regraft.dialects.names import SourceName
from regraft.dialects.opening import Opening, Target, find_source, reopened
from regraft.errors import BadInputError, Finding, NotEqualError, RefusedError, RegraftError
from regraft.layouts.names import Layout
from regraft.options import ConvertOptions
from regraft.planning.model import Foreign, ModelConfig
from regraft.report import Report
from regraft.storage.beside import narrow
from regraft.storage.folder import check_destination, copy_file, staged_file, staged_folder
from regraft.storage.stale import sort_files
from regraft.storage.stamp import Stamp
from regraft.values import replace

if TYPE_CHECKING:
    from regraft.checking.certificate import AdapterVerification, Budget

Progress = Callable[[str, int, int], None]
"""Told what is done, how much of it, and how much there is."""


def convert_adapters(
    src: Path,
    dst: Path,
    to: Layout,
    given: SourceName,
    model: Path | None,
    asked: ConvertOptions,
    *,
    foreign: Foreign,
    progress: Progress | None = None,
    known: ModelConfig | None = None,
) -> Report:
    """Convert the adapters of a path; ``given`` is what was said of them, ``known`` a base that has no files.

    Raises what `regraft.convert` raises, with the findings of all adapters together.
    """
    ranks = Options(asked.via, asked.compact, asked.uniform_rank)
    if asked.via == MERGE:
        return _held_or_merged(src, dst, to, given, model, asked, foreign, progress)
    opening = find_source(src, given)
    found = opening.found
    if asked.merge:
        return _merge(opening, dst, to, given, model, asked.overwrite, progress, foreign)
    target = Target.of(to, opening, dst)
    check_destination(src, dst, asked.overwrite, file=target.file)
    config = known
    report = Report(str(src), str(dst), written=not asked.dry_run)
    report.files = [str(path) for path in found.others]
    left = _budget(asked.verify_budget) if asked.verify else None
    converted: list[tuple[Opened, Converted]] = []
    stamps: list[Stamp] = []
    findings: list[Finding] = []
    failed: list[RegraftError] = []
    for number, folder in enumerate(found.folders):
        if progress is not None:
            progress(folder.name, number, len(found.folders))
        stamps += _stamp(folder, found)
        try:
            opened = opening.open(folder)
            by_itself = getattr(opened, "convert", None)
            if by_itself is not None:
                result = by_itself(to, given.family, model, ranks)
            else:
                config = load_model(model) if model is not None and config is None else config
                opened, moved = at_home(opened, config, foreign)
                result = convert_adapter(
                    opened,
                    to,
                    config,
                    given.layout,
                    ranks,
                    foreign,
                    packing=given.packing,
                    into=target.into,
                )
                result.report.notes += [moved] if moved is not None else []
        except RegraftError as error:
            failed.append(error)
            findings += error.findings
            continue
        if not result.report.copied or not asked.dry_run:
            _note_values(opened, result)
        if left is not None and by_itself is not None:
            _certify_image(opened, result, target, model, asked.via, left, given.family)
        elif left is not None:
            _certify(opened, result, target, config, asked.via, foreign, left, given.packing)
        converted.append((opened, result))
        report.adapters.append(result.report)
    if failed:
        kinds = {type(error) for error in failed}
        raise (kinds.pop() if len(kinds) == 1 else BadInputError)(findings)
    if asked.max_error is not None:
        _check_errors(report, asked.max_error)
    _note_company(report, [result for _, result in converted])
    others = list(found.others)
    if not all(result.report.copied for _, result in converted):
        others, notes = sort_files(found.root, found.others)
        report.adapters[0].notes += notes
    if target.file and others:
        report.adapters[0].notes.append(
            f"left out, because one file is written: {', '.join(map(str, others))}"
        )
        others = []
    report.files = [str(path) for path in others]
    if not asked.dry_run:
        _write(found.root, others, dst, target, converted, stamps, asked.overwrite)
    if progress is not None:
        progress("", len(found.folders), len(found.folders))
    return report


def _held_or_merged(
    src: Path,
    dst: Path,
    to: Layout,
    given: SourceName,
    model: Path | None,
    asked: ConvertOptions,
    foreign: Foreign,
    progress: Progress | None,
) -> Report:
    """The adapter where the result can hold it, and otherwise the base with the adapter in its weights."""
    try:
        bare = replace(asked, via=None)
        return convert_adapters(
            src, dst, to, given, model, bare, foreign=foreign, progress=progress
        )
    except RefusedError as error:
        if model is None:
            raise
        if asked.dry_run:
            from regraft.merging.merge import merge as merge_into

            report = merge_into(model, [src], dst, source=given.family, dry_run=True)
        else:
            opening = find_source(src, given)
            report = _merge(opening, dst, to, given, model, asked.overwrite, progress, foreign)
        why = error.findings[0]
        where = f"{why.key}: " if why.key else ""
        report.adapters[0].notes.append(
            f"merged into the base, as was asked for: {where}{why.message}"
        )
        return report


def _check_errors(report: Report, most: float) -> None:
    """Refuse approximations that are off by more than what was allowed."""
    findings = [
        Finding(
            "max-error",
            f"its delta is approximated with a relative error of {target.error:.3g}, and at most {most:g} is allowed",
            key=target.key,
            fix="allow a larger error with --max-error, or ask for a better approximation with --via",
        )
        for target in report.targets
        if target.error > most
    ]
    if findings:
        raise RefusedError(findings)


def _merge(
    opening: Opening,
    dst: Path,
    layout: Layout,
    given: SourceName,
    model: Path | None,
    overwrite: bool,
    progress: Progress | None,
    foreign: Foreign,
) -> Report:
    from regraft.merging.converted import merge_adapter

    src = opening.src
    if model is None or len(opening.found.folders) != 1:
        raise BadInputError(
            Finding(
                "option",
                "merging takes one adapter, and its base with weights",
                where=str(src),
                fix="give the base's folder as --model, and one adapter's folder as SRC",
            )
        )
    from regraft.dialects.image.dialect import ImageDialect

    if isinstance(opening.dialect, ImageDialect):
        from regraft.merging.merge import merge as merge_into

        return merge_into(
            model, [src], dst, source=given.family, overwrite=overwrite, progress=progress
        )
    _check_folder(dst)
    check_destination(src, dst, overwrite)
    check_destination(model, dst, overwrite)
    files = [stamp.path for stamp in _stamp(opening.found.folders[0], opening.found)]
    opened, moved = at_home(opening.one(), load_model(Path(model)), foreign)
    adapter, checkpoint = merge_adapter(
        opened,
        dst,
        layout,
        model,
        given.layout,
        overwrite,
        progress,
        foreign,
        files,
    )
    adapter.notes += [moved] if moved is not None else []
    report = Report(str(src), str(dst), [adapter], checkpoint=checkpoint)
    report.files = list(checkpoint.others)
    return report


def _budget(seconds: float) -> Budget:
    from regraft.checking.certificate import Budget

    return Budget(seconds)


def _certify(
    source: Opened,
    result: Converted,
    target: Target,
    model: ModelConfig | None,
    via: str | None,
    foreign: Foreign,
    left: Budget,
    packing: str | None,
) -> None:
    """Compare what an adapter adds before and after; an approximation that was asked for is only measured.

    The result is opened by its dialect; where that needs files, they are written for this and removed.
    """
    from regraft.checking.certificate import compare

    with reopened(target.dialect, source, result) as made:
        done = compare(source, made, model, _tolerance(via), foreign, left, packing)
    _report_certificate(result, done)


def _certify_image(
    source: Opened,
    result: Converted,
    target: Target,
    base: Path | None,
    via: str | None,
    left: Budget,
    family: str | None,
) -> None:
    """The same of a LoRA of an image model."""
    from regraft.checking.image import compare_images
    from regraft.dialects.image.dialect import PEFT_IMAGE, ImageFile

    assert isinstance(source, ImageFile)
    dialect = PEFT_IMAGE if target.dialect.name == "peft" else target.dialect
    with reopened(dialect, source, result) as made:
        assert isinstance(made, ImageFile)
        done = compare_images(source, made, base, _tolerance(via), left, family)
    _report_certificate(result, done)


def _tolerance(via: str | None) -> float:
    """How far deltas may be off; an approximation that was asked for is only measured."""
    from regraft.checking.certificate import TOLERANCE

    return TOLERANCE if via is None or via == "dense" else math.inf


def _report_certificate(result: Converted, done: AdapterVerification) -> None:
    """Put it into the report. Raises ``NotEqualError``."""
    result.report.error = done.error
    result.report.verified = len(done.targets) + done.others
    result.report.sampled = done.sampled
    if not done.equal:
        raise NotEqualError(done.differences)


def _note_company(report: Report, results: list[Converted]) -> None:
    """Adapters that PEFT cannot hold on one model at a time."""
    targets = {tuple(sorted(r.config.get("target_parameters") or ())) for r in results}
    if len(targets - {()}) > 1:
        report.adapters[0].notes.append(
            "these adapters name different target_parameters: load each on a model of its own, because PEFT "
            "does not hold two such adapters on one model"
        )


def _note_values(source: Opened, result: Converted) -> None:
    for name, count in not_finite(source.tensors).items():
        result.report.notes.append(
            f"{name} holds {count} values that are NaN or infinite; they were kept"
        )


def _check_folder(dst: Path) -> None:
    if dst.suffix == ".safetensors" and not dst.is_dir():
        message = "a merged model is a folder, and this is a file's name"
        fix = "name a folder to write"
        raise BadInputError(Finding("destination-is-file", message, where=str(dst), fix=fix))


def _stamp(folder: Path, found: Found) -> list[Stamp]:
    """What an adapter's files are now, to be compared when the result is written."""
    if found.weights is not None:
        return [Stamp.of(path) for path in (found.weights, *found.beside)]
    others = {found.root / path for path in found.others}
    files = (path for path in folder.iterdir() if path.is_file() and path not in others)
    return [Stamp.of(path) for path in files]


def _write(
    root: Path,
    others: Sequence[Path],
    dst: Path,
    target: Target,
    converted: list[tuple[Opened, Converted]],
    stamps: list[Stamp],
    overwrite: bool,
) -> None:
    size = sum((root / path).stat().st_size for path in others)
    for _, result in converted:
        size += sum(t.nbytes for t in (*result.tensors.values(), *result.aside.values()))
    staged_place = staged_file if target.file else staged_folder
    with staged_place(dst, overwrite, size) as staged:
        for source, result in converted:
            inner = staged / source.name
            inner.mkdir(parents=True, exist_ok=True)
            target.dialect.save(inner, source, result)
        for path in others:
            (staged / path).parent.mkdir(parents=True, exist_ok=True)
            copy_file(root / path, staged / path)
        narrow(staged, [stamp.path for stamp in stamps], kept=others)
        for stamp in stamps:
            stamp.check()
