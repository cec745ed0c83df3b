"""`regraft convert`: an adapter, or a whole checkpoint, to another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output


@click.command(cls=options.WithArguments)
@options.src
@options.argument(
    "dst",
    "The folder to write, or the file where SRC is one weights file of a model, or the dialect writes one file. It "
    "appears whole or not at all.",
    metavar="DST",
    type=options.FILE,
    required=False,
)
@options.layout(
    "--to",
    "The layout to convert to (transformers-v5, transformers-v4), a dialect of adapters, or both (LAYOUT:DIALECT); "
    "'regraft layouts' lists them.",
    required=True,
)
@options.source
@options.model
@options.architecture
@options.rules
@click.option("--dry-run", is_flag=True, help="Run without writing.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it exists.")
@click.option(
    "--shard-size",
    metavar="SIZE",
    help="Checkpoints: the size of a weights file, such as 200MB or 5GB. As SRC is sharded if omitted.",
)
@click.option(
    "--dtype",
    metavar="[PATTERN=]DTYPE",
    multiple=True,
    help="Checkpoints: cast floating-point tensors (bfloat16), or those whose names fit a pattern "
    "(*.norm.weight=float32). May be given more than once.",
)
@click.option(
    "--jobs",
    metavar="N",
    type=click.IntRange(min=1),
    help="Checkpoints: how many workers. As many as there are cores if omitted.",
)
@click.option(
    "--resume", is_flag=True, help="Checkpoints: continue what a run that died had begun."
)
@click.option(
    "--in-place",
    is_flag=True,
    help="Checkpoints: rename the tensors in SRC itself, by rewriting headers only.",
)
@click.option(
    "--untie",
    is_flag=True,
    help="Checkpoints: where tied weights have other values, keep both, and write tie_word_embeddings: false.",
)
@click.option(
    "--drop",
    metavar="PATTERN",
    multiple=True,
    help="Checkpoints: leave out the tensors whose names it matches (model.mtp.*), or one of two tied weights with "
    "other values. May be given more than once.",
)
@click.option(
    "--keep",
    metavar="PATTERN",
    multiple=True,
    help="Checkpoints: carry over as they are the tensors whose names it matches, which no rule explains. May be "
    "given more than once.",
)
@click.option(
    "--dequantize",
    is_flag=True,
    help="Checkpoints: make quantised weights (FP8, MXFP4, NVFP4) bfloat16 ones. This changes numbers.",
)
@options.html
@click.option(
    "--verify",
    is_flag=True,
    help="Adapters: compare what every target adds before and after, before anything is written.",
)
@options.verify_budget
@click.option(
    "--compact", is_flag=True, help="Adapters: leave out components that add nothing, to rounding."
)
@click.option(
    "--uniform-rank",
    is_flag=True,
    help="Adapters: one rank for all targets, with zeros; no rank_pattern.",
)
@click.option(
    "--merge",
    is_flag=True,
    help="Adapters: write the base of --model in the layout, with the adapter added to its weights.",
)
@click.option(
    "--via",
    metavar="WAY",
    help="Adapters: what is done only by name. dense: a LoRA of full rank; svd:RANK (svd:16) or svd:TOLERANCE "
    "(svd:1e-3): the best one of a lower rank, with its error.",
)
@options.json
@options.quiet
def convert(
    src: Path,
    dst: Path | None,
    rules: tuple[str, ...],
    html: Path | None,
    json: bool,
    quiet: bool,
    **given: Any,
) -> Job:
    """Convert an adapter, or a whole checkpoint, to another layout.

    Exit status: 0 done, 1 bad input, 2 usage, 3 refused because there is no exact equivalent, 4 not equal (--verify).
    """
    options.check_layouts(rules, to=given["to"], from_=given["source"])
    _check_values(given["shard_size"], given["via"])
    if dst is None and not given["in_place"]:
        raise click.BadParameter("DST is missing", param_hint="DST")
    out = Output(json=json, quiet=quiet)

    def job() -> int:
        from regraft.api import convert
        from regraft.cli.pages import failure_page, show_page

        with (
            options.own_books(rules),
            failure_page(html, "convert", src),
            out.waiting("converting", src) as progress,
        ):
            report = convert(
                src,
                src if dst is None else dst,
                tell=None if quiet else lambda line: out.warn(line + "\n"),
                progress=progress,
                **given,
            )
        if json:
            out.data(report.to_dict())
        elif report.checkpoint is not None and not quiet:
            from regraft.cli.checkpoint_words import show_checkpoint

            show_checkpoint(out, report, report.checkpoint)
        elif not quiet:
            from regraft.cli.words import show_report

            show_report(out, report)
        show_page(out, html, report)
        return 0

    return job


def _check_values(shard_size: str | None, via: str | None) -> None:
    """Whether the values of options can be read, before any work is done."""
    if shard_size is not None:
        from regraft.checkpoints.sharding import parse_size

        with options.usage("--shard-size"):
            parse_size(shard_size)
    if via is not None:
        from regraft.adapters.ranks import Options

        with options.usage("--via"):
            Options(via)
