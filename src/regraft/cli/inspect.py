"""`regraft inspect`: what an adapter or a checkpoint is."""

from __future__ import annotations

from pathlib import Path

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output


@click.command(cls=options.WithArguments)
@options.src
@options.source
@options.model
@options.architecture
@options.rules
@options.html
@options.json
@options.quiet
def inspect(
    src: Path,
    source: str | None,
    model: Path | None,
    architecture: str | None,
    rules: tuple[str, ...],
    html: Path | None,
    json: bool,
    quiet: bool,
) -> Job:
    """Show what an adapter or a checkpoint is.

    Shows its layout, with the evidence; of an adapter its ranks, scales and targets, of a checkpoint its model,
    files and tensors.

    Exit status: 0 it is sound, 1 something is wrong with it, 2 usage.
    """
    options.check_layouts(rules, from_=source)
    out = Output(json=json, quiet=quiet)

    def job() -> int:
        from regraft.api import inspect
        from regraft.checkpoints.source import is_checkpoint
        from regraft.cli.pages import failure_page, show_page
        from regraft.cli.words import show_findings, show_inspection

        if is_checkpoint(src):
            with options.told(rules, architecture):
                return _inspect_checkpoint(out, src, model, html)
        with options.told(rules, architecture), failure_page(html, "inspect", src):
            inspection = inspect(src, model=model, source=source)
        if json:
            out.data(inspection.to_dict())
        elif not quiet:
            show_inspection(out, inspection)
        show_page(out, html, inspection, src)
        if inspection.problems:
            show_findings(out, "bad input", inspection.problems)
            return 1
        return 0

    return job


def _inspect_checkpoint(out: Output, src: Path, model: Path | None, html: Path | None) -> int:
    from regraft.bridges.transformers.files import InstalledTransformers
    from regraft.checkpoints.inspect import inspect_checkpoint
    from regraft.cli.checkpoint_words import show_inspected_checkpoint
    from regraft.cli.words import show_findings

    if html is not None:
        message = "there is no page of a checkpoint alone; 'convert --dry-run --html' makes one"
        raise click.BadParameter(message, param_hint="--html")
    result = inspect_checkpoint(src, model, InstalledTransformers())
    if out.json:
        out.data(result.to_dict())
    elif not out.quiet:
        show_inspected_checkpoint(out, result)
    if result.problems:
        show_findings(out, "bad input", result.problems)
        return 1
    return 0
