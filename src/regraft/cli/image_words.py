"""Words and tables about LoRAs of image models."""

from __future__ import annotations

from collections.abc import Mapping

from regraft.cli.output import Output, visible
from regraft.cli.styled import Column, Table, Text
from regraft.dialects.image.inspect import ImageFolder, ImageSummary
from regraft.report import show_size

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


def show_images(out: Output, folder: ImageFolder) -> None:
    """Many files, one a row."""
    summaries = folder.files
    names = (
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
    table = Table(*(Column(name, wrapped=True) for name in names))
    for s in summaries:
        family = s.family or (f"? {s.problem}" if s.problem else "?")
        encoders = ", ".join(s.text_encoders)
        cells = (s.file, family, s.dialect, s.trainer, _counts(s.algorithms, names=True))
        more = (_counts(s.ranks, names=True), _counts(s.alphas, names=True), encoders, s.base)
        table.add_row(*map(visible, (*cells, *more)))
    out.show(table)
    wrong = sum(bool(s.problem) for s in summaries)
    text = f"{len(summaries)} files" + (f", {wrong} with a problem" if wrong else "")
    out.show(Text(text))
    if any(not s.family and not s.problem for s in summaries):
        out.show(Text("?: the base model is not known; give it with --model", "yellow"))


def _counts(counts: Mapping[str, int], *, names: bool = False, every: bool = False) -> str:
    """What there is, most common first."""
    items = list(counts.items())
    shown = items if every else items[:_MOST]
    text = ", ".join(name if names or len(items) == 1 else f"{name} ({n})" for name, n in shown)
    return text + (", ..." if len(shown) < len(items) else "")
