"""`regraft inspect`: what an adapter or a checkpoint is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output

if TYPE_CHECKING:
    from regraft.inspecting import Found


@click.command(cls=options.WithArguments)
@options.src
@options.source
@options.model
@options.architecture
@options.rules
@options.beyond
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
    *,
    json: bool,
    quiet: bool,
) -> Job:
    """Show what an adapter or a checkpoint is.

    Shows its layout, with the evidence; of an adapter its ranks, scales and targets, of a checkpoint its model,
    files and tensors. Of a LoRA of an image or video model, or of a folder of such files: family, tool, algorithms,
    ranks, alphas, base and text encoders, one file a line (--json: one object a line).

    Exit status: 0 it is sound, 1 something is wrong with it, 2 usage.
    """
    options.check_layouts(rules, from_=source)
    out = Output(json=json, quiet=quiet)

    def job() -> int:
        from regraft.api import inspected
        from regraft.cli.pages import failure_page, show_page
        from regraft.cli.words import show_findings
        from regraft.dialects.image.inspect import ImageFolder, ImageSummary
        from regraft.dialects.peft.inspect import Inspection

        def each(summary: ImageSummary) -> None:
            out.line(summary.to_dict())

        with options.told(rules, architecture), failure_page(html, "inspect", src):
            found = inspected(src, model, source, architecture, each=each if json else None)
        if html is not None and not isinstance(found, Inspection):
            message = (
                "inspect has no HTML report of this; "
                "'regraft convert SRC OUT --to LAYOUT --dry-run --html FILE' makes one"
            )
            raise click.BadParameter(message, param_hint="--html")
        if json:
            if not isinstance(found, ImageFolder):
                out.data(found.to_dict())
        elif not quiet:
            _show(out, found)
        if isinstance(found, Inspection):
            show_page(out, html, found, src)
        if isinstance(found, ImageSummary | ImageFolder):
            return 1 if found.problem else 0
        if found.problems:
            show_findings(out, "bad input", found.problems)
            return 1
        return 0

    return job


def _show(out: Output, found: Found) -> None:
    from regraft.cli.checkpoint_words import show_inspected_checkpoint
    from regraft.cli.image_words import show_image, show_images
    from regraft.cli.words import show_inspection
    from regraft.dialects.image.inspect import ImageFolder, ImageSummary
    from regraft.dialects.peft.inspect import Inspection

    if isinstance(found, ImageSummary):
        show_image(out, found)
    elif isinstance(found, ImageFolder):
        show_images(out, found.files)
    elif isinstance(found, Inspection):
        show_inspection(out, found)
    else:
        show_inspected_checkpoint(out, found)
