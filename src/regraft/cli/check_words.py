"""What `regraft check` shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from regraft.checking.verdict import OUTCOMES, Row, Verdict
from regraft.cli.output import Output, visible
from regraft.cli.styled import Column, Indented, Table, Text
from regraft.cli.words import BAD, FAINT, GOOD, NAME, WARNING, break_name, show_problem

if TYPE_CHECKING:
    from regraft.checking.for_tool import ToolCheck
    from regraft.checking.verdict import Check

_ROWS = 40
_FINDINGS = 5
_WARNINGS = 3
_LENGTH = 300
_SCALED = 60
"""Columns from which on ranks and scales have room."""


def show_check(out: Output, result: Check) -> None:
    """Every adapter of a source with its verdict."""
    for number, verdict in enumerate(result.verdicts):
        if number:
            out.show(Text())
        _show_verdict(out, verdict, result)


def _show_verdict(out: Output, verdict: Verdict, result: Check) -> None:
    name = verdict.name or Path(result.source).name or result.source
    kind = verdict.kind if verdict.layout is None else f"{verdict.kind}, {verdict.layout}"
    out.show(Text.assemble((visible(name), NAME), f": {kind}; {_answer(verdict)}"), Text())
    if verdict.rows:
        out.show(_table(verdict.rows[:_ROWS], out.width))
        if len(verdict.rows) > _ROWS:
            out.show(
                Text(f"… and {len(verdict.rows) - _ROWS} more; --json lists them all", WARNING)
            )
        out.show(Text())
    out.show(_summary(verdict, result))
    if verdict.error is not None:
        _line(out, "It fails", verdict.error, BAD)
    for cause in verdict.causes:
        _line(out, "Cause", cause, WARNING)
    for finding in verdict.findings[:_FINDINGS]:
        show_problem(out, finding)
    if len(verdict.findings) > _FINDINGS:
        left = len(verdict.findings) - _FINDINGS
        out.show(Text(f"… and {left} more; --json lists them all", WARNING))
    for note in verdict.notes:
        _line(out, "Note", note, WARNING)
    if not verdict.healthy:
        for warning in verdict.warnings[:_WARNINGS]:
            _line(out, "It warns", warning, FAINT)
    if verdict.remedy:
        tried = " (tried: the result loads correctly)" if verdict.remedy_tried else ""
        out.show(Text.assemble((f"Fix{tried}:", GOOD)))
        out.show(*(Indented(Text(visible(line), NAME)) for line in verdict.remedy))
    elif verdict.no_remedy is not None:
        _line(out, "No fix is known", verdict.no_remedy, BAD)


def _answer(verdict: Verdict) -> str:
    if verdict.tried is not None:
        return f"tried with {verdict.tried}"
    return "judged by names, shapes and config"


def _summary(verdict: Verdict, result: Check) -> Text:
    if verdict.healthy:
        text = Text.assemble(("Healthy", GOOD))
        text.append(f": it loads with {result.layout} as it is")
        if verdict.tried is None:
            text.append(", as far as names, shapes and the config tell")
        elif verdict.kind != "checkpoint":
            text.append(", and has its full effect")
    elif verdict.healthy is None and verdict.findings:
        text = Text.assemble(("Not known", WARNING))
        text.append(f" whether it loads with {result.layout}")
    elif verdict.healthy is None:
        text = Text.assemble(("Not proven", WARNING))
        text.append(
            f": nothing speaks against loading it with {result.layout}, but it was not tried"
        )
    else:
        text = Text.assemble(("Will not load correctly", BAD), f" with {result.layout}")
    counts = ", ".join(f"{n} {OUTCOMES[outcome][1]}" for outcome, n in verdict.counts.items())
    if counts:
        text.append(f": {counts}" if verdict.healthy is False else f" ({counts})")
    if verdict.dead:
        text.append(f"; {verdict.dead} dead, because B is zero", WARNING)
    return text


def _table(rows: list[Row], width: int) -> Table:
    """A row for each pattern; names that do not fit beside what becomes of them are broken before dots."""
    # Scales that are wrong are told in words, too.
    scaled = any(row.scale is not None for row in rows) and width >= _SCALED
    left = width - (24 if scaled else 9)
    room = max(left // 2, left - max(18, *(len(_outcome(row).plain) for row in rows)))
    numbers = ("count", "rank", "scale") if scaled else ("count",)
    table = Table(
        Column("target"),
        *(Column(name, "right") for name in numbers),
        Column("what becomes of it", wrapped=True),
    )
    for row in rows:
        scales = [
            "" if row.rank is None else str(row.rank),
            "" if row.scale is None else f"{row.scale:g}",
        ]
        table.add_row(
            Text(break_name(row.pattern, room)),
            str(row.count),
            *(scales if scaled else []),
            _outcome(row),
        )
    return table


def _outcome(row: Row) -> Text:
    text = Text(OUTCOMES[row.outcome][0], GOOD if row.outcome == "lands" else BAD)
    if row.factor is not None:
        text.append(f": {row.factor:.4g} times what it should be")
    if row.dead:
        text.append(" (dead: B is zero)", WARNING)
    if row.detail:
        text.append(f": {visible(row.detail)}")
    return text


def _line(out: Output, lead: str, text: str, style: str) -> None:
    shown = visible(text)
    if len(shown) > _LENGTH:
        shown = shown[:_LENGTH].rstrip() + " …"
    out.show(Text.assemble((f"{lead}: ", style), shown))


_STYLES = {"full": GOOD, "unknown": WARNING, "partial": WARNING}
"""Of a tool's verdicts; all others are bad."""


def show_tool(out: Output, result: ToolCheck) -> None:
    """What another tool would do with an adapter."""
    from regraft.dialects.judging import LOADED, OUTCOMES, VERDICTS
    from regraft.names.patterns import group_alike

    word, style = VERDICTS[result.verdict], _STYLES.get(result.verdict, BAD)
    basis = "" if result.basis == "run" else f", from {result.basis}"
    out.show(
        Text.assemble((word, style), f": {result.tool} {result.version}{basis}"),
    )
    for failure in result.failures:
        _line(out, "Fails", failure, BAD)
    alike: dict[tuple[str, str], list[str]] = {}
    for target in result.targets:
        alike.setdefault((target.outcome, target.reason), []).append(target.key)
    for (outcome, reason), keys in sorted(alike.items(), key=lambda item: item[0][0] == LOADED):
        names = [str(pattern) for pattern in group_alike(keys)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        shown = ", ".join(names[:3]) + more
        text = f"{OUTCOMES[outcome]}: {shown}" + (f": {reason}" if reason else "")
        out.show(Text.assemble((f"{len(keys)} ", NAME), visible(text)))
    for note in result.notes:
        _line(out, "Note", note, WARNING)
    if result.fix:
        out.show(Text.assemble(("Fix:", GOOD)), Indented(Text(visible(result.fix), NAME)))
    elif result.no_fix:
        # What can be done instead stands at its end.
        out.show(Text.assemble(("No fix is known: ", BAD), visible(result.no_fix)))
