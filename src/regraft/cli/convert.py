"""`regraft convert`: an adapter, or a whole checkpoint, to another layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output
from regraft.options import ConvertOptions
from regraft.values import replace

if TYPE_CHECKING:
    from regraft.cli.progress import Mode
    from regraft.cli.run_journal import RunJournal
    from regraft.report import Report
    from regraft.sources.resolve import Item
    from regraft.views.outcome import SourceOutcome


@click.command(cls=options.WithArguments)
@options.argument(
    "paths",
    "SRC: an adapter's folder or file, or a checkpoint; several of them, or folders with any number inside, are "
    "converted each by itself. DST: the folder to write, or the file where SRC is one weights file of a model, or the "
    "dialect writes one file; of several SRC the folder for all results. Each result appears whole or not at all.",
    metavar="SRC... DST",
    type=options.FILE,
    nargs=-1,
    required=True,
)
@options.from_class(ConvertOptions)
@options.beyond
@click.option(
    "--fail-fast",
    is_flag=True,
    help="Several SRC: stop at the first that fails. Of one folder with several adapters: all or nothing.",
)
@options.html
@options.json
@options.quiet
@options.progress
@options.checked(lambda given: _problems(given))
def convert(
    paths: tuple[Path, ...],
    html: Path | None,
    *,
    json: bool,
    quiet: bool,
    progress: Mode,
    fail_fast: bool,
    **given: Any,
) -> Job:
    """Convert an adapter, or a whole checkpoint, to another layout; or many of them.

    Exit status: 0 done, 1 bad input (of several SRC: not all were converted), 2 usage, 3 refused because there is no
    exact equivalent, 4 not equal (--verify).
    """
    asked = ConvertOptions(**given)
    *sources, dst = (*paths, paths[0]) if asked.in_place and len(paths) == 1 else paths
    out = Output(json=json, quiet=quiet, progress=progress)

    def job() -> int:
        if asked.abort:
            return _convert_one(out, sources[0], dst, html, asked)
        from regraft.sources.resolve import find_sources

        there = [options.located(source, whole=not asked.dry_run) for source in sources]
        items, deeper = find_sources(there)
        if len(sources) == 1 and items[0].path == there[0]:
            return _convert_one(out, there[0], dst, html, asked)
        if asked.stage is not None:
            raise click.UsageError("--stage takes one checkpoint")
        if len(sources) == 1 and fail_fast:
            return _convert_one(out, there[0], dst, html, asked)
        if asked.in_place:
            raise click.UsageError("--in-place takes one checkpoint")
        from regraft.cli.many import warn_of_rest
        from regraft.cli.pages import show_page_of_many

        warn_of_rest(out, there, deeper)
        tell = partial(show_page_of_many, out, html, "convert", there, asked=len(items))
        return _convert_many(out, items, dst, fail_fast=fail_fast, asked=asked, told=tell)

    return job


def _convert_one(
    out: Output,
    src: Path,
    dst: Path,
    html: Path | None,
    asked: ConvertOptions,
) -> int:
    from regraft.cli.forms import tell
    from regraft.cli.pages import failure_page
    from regraft.converting.convert import convert_with

    # A merge goes through its base, and is as far as that is.
    measured = Path(asked.model) if asked.merge and asked.model is not None else src
    with failure_page(html, "convert", src), out.waiting("converting", measured) as progress:
        say = None if out.quiet else lambda line: out.warn(line + "\n")
        report = convert_with(src, dst, asked, tell=say, progress=progress)
    return tell(out, report, html, src)


def _convert_many(
    out: Output,
    items: Sequence[Item],
    dst: Path,
    *,
    fail_fast: bool,
    asked: ConvertOptions,
    told: Callable[[Sequence[SourceOutcome]], None],
) -> int:
    """Each source into a folder or file of its own below DST."""
    from regraft.checkpoints.source import is_checkpoint
    from regraft.cli.many import run_many
    from regraft.views.outcome import converted

    for_each = replace(asked, jobs=None, rules=())

    def work(item: Item) -> SourceOutcome:
        job = None
        if journal is not None:
            if before := journal.before(item):
                return before
            job = journal.job(item)
        place = _place_of(item, dst, asked.to)
        resume = asked.resume and is_checkpoint(item.path)
        report, other = _with_its_base(item.path, place, replace(for_each, resume=resume))
        outcome = converted(item.name, item.path, place, report, other)
        if journal is not None and job is not None:
            journal.note(item, job, outcome)
        return outcome

    with options.own_books(asked.rules):
        journal, jobs = _journal(dst, asked), asked.jobs or 1
        status = run_many(
            out, items, work, jobs=jobs, fail_fast=fail_fast, told=told, resumes=journal is not None
        )
    if journal is not None and status == 0:
        journal.end()
    return status


def _journal(dst: Path, asked: ConvertOptions) -> RunJournal | None:
    """Where what is done of many sources is noted; nowhere for what writes nothing on this machine."""
    from regraft.cli.run_journal import RunJournal
    from regraft.rules.book import rules_words
    from regraft.sources.places import address_of

    if asked.dry_run or address_of(dst) is not None:
        if asked.resume and not asked.dry_run:
            raise click.UsageError("--resume goes on with a folder of this machine")
        return None
    beside = [Path(name) for name in rules_words()[1::2]]
    if asked.model is not None:
        model = Path(asked.model)
        whole = asked.merge or asked.via == "merge" or not model.is_dir()
        beside.append(model if whole else model / "config.json")
    given = asked.given()
    return RunJournal(dst, given, beside, resume=asked.resume, overwrite=asked.overwrite)


def _with_its_base(src: Path, dst: Path, asked: ConvertOptions) -> tuple[Report, str | None]:
    """Convert one of many; without the base that is given for all where it belongs to another, and why that is."""
    from regraft.adapters.detect import why_of_another
    from regraft.converting.convert import convert_with
    from regraft.errors import BadInputError

    try:
        return convert_with(src, dst, asked), None
    except BadInputError as error:
        other = why_of_another(error.findings)
        if other is None or asked.merge:
            raise
    return convert_with(src, dst, replace(asked, model=None)), other


def _place_of(item: Item, dst: Path, to: str) -> Path:
    """Where a result goes: a file where the source is one and the target's dialect writes one, else a folder."""
    from regraft.checkpoints.source import is_checkpoint
    from regraft.dialects.base import dialects
    from regraft.dialects.names import layout_named
    from regraft.layouts.names import DEFAULT

    place = dst / item.name
    if is_checkpoint(item.path):
        return place.with_suffix(".safetensors") if item.path.is_file() else place
    can = dialects()[layout_named(to).dialect or DEFAULT].capabilities
    if can.suffixes and (item.path.is_file() or not can.folder):
        return (
            place.with_suffix(can.suffixes[0])
            if item.path.is_file()
            else place.with_name(place.name + can.suffixes[0])
        )
    return place.with_suffix("") if item.path.is_file() else place


def _problems(given: Mapping[str, Any]) -> Iterator[click.UsageError]:
    paths = given.get("paths")
    several = paths is not None and len(paths) > 2
    if paths is not None and len(paths) == 1 and not given.get("in_place"):
        yield click.BadParameter("DST is missing", param_hint="DST")
    if several and given.get("in_place"):
        yield click.UsageError("--in-place takes one SRC")
    yield from options.wrong_size(given)
    if given.get("via") is not None:
        from regraft.adapters.ranks import Options

        yield from options.wrong_value("--via", Options, given["via"])
    named = [f"--{name}" for name in ("part", "commit", "abort") if given.get(name)]
    if len(named) > 1:
        yield click.UsageError(f"{' and '.join(named)}: give one of them")
    if named and "stage" in given and given["stage"] is None:
        yield click.UsageError(f"{named[0]} needs --stage")
    if given.get("stage") is not None and (several or given.get("html") is not None):
        yield click.UsageError("--stage takes one SRC, and no --html")
