"""An adapter's files converted: opened by their dialect, moved, compared where that is asked for, and written whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from regraft.adapters.convert import Converted, convert_adapter
from regraft.adapters.form import not_finite
from regraft.adapters.home import at_home
from regraft.adapters.protocol import Into, Opened
from regraft.adapters.ranks import MERGE, Options
from regraft.dialects.base import Found
from regraft.dialects.image.families import Family, only_image_family
from regraft.dialects.names import SourceName
from regraft.dialects.opening import Opening, Target, find_source, reopened
from regraft.errors import BadInputError, Finding, NotEqualError, RefusedError, RegraftError
from regraft.layouts.names import Layout
from regraft.options import ConvertOptions
from regraft.planning.model import Foreign, ModelConfig, load_model
from regraft.report import Report
from regraft.storage.beside import narrow
from regraft.storage.folder import check_destination, copy_file, staged_file, staged_folder
from regraft.storage.json_files import folder_with_config, told_in_json
from regraft.storage.stale import sort_files
from regraft.storage.stamp import Stamp
from regraft.values import replace

if TYPE_CHECKING:
    from regraft.checking.certificate import AdapterVerification, Budget

Progress = Callable[[str, int, int], None]
"""Told what is done, how much of it, and how much there is."""


class Request(Struct, frozen=True, kw_only=True):
    """What is to be converted, into what, and what was said of it."""

    src: Path
    dst: Path
    to: Layout
    given: SourceName
    """What was said of the source."""
    model: Path | None
    asked: ConvertOptions
    foreign: Foreign
    progress: Progress | None = None
    known: ModelConfig | None = None
    """The base's config, where it has no files."""

    def tell(self, what: str, done: int, whole: int) -> None:
        """Tell how far it is."""
        if self.progress is not None:
            self.progress(what, done, whole)


class _Moved(Struct, frozen=True, eq=False):
    """An adapter before and after."""

    opened: Opened
    result: Converted
    base: ModelConfig | None = None
    """The config of its base, where that is a language model and known."""
    by_itself: bool = False
    """Whether it converted itself, as those of image models do."""


def convert_adapters(request: Request) -> Report:
    """Convert the adapters of a path.

    Raises what `regraft.convert` raises, with the findings of all adapters together.
    """
    asked = request.asked
    if asked.via == MERGE:
        return _held_or_merged(request)
    opening = find_source(request.src, request.given)
    if asked.merge:
        return _merge(request, opening)
    target = Target.of(request.to, request.dst)
    if target.file and len(opening.found.folders) > 1:
        message = (
            f"there are {len(opening.found.folders)} adapters, and the destination is one file"
        )
        fix = "name a folder to write, or convert them one by one"
        raise BadInputError(Finding("option", message, where=str(request.src), fix=fix))
    check_destination(request.src, request.dst, overwrite=asked.overwrite, file=target.file)
    company = sort_files(opening.found.root, opening.found.others)
    # What they are now, to be compared when the result is written.
    stamps = tuple(map(Stamp.of, opening.files))
    moved = _Conversion(request, opening, target).run()
    report = _report(request, opening.found, company, target, moved)
    if not asked.dry_run:
        _write(request, opening.found.root, report.files, target, moved, stamps)
    request.tell("", len(moved), len(moved))
    return report


class _Conversion(Struct, frozen=True, dict=True):
    """The adapters of a path on their way."""

    request: Request
    opening: Opening
    target: Target

    @cached_property
    def base(self) -> ModelConfig:
        """The config of the base that was named, read once for all."""
        assert self.request.model is not None
        return load_model(self.request.model)

    def run(self) -> list[_Moved]:
        """All of them, one after the other; what is wrong with any is raised together."""
        asked = self.request.asked
        budget = _budget(asked.verify_budget) if asked.verify else None
        moved: list[_Moved] = []
        failed: list[RegraftError] = []
        folders = self.opening.found.folders
        for number, folder in enumerate(folders):
            self.request.tell(folder.name, number, len(folders))
            try:
                one = self.move(folder)
            except RegraftError as error:
                failed.append(error)
                continue
            if not one.result.report.copied or not asked.dry_run:
                one.result.report.notes += [
                    f"{name} holds {count} values that are NaN or infinite; they were kept"
                    for name, count in not_finite(one.opened.tensors).items()
                ]
            if budget is not None:
                self.certify(one, budget)
            moved.append(one)
        if failed:
            kinds = {type(error) for error in failed}
            findings = [finding for error in failed for finding in error.findings]
            raise (kinds.pop() if len(kinds) == 1 else BadInputError)(findings)
        return moved

    def move(self, folder: Path) -> _Moved:
        """One of them. Raises what `convert_adapter` raises."""
        request = self.request
        asked, given = request.asked, request.given
        opened = self.opening.open(folder)
        ranks = Options(asked.via, asked.compact, asked.uniform_rank)
        by_itself = getattr(opened, "convert", None)
        if by_itself is not None:
            with only_image_family(_family_of(request.model)):
                result = by_itself(request.to, given.family, request.model, ranks)
            return _Moved(opened, result, by_itself=True)
        base, dialect = request.known, self.target.dialect
        if base is None and request.model is not None:
            base = self.base  # of a language model: that of an image model has no such config
        opened, note = at_home(opened, base, request.foreign)
        result = convert_adapter(
            opened,
            request.to,
            base,
            given.layout,
            ranks,
            request.foreign,
            packing=given.packing,
            into=Into(dialect, dialect.name == self.opening.dialect.name),
        )
        result.report.notes += [note] if note is not None else []
        return _Moved(opened, result, base)

    def certify(self, moved: _Moved, budget: Budget) -> None:
        """Compare what an adapter adds before and after; an approximation that was asked for is only measured.

        The result is opened by its dialect; where that needs files, they are written for this and removed.

        Raises ``NotEqualError``.
        """
        from regraft.checking.certificate import TOLERANCE, compare

        request, dialect = self.request, self.target.dialect
        exact = request.asked.via is None or request.asked.via == "dense"
        tolerance = TOLERANCE if exact else math.inf
        if not moved.by_itself:
            with reopened(dialect, moved.opened, moved.result) as made:
                packing = request.given.packing
                done = compare(
                    moved.opened, made, moved.base, tolerance, request.foreign, budget, packing
                )
        else:
            from regraft.checking.image import compare_images
            from regraft.dialects.image.dialect import PEFT_IMAGE, ImageFile

            assert isinstance(moved.opened, ImageFile)
            dialect = PEFT_IMAGE if dialect.name == "peft" else dialect
            with (
                only_image_family(_family_of(request.model)),
                reopened(dialect, moved.opened, moved.result) as made,
            ):
                assert isinstance(made, ImageFile)
                family = request.given.family
                done = compare_images(moved.opened, made, request.model, tolerance, budget, family)
        _report_certificate(moved.result, done)


