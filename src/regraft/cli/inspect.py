"""`regraft inspect`: what an adapter or a checkpoint is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output
from regraft.options import InspectOptions


@click.command(cls=options.WithArguments)
@options.src
@options.from_class(InspectOptions)
@options.beyond
@options.html
@options.json
@options.quiet
def inspect(
    src: Path,
    *,
    html: Path | None,
    json: bool,
    quiet: bool,
    **given: Any,
) -> Job:
    """Show what an adapter or a checkpoint is.

    Shows its layout, with the evidence; of an adapter its ranks, scales and targets, of a checkpoint its model,
    files and tensors. Of a LoRA of an image or video model, or of a folder of such files: family, tool, algorithms,
    ranks, alphas, base and text encoders, one file a line (--json: one object a line).

    Exit status: 0 it is sound, 1 something is wrong with it, 2 usage.
    """
    asked = InspectOptions(**given)
    out = Output(json=json, quiet=quiet)

    def job() -> int:
        from regraft.cli.forms import page_of, tell
        from regraft.cli.pages import failure_page
        from regraft.cli.words import show_findings
        from regraft.dialects.image.inspect import ImageFolder, ImageSummary
        from regraft.explaining.inspect import inspected

        def each(summary: ImageSummary) -> None:
            out.line(summary.to_dict())

        with options.told(asked.rules, asked.architecture), failure_page(html, "inspect", src):
            found = inspected(src, asked, each=each if json else None)
        if html is not None and page_of(found) is None:
            message = (
                "inspect has no HTML report of this; "
                "'regraft convert SRC OUT --to LAYOUT --dry-run --html FILE' makes one"
            )
            raise click.BadParameter(message, param_hint="--html")
        if json and isinstance(found, ImageFolder):
            return found.status  # every file was told as soon as it was read
        status = tell(out, found, html, src)
        if found.problems:
            show_findings(out, "bad input", found.problems)
        return status

    return job
