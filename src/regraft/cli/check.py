"""`regraft check`: whether an adapter or a checkpoint loads as it is."""

from __future__ import annotations

from pathlib import Path

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output


@click.command(cls=options.WithArguments)
@options.argument(
    "src",
    "An adapter, a folder with several of them, or a checkpoint.",
    metavar="SRC",
    type=options.FILE,
)
@options.model
@options.architecture
@options.rules
@options.layout(
    "--for",
    "What it is to be loaded with: transformers-v5 or transformers-v4. What is installed is tried; for the other, "
    "names, shapes and the config are judged.",
    default="transformers-v5",
    show_default=True,
)
@options.html
@options.json
@options.quiet
def check(
    src: Path,
    model: Path | None,
    architecture: str | None,
    rules: tuple[str, ...],
    to: str,
    html: Path | None,
    json: bool,
    quiet: bool,
) -> Job:
    """Show whether SRC loads as it is; if not, how to fix it.

    Healthy is what loads and has its full effect. The installed PEFT loads the adapter into a model without
    weights, and what is loaded there is compared, target by target, with what should be.

    Exit status: 0 healthy, 1 SRC cannot be read, 2 usage, 4 not healthy, or not proven.
    """
    options.check_layouts(rules, for_=to)
    out = Output(json=json, quiet=quiet)

    def job() -> int:
        from regraft.checking.check import check
        from regraft.cli.pages import failure_page, show_page

        with (
            options.told(rules, architecture),
            failure_page(html, "check", src),
            out.waiting("checking", src),
        ):
            result = check(src, model=model, to=to)
        if json:
            out.data(result.to_dict())
        elif not quiet:
            from regraft.cli.check_words import show_check

            show_check(out, result)
        show_page(out, html, result)
        return 0 if result.healthy else 4

    return job
