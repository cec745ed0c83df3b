"""`regraft extract`: what tuning changed in a model, as an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output, visible
from regraft.options import ExtractOptions

if TYPE_CHECKING:
    from regraft.merging.extraction import Extraction

_SHOWN = 50


@click.command(cls=options.WithArguments)
@options.argument(
    "base",
    "The model that was tuned: a folder or a weights file of a language, image or video model.",
    metavar="BASE",
    type=options.FILE,
)
@options.argument(
    "tuned",
    "What became of it, in the same layout, with the same tensors of the same shapes.",
    metavar="TUNED",
    type=options.FILE,
)
@click.option(
    "--output",
    "-o",
    metavar="OUT",
    type=options.FILE,
    required=True,
    help="The adapter's folder, or its file where the dialect is one file.",
)
@options.from_class(ExtractOptions)
@options.json
@options.quiet
@options.checked(lambda given: _problems(given))
def extract(
    base: Path,
    tuned: Path,
    output: Path,
    *,
    json: bool,
    quiet: bool,
    **given: Any,
) -> Job:
    """Take what tuning changed in a model, as a LoRA of a rank or within an error.

    Each matrix's change is replaced by the best factors of low rank; its error and its share of the singular values
    are told. What changed and is no matrix is refused by name, unless --full keeps it or --skip leaves it out.

    Exit status: 0 done, 1 bad input, 2 usage, 3 refused because something changed that is no matrix,
    or takes more memory than may be held.
    """
    asked = ExtractOptions(**given)
    out = Output(json=json, quiet=quiet)

    def job() -> int:
        from regraft.cli.forms import tell
        from regraft.merging.extract import extract as extract_adapter

        with out.waiting("extracting") as progress:
            report = extract_adapter(base, tuned, output, **asked.values(), progress=progress)
        return tell(out, report)

    return job


def _problems(given: Mapping[str, Any]) -> Iterator[click.UsageError]:
    if {"rank", "error"} <= given.keys() and (given["rank"] is None) == (given["error"] is None):
        yield click.UsageError("give one of --rank and --error")
    if given.get("memory") is not None:
        from regraft.checkpoints.sharding import parse_size

        yield from options.wrong_value("--memory", parse_size, given["memory"])


def show_extraction(out: Output, report: Extraction) -> None:
    """What became of each matrix, the worst first."""
    from regraft.cli.styled import Column, Table, Text
    from regraft.cli.words import show_notes
    from regraft.report import count_in_words

    name = visible(Path(report.tuned).name or report.tuned)
    out.show(Text.assemble((name, "bold"), f": extracted, {report.layout} -> {report.to}"))
    numbers = ("rank", "error", "mass")
    table = Table(Column("tensor", wrapped=True), *(Column(name, "right") for name in numbers))
    worst = sorted(report.targets, key=lambda target: -target.error)
    for target in worst[:_SHOWN]:
        row = str(target.rank), f"{target.error:.3g}", f"{target.mass:.1%}"
        table.add_row(Text(visible(target.key)), *row)
    out.show(table)
    if len(worst) > _SHOWN:
        out.show(
            Text(f"… and {len(worst) - _SHOWN} more, with smaller errors; --json lists them all")
        )
    matrices = "1 matrix" if len(report.targets) == 1 else f"{len(report.targets)} matrices"
    words = f"{matrices}, off by {report.error:.3g} together"
    words += f"; {count_in_words(report.unchanged, 'tensor')} did not change"
    if report.whole:
        words += f"; {count_in_words(len(report.whole), 'tensor')} kept as a whole"
    out.show(Text(words, "green"))
    if report.skipped:
        shown = ", ".join(map(visible, report.skipped[:6]))
        more = f" and {len(report.skipped) - 6} more" if len(report.skipped) > 6 else ""
        out.show(Text(f"Left out, although they changed: {shown}{more}", "yellow"))
    show_notes(out, report.notes)
    if not report.written:
        out.show(Text("Nothing was written: this was a dry run.", "yellow"))
