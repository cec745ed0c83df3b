"""Words and tables about LoRAs of image models."""

from __future__ import annotations

from collections.abc import Mapping

from regraft.cli.output import Output, visible
from regraft.cli.styled import Column, Indented, Table, Text, width_of
from regraft.dialects.image.inspect import ImageFolder, ImageSummary
from regraft.report import count_in_words, show_size

_MOST = 3
"""Ranks and alphas that are shown."""


def show_image(out: Output, summary: ImageSummary) -> None:
    """One file."""
    out.show(Text(f"{summary.file}: LoRA for {summary.family or 'an unknown model'}", "bold"))
    table = Table(Column("", wrapped=True), Column("", wrapped=True), header=False)
    for name, value in (
        ("dialect", summary.dialect),
        ("trainer", summary.trainer or "not said"),
        ("base", summary.base or "not said"),
        ("algorithms", _counts(summary.algorithms, every=True)),
        ("ranks", _counts(summary.ranks)),
        ("alphas", _counts(summary.alphas)),
        ("text encoders", ", ".join(summary.text_encoders) or "none"),
        ("tensors", f"{summary.tensors}, {show_size(summary.size)}"),
    ):
        table.add_row(f"  {name}", visible(value))
    out.show(table)
    if summary.problem:
        out.show(Text(f"Problem: {visible(summary.problem)}", "red"))


_COLUMNS = (
    "file",
    "family",
    "dialect",
    "trainer",
    "algorithm",
    "rank",
    "alpha",
    "text encoders",
    "base",
)


def show_images(out: Output, folder: ImageFolder) -> None:
    """Many files, one a row; where the terminal is too narrow for that, a paragraph each."""
    summaries = folder.files
    rows = [_cells(summary) for summary in summaries]
    columns = zip(_COLUMNS, *rows, strict=True)
    table = Table(*map(Column, _COLUMNS))
    needed = sum(max(map(width_of, cells)) + table.gap for cells in columns) - table.gap
    if needed <= out.width:
        for row in rows:
            table.add_row(*row)
        out.show(table)
    else:
        for row in rows:
            named = zip(_COLUMNS, row, strict=True)
            (_, file), (_, family), *more = named
            told = [f"{name} {cell}" for name, cell in more if cell]
            out.show(Text(file, "bold"), Indented(Text(", ".join([family, *told]))))
    wrong = [summary for summary in summaries if summary.problem]
    if wrong:
        out.show(Text())
        for summary in wrong:
            words = visible(f"{summary.file}: {summary.problem}")
            out.show(Text.assemble(("Problem: ", "red"), words))
    text = count_in_words(len(summaries), "file") + (
        f", {len(wrong)} with a problem" if wrong else ""
    )
    out.show(Text(text))
    if any(not s.family and not s.problem for s in summaries):
        out.show(Text("?: the base model is not known; give it with --model", "yellow"))


def _cells(summary: ImageSummary) -> list[str]:
    """What the columns have for a file."""
    s = summary
    cells = (s.file, s.family or "?", s.dialect, s.trainer, _counts(s.algorithms, names=True))
    more = (_counts(s.ranks, names=True), _counts(s.alphas, names=True))
    return [visible(cell) for cell in (*cells, *more, ", ".join(s.text_encoders), s.base)]


def _counts(counts: Mapping[str, int], *, names: bool = False, every: bool = False) -> str:
    """What there is, most common first."""
    items = list(counts.items())
    shown = items if every else items[:_MOST]
    text = ", ".join(name if names or len(items) == 1 else f"{name} ({n})" for name, n in shown)
    return text + (", ..." if len(shown) < len(items) else "")
