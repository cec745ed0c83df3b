"""Reports on checkpoints in words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from regraft.cli.output import Output, visible
from regraft.cli.styled import Column, Table, Text
from regraft.cli.words import show_company, show_differences, show_notes
from regraft.report import (
    AdapterReport,
    CheckpointReport,
    PartReport,
    Report,
    count_in_words,
    show_size,
)
from regraft.views.wording import LOSSLESS, what_changed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from regraft.checkpoints.inspect import CheckpointInspection
    from regraft.checkpoints.verify import Verification

_GOOD, _WARNING, _BAD, _NAME, _FAINT = "green", "yellow", "bold red", "bold", "dim"
_SHOWN, _FILES = 50, 6
_RULES = 60
"""So many rules are shown one by one."""


def _merged(adapter: AdapterReport) -> str:
    """What merging an adapter changed in its base."""
    weights = sorted({target.scale for target in adapter.targets})
    times = " and ".join(f"{weight:g}" for weight in weights)
    name = visible(Path(adapter.name).name or adapter.name or "the adapter")
    added = count_in_words(len({target.key for target in adapter.targets}), "tensor")
    words = f"{name}: added to {added}" + (f", times {times}" if times else "")
    if adapter.carried:
        words += f"; {count_in_words(adapter.carried, 'tensor')} replaced"
    return words


def by_book(fired: dict[str, int]) -> dict[str, int]:
    """How often the rules of each book fired."""
    books: dict[str, list[int]] = {}
    for rule, times in fired.items():
        books.setdefault(rule.partition("/")[0], []).append(times)
    return {
        f"{book} ({count_in_words(len(times), 'rule')})": sum(times)
        for book, times in books.items()
    }


def _traffic(counts: Mapping[str, int]) -> str:
    """What went over the network, in a sentence."""
    sentence = (
        f"{counts['requests']} requests: {show_size(counts['read'])} read, "
        f"{show_size(counts['written'])} written"
    )
    return (
        sentence
        + (f"; {counts['retries']} of them were sent again" if counts["retries"] else "")
        + (
            f"; {counts['waited']} s were waited, of all workers together, because a server asked for it"
            if counts["waited"]
            else ""
        )
    )


def _part(part: PartReport) -> str:
    """What became of a part, in sentences."""
    made = part.pieces - part.before
    words = f"Part {part.number} of {part.count}: {count_in_words(made, 'piece')} made"
    if part.before:
        words += f", {part.before} were there"
    words += f"; {show_size(part.bytes)}. "
    if part.left:
        left = count_in_words(part.left, "piece")
        are = "is" if part.left == 1 else "are"
        return words + f"Of all parts together {left} {are} not there yet."
    return words + "Nothing is missing: --commit puts the result in its place."


def show_checkpoint(out: Output, report: Report, checkpoint: CheckpointReport) -> None:
    """What became of a checkpoint."""
    name = visible(Path(report.source).name or report.source)
    layouts = f": {checkpoint.source_layout} -> {checkpoint.target_layout}"
    out.show(Text.assemble((name, _NAME), layouts))
    for line in checkpoint.evidence:
        out.show(Text(f"  {visible(line)}", _FAINT))
    if checkpoint.part is not None:
        out.show(Text(_part(checkpoint.part)))
        if checkpoint.traffic:
            out.show(Text(_traffic(checkpoint.traffic)))
        return
    fired = {rule: times for rule, times in checkpoint.rules.items() if times}
    merged = [adapter for adapter in report.adapters if adapter.targets or adapter.carried]
    if fired or (checkpoint.carried and not merged):
        table = Table(Column("rule", wrapped=True), Column("times", "right"))
        if len(fired) > _RULES:
            fired = by_book(fired)
        for rule, times in fired.items():
            table.add_row(Text(visible(rule)), str(times))
        if checkpoint.carried:
            table.add_row(Text("unchanged", _FAINT), str(checkpoint.carried))
        out.show(Text(), table, Text())
    for adapter in merged:
        out.show(Text(f"  {_merged(adapter)}"))
    summary = Text(
        f"{count_in_words(checkpoint.tensors_in, 'tensor')} in, {checkpoint.tensors_out} out, in "
        f"{len(checkpoint.files)} {'file' if len(checkpoint.files) == 1 else 'files'} of "
        f"{show_size(checkpoint.bytes)}; "
    )
    changed = what_changed(report.targets, checkpoint.casts)
    if changed:
        summary.append("; ".join(changed), _WARNING)
    elif not merged:
        summary.append(LOSSLESS, _GOOD)
    out.show(summary)
    for change in checkpoint.config:
        out.show(Text(f"config.json: {visible(change)}"))
    show_company(out, report)
    if checkpoint.traffic:
        out.show(Text(_traffic(checkpoint.traffic)))
    if checkpoint.resumed:
        out.show(Text("Continued what a run before had begun."))
    show_notes(out, checkpoint.notes)
    if not report.written:
        out.show(Text("Nothing was written: this was a dry run.", _WARNING))


def show_verification(out: Output, result: Verification) -> None:
    """Whether two checkpoints are one."""
    show_differences(out, result.differences)
    if result.equal:
        counted = count_in_words(result.tensors, "tensor")
        words = f": {counted}, {show_size(result.bytes)} of numbers, every bit is accounted for"
        out.show(Text.assemble(("Equal", _GOOD), words))
    else:
        out.show(
            Text.assemble(
                ("Not equal", _BAD), f": {count_in_words(len(result.differences), 'difference')}"
            )
        )


def show_inspected_checkpoint(out: Output, result: CheckpointInspection) -> None:
    """What a checkpoint is."""
    name = visible(Path(result.source).name or result.source)
    facts = Table(Column("", wrapped=True), Column("", wrapped=True), header=False)
    if result.layout is not None:
        facts.add_row("layout", Text(result.layout, _GOOD))
    elif result.layouts:
        same = " or ".join(result.layouts) + ": it is the same in each"
        facts.add_row("layout", Text(same, _GOOD))
    else:
        facts.add_row("layout", Text("not known", _WARNING))
    for reason in result.evidence:
        facts.add_row("", Text(visible(reason), _FAINT))
    facts.add_row("model", Text(visible(", ".join(result.model_types)) or "not known"))
    if result.classes:
        facts.add_row("class", Text(visible(", ".join(result.classes))))
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in result.dtypes.items())
    facts.add_row("tensors", f"{dtypes}; {result.elements:,} elements, {show_size(result.bytes)}")
    shown = [f"{visible(f.name)} ({show_size(f.bytes)})" for f in result.weights[:_FILES]]
    more = len(result.weights) - _FILES
    facts.add_row("weights", Text(", ".join(shown + [f"and {more} more"] * (more > 0))))
    for tied, owner in list(result.ties.items())[:_SHOWN]:
        facts.add_row("tied", Text(f"{visible(tied)} is {visible(owner)}"))
    table = Table(
        Column("tensors", wrapped=True), Column("count", "right"), Column("shape"), Column("dtype")
    )
    for alike in result.patterns[:_SHOWN]:
        shape = " x ".join(map(str, alike.shape)) or "scalar"
        table.add_row(Text(visible(alike.pattern)), str(alike.count), shape, alike.dtype)
    out.show(Text.assemble((name, _NAME), ": a checkpoint"), facts, Text(), table)
    if len(result.patterns) > _SHOWN:
        out.show(Text(f"… and {len(result.patterns) - _SHOWN} more; --json lists them all"))
    if result.files:
        rest = len(result.files) - _FILES
        files = [visible(file) for file in result.files[:_FILES]]
        out.show(Text("Other files: " + ", ".join(files + [f"and {rest} more"] * (rest > 0))))
    show_notes(out, result.notes)
