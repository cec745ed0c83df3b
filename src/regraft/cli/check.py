"""`regraft check`: whether an adapter or a checkpoint loads as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output
from regraft.options import CheckOptions
from regraft.values import replace

if TYPE_CHECKING:
    from regraft.cli.progress import Mode
    from regraft.sources.resolve import Item
    from regraft.views.outcome import SourceOutcome


@click.command(cls=options.WithArguments)
@options.argument(
    "sources",
    "Adapters, checkpoints, or folders with any number of them.",
    metavar="SRC...",
    type=options.PLACE,
    nargs=-1,
    required=True,
)
@options.from_class(CheckOptions)
@options.beyond
@options.fail_fast
@click.option(
    "--jobs",
    metavar="N",
    type=click.IntRange(min=1),
    default=1,
    help="Several SRC: how many at once, by default one.",
)
@click.option(
    "--accept-unproven",
    is_flag=True,
    help="Exit with 0, too, where all fits by names, shapes and config, but could not be tried.",
)
@options.html
@options.json
@options.quiet
@options.progress
def check(
    sources: tuple[Path, ...],
    *,
    fail_fast: bool,
    jobs: int,
    accept_unproven: bool,
    html: Path | None,
    json: bool,
    quiet: bool,
    progress: Mode,
    **given: Any,
) -> Job:
    """Show whether SRC loads as it is; if not, how to fix it.

    Healthy means that it loads and has its full effect. The installed PEFT loads the adapter into a model without
    weights, and the result is compared, target by target, with what it should be.

    Another tool is not started: its behaviour is known from its own functions, or from its source.

    Exit status: 0 healthy, 1 SRC cannot be read (of several: one of them), 2 usage, 4 not healthy, or not proven
    without --accept-unproven (of several: one of them, and all can be read).
    """
    asked = CheckOptions(**given)
    out = Output(json=json, quiet=quiet, progress=progress)

    def job() -> int:
        from regraft.sources.resolve import find_sources

        if len(sources) == 1 and not sources[0].is_dir():
            return _check_one(out, sources[0], asked, html, lenient=accept_unproven)
        items, deeper = find_sources(sources, results=False)
        if len(sources) == 1 and items[0].path == sources[0]:
            return _check_one(out, sources[0], asked, html, lenient=accept_unproven)
        from regraft.cli.many import warn_of_rest
        from regraft.cli.pages import show_page_of_many

        with options.own_books(asked.rules):
            bare = replace(asked, rules=())
            warn_of_rest(out, (), deeper)
            tell = partial(show_page_of_many, out, html, "check", sources, asked=len(items))
            return _check_many(
                out, items, bare, jobs, fail_fast=fail_fast, lenient=accept_unproven, told=tell
            )

    return job


def _check_one(
    out: Output, src: Path, asked: CheckOptions, html: Path | None, *, lenient: bool
) -> int:
    from regraft.checking.check import check_with
    from regraft.cli.forms import tell
    from regraft.cli.pages import failure_page
    from regraft.errors.codes import Status

    with failure_page(html, "check", src), out.waiting("checking", src):
        result = check_with(src, asked)
    status = tell(out, result, html, src)
    return Status.DONE if lenient and result.is_unproven else status


def _check_many(
    out: Output,
    items: Sequence[Item],
    asked: CheckOptions,
    jobs: int,
    *,
    fail_fast: bool,
    lenient: bool,
    told: Callable[[Sequence[SourceOutcome]], None],
) -> int:
    from regraft.checking.check import check_with, passed_over
    from regraft.checking.for_tool import ToolCheck
    from regraft.checking.verdict import Check
    from regraft.cli.many import run_many
    from regraft.errors.codes import Status
    from regraft.views.outcome import SourceOutcome, checked

    def work(item: Item) -> SourceOutcome:
        if (why := passed_over(item.path, asked.to)) is not None:
            return SourceOutcome(item.name, str(item.path), None, "skipped", why)
        result = check_with(item.path, asked)
        other = result.of_another
        if other is not None:
            # One base is given for all, and this one belongs to another: it is judged as if none were given.
            result = check_with(item.path, replace(asked, model=None))
        return checked(item.name, item.path, result, other)

    def passes(outcome: SourceOutcome) -> bool:
        result = outcome.report
        unproven = isinstance(result, Check | ToolCheck) and result.is_unproven
        return outcome.good or (lenient and unproven)

    return run_many(
        out,
        items,
        work,
        jobs=jobs,
        fail_fast=fail_fast,
        told=told,
        passes=passes,
        bad=Status.NO,
    )
