"""`regraft check`: whether an adapter or a checkpoint loads as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output

if TYPE_CHECKING:
    from regraft.cli.progress import Mode
    from regraft.sources import Item
    from regraft.views.outcome import Verdict


@click.command(cls=options.WithArguments)
@options.argument(
    "sources",
    "Adapters, checkpoints, or folders with any number of them.",
    metavar="SRC...",
    type=options.PLACE,
    nargs=-1,
    required=True,
)
@options.model
@options.architecture
@options.rules
@options.beyond
@options.layout(
    "--for",
    "What it is to be loaded with: transformers-v5 or transformers-v4. What is installed is tried; for the other, "
    "names, shapes and the config are judged. Or a tool, with @VERSION if one is meant (vllm, sglang, …): what it "
    "would do with the files as they are.",
    default="transformers-v5",
    show_default=True,
)
@options.html
@options.json
@options.quiet
@options.progress
def check(
    sources: tuple[Path, ...],
    model: Path | None,
    architecture: str | None,
    rules: tuple[str, ...],
    to: str,
    html: Path | None,
    json: bool,
    quiet: bool,
    progress: Mode,
) -> Job:
    """Show whether SRC loads as it is; if not, how to fix it.

    Healthy is what loads and has its full effect. The installed PEFT loads the adapter into a model without
    weights, and what is loaded there is compared, target by target, with what should be.

    Another tool is not started: what it does is known from its own functions, or from its source.

    Exit status: 0 healthy, 1 SRC cannot be read, 2 usage, 4 not healthy, or not proven; of several SRC 1 if any of
    them is not healthy.
    """
    from regraft.checking.for_tool import is_tool

    if is_tool(to):
        if len(sources) > 1:
            raise click.UsageError("--for takes one SRC where it names a tool")
        return _for_tool(
            sources[0], model, to, html, Output(json=json, quiet=quiet, progress=progress)
        )
    options.check_layouts(rules, for_=to)
    if len(sources) > 1 and html is not None:
        raise click.UsageError("--html takes one SRC")
    out = Output(json=json, quiet=quiet, progress=progress)

    def job() -> int:
        from regraft.sources import find_sources

        with options.told(rules, architecture):
            if len(sources) == 1 and (html is not None or not sources[0].is_dir()):
                return _check_one(out, sources[0], model, to, html)
            items, _ = find_sources(sources)
            if len(sources) == 1 and items[0].path == sources[0]:
                return _check_one(out, sources[0], model, to, html)
            return _check_many(out, items, model, to)

    return job


def _check_one(out: Output, src: Path, model: Path | None, to: str, html: Path | None) -> int:
    from regraft.checking.check import check
    from regraft.cli.pages import failure_page, show_page

    with failure_page(html, "check", src), out.waiting("checking", src):
        result = check(src, model=model, to=to)
    if out.json:
        out.data(result.to_dict())
    elif not out.quiet:
        from regraft.cli.check_words import show_check

        show_check(out, result)
    show_page(out, html, result, src)
    return 0 if result.healthy else 4


def _check_many(out: Output, items: Sequence[Item], model: Path | None, to: str) -> int:
    from regraft.checking.check import check
    from regraft.cli.many import run_many
    from regraft.views.outcome import SourceOutcome

    def work(item: Item) -> SourceOutcome:
        result = check(item.path, model=model, to=to)
        findings = [finding for verdict in result.verdicts for finding in verdict.findings]
        why = "" if result.healthy or not findings else findings[0].message
        verdict: Verdict = "healthy" if result.healthy else "not healthy"
        return SourceOutcome(item.name, str(item.path), None, verdict, why, result)

    return run_many(out, items, work)


def _for_tool(src: Path, model: Path | None, tool: str, html: Path | None, out: Output) -> Job:
    if html is not None:
        raise click.BadParameter("there is no page of what another tool does", param_hint="--html")

    def job() -> int:
        from regraft.checking.for_tool import check_for

        with out.waiting("checking", src):
            result = check_for(src, tool, model)
        if out.json:
            out.data(result.to_dict())
        elif not out.quiet:
            from regraft.cli.check_words import show_tool

            show_tool(out, result)
        return 0 if result.healthy else 4

    return job
