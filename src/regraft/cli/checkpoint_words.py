"""Reports on checkpoints in words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from regraft.cli.output import Output, visible
from regraft.cli.words import show_notes
from regraft.report import CheckpointReport, Report, show_size

if TYPE_CHECKING:
    from regraft.checkpoints.verify import Verification

_GOOD, _WARNING, _BAD, _NAME, _FAINT = "green", "yellow", "bold red", "bold", "dim"
_SHOWN = 50


def show_checkpoint(out: Output, report: Report, checkpoint: CheckpointReport) -> None:
    """What became of a checkpoint."""
    name = visible(Path(report.source).name or report.source)
    layouts = f": {checkpoint.source_layout} -> {checkpoint.target_layout}"
    out.show(Text.assemble((name, _NAME), layouts))
    for line in checkpoint.evidence:
        out.show(Text(f"  {visible(line)}", _FAINT))
    fired = {rule: times for rule, times in checkpoint.rules.items() if times}
    if fired or checkpoint.carried:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=_NAME)
        table.add_column("rule", overflow="fold")
        table.add_column("times", justify="right", no_wrap=True)
        for rule, times in fired.items():
            table.add_row(Text(visible(rule)), str(times))
        if checkpoint.carried:
            table.add_row(Text("carried over: the same in both", _FAINT), str(checkpoint.carried))
        out.show(Text(), table, Text())
    summary = Text(
        f"{checkpoint.tensors_in} tensors in, {checkpoint.tensors_out} out, in "
        f"{len(checkpoint.files)} {'file' if len(checkpoint.files) == 1 else 'files'} of "
        f"{show_size(checkpoint.bytes)}; "
    )
    if checkpoint.casts:
        casts = ", ".join(f"{count} from {what}" for what, count in checkpoint.casts.items())
        summary.append(f"cast: {casts}", _WARNING)
    else:
        summary.append("every number is the source's own, bit for bit", _GOOD)
    out.show(summary)
    for change in checkpoint.config:
        out.show(Text(f"config.json: {visible(change)}"))
    if report.files:
        out.show(Text(f"Files carried over: {', '.join(map(visible, report.files[:6]))}"))
    if checkpoint.resumed:
        out.show(Text("Continued what a run before had begun."))
    show_notes(out, checkpoint.notes)
    if not report.written:
        out.show(Text("Nothing was written: this was a dry run.", _WARNING))


def show_verification(out: Output, result: Verification) -> None:
    """Whether two checkpoints are one."""
    for finding in result.differences[:_SHOWN]:
        out.show(Text(visible(str(finding))))
    if len(result.differences) > _SHOWN:
        out.show(Text(f"… and {len(result.differences) - _SHOWN} more; --json lists them all"))
    if result.equal:
        words = f": {result.tensors} tensors, {show_size(result.bytes)}, every bit is accounted for"
        out.show(Text.assemble(("Equal", _GOOD), words))
    else:
        out.show(Text.assemble(("Not equal", _BAD), f": {len(result.differences)} differences"))