def _family_of(base: Path | None) -> Family | None:
    """The family of a base of an image model that has no rule book."""
    from regraft.bridges.diffusers import family_of_base

    return family_of_base(base)


def _report(
    request: Request,
    found: Found,
    company: tuple[list[Path], list[str]],
    target: Target,
    moved: Sequence[_Moved],
) -> Report:
    """What was done, and which other files of the folder go along; ``company`` has those that mean the same elsewhere.

    Raises ``RefusedError`` where an approximation is off by more than was allowed.
    """
    asked = request.asked
    results = [one.result for one in moved]
    report = Report(str(request.src), str(request.dst), written=not asked.dry_run)
    report.adapters = [result.report for result in results]
    if asked.max_error is not None:
        _check_errors(report, asked.max_error)
    _note_company(report, results)
    others = list(found.others)
    if not all(result.report.copied for result in results):
        others, notes = company
        report.adapters[0].notes += notes
    if target.file and others:
        report.adapters[0].notes.append(
            f"left out, because one file is written: {', '.join(map(str, others))}"
        )
        others = []
    report.files = [str(path) for path in others]
    return report


def _held_or_merged(request: Request) -> Report:
    """The adapter where the result can hold it, and otherwise the base with the adapter in its weights."""
    try:
        return convert_adapters(replace(request, asked=replace(request.asked, via=None)))
    except RefusedError as error:
        if request.model is None:
            raise
        report = _merge(request, find_source(request.src, request.given))
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


def _merge(request: Request, opening: Opening) -> Report:
    """The base with the adapter in its weights."""
    from regraft.dialects.image.dialect import ImageDialect

    src, dst, model, asked = request.src, request.dst, request.model, request.asked
    if model is None or len(opening.found.folders) != 1:
        raise BadInputError(
            Finding(
                "option",
                "merging takes one adapter, and its base with weights",
                where=str(src),
                fix=f"give the base's folder as --model{_named_base(opening)}, and one adapter's folder as SRC",
            )
        )
    if isinstance(opening.dialect, ImageDialect):
        from regraft.merging.merge import merge

        return merge(
            model,
            [src],
            dst,
            source=request.given.family,
            overwrite=asked.overwrite,
            dry_run=asked.dry_run,
            progress=request.progress,
        )
    from regraft.merging.merge import merge_into

    return merge_into(
        model,
        opening,
        dst,
        request.to.name,
        given=request.given,
        foreign=request.foreign,
        overwrite=asked.overwrite,
        dry_run=asked.dry_run,
        progress=request.progress,
    )


def _named_base(opening: Opening) -> str:
    """The folder that an adapter names as its base, in words, where it is on this machine."""
    for folder in opening.found.folders[:1]:
        config = folder / "adapter_config.json"
        told = told_in_json(config.read_bytes()) if config.is_file() else None
        named = told.get("base_model_name_or_path") if isinstance(told, dict) else None
        if folder_with_config(named) is not None:
            return f" (the adapter names {named})"
    return ""


def _budget(seconds: float) -> Budget:
    from regraft.checking.certificate import Budget

    return Budget(seconds)


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


def _write(
    request: Request,
    root: Path,
    files: Sequence[str],
    target: Target,
    moved: Sequence[_Moved],
    stamps: Sequence[Stamp],
) -> None:
    others = list(map(Path, files))
    size = sum((root / path).stat().st_size for path in others)
    for one in moved:
        made = (*one.result.tensors.values(), *one.result.aside.values())
        size += sum(tensor.nbytes for tensor in made)
    staged_place = staged_file if target.file else staged_folder
    with staged_place(request.dst, overwrite=request.asked.overwrite, size=size) as staged:
        for one in moved:
            inner = staged / one.opened.name
            inner.mkdir(parents=True, exist_ok=True)
            target.dialect.save(inner, one.opened, one.result)
        for path in others:
            (staged / path).parent.mkdir(parents=True, exist_ok=True)
            copy_file(root / path, staged / path)
        narrow(staged, [stamp.path for stamp in stamps], kept=others)
        for stamp in stamps:
            stamp.check()
