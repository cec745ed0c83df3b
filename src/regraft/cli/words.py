"""Reports, inspections and findings in words and tables that a person can read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from regraft.cli.output import Output, visible
from regraft.cli.styled import Column, Indented, Table, Text
from regraft.errors import Finding
from regraft.names.patterns import patterns
from regraft.report import AdapterReport, Report, Target, count_in_words, show_size
from regraft.views.wording import LOSSLESS, what_changed

if TYPE_CHECKING:
    from regraft.checking.certificate import AdapterVerification
    from regraft.dialects.peft.inspect import Inspected, Inspection

GOOD, WARNING, BAD, NAME, FAINT = "green", "yellow", "bold red", "bold", "dim"
_ROWS = 40
_FINDINGS = 200
_FILES = 6
_KEYS = 3
"""More keys of one problem are shown as patterns."""


class _Row(Struct, frozen=True):
    pattern: str
    count: int
    target: Target
    """One of those that the pattern stands for; they are alike."""
    how: str
    error: float = 0.0
    """The largest one."""


class _Said(Struct, frozen=True):
    """What became of an adapter, in words that are not laid out yet."""

    rows: list[_Row]
    counted: str
    changed: list[str]
    """What is not bit for bit the source's."""


def _said_of(adapter: AdapterReport) -> _Said:
    rows = _rows_of(adapter)
    counted = f"{count_in_words(adapter.tensors_in, 'tensor')} in, {adapter.tensors_out} out"
    return _Said(rows, counted, what_changed(adapter.targets))


def show_report(out: Output, report: Report) -> None:
    """What a conversion, or a merge, did."""
    if report.ended is not None:
        out.show(
            f"ended and removed: {report.ended}" if report.ended else "nothing was staged there"
        )
    elif report.checkpoint is not None:
        from regraft.cli.checkpoint_words import show_checkpoint

        show_checkpoint(out, report, report.checkpoint)
    else:
        show_adapters(out, report)
    if report.pushed is not None:
        out.show(f"pushed: {report.pushed}")


def show_adapters(out: Output, report: Report, *, load: bool = True) -> None:
    """What became of adapters; the last line says how to load the result, unless ``load`` is off."""
    from regraft.views.loading import how_to_load

    said = [_said_of(adapter) for adapter in report.adapters]
    calls = how_to_load(report) if load and report.written else None
    for adapter, told in zip(report.adapters, said, strict=True):
        _show_adapter(out, adapter, told, report)
    show_company(out, report)
    if calls is not None:
        head, _, line = calls.partition(": ")
        out.show(Text.assemble(f"{head}: ", (line, NAME)))
    elif load:
        out.show(Text("Nothing was written: this was a dry run.", WARNING))


def show_company(out: Output, report: Report) -> None:
    """What else was copied, and the rule books that stood in for regraft's own."""
    if report.files:
        names = [visible(name) for name in report.files[:_FILES]]
        more = [f"and {len(report.files) - _FILES} more"] if len(report.files) > _FILES else []
        out.show(Text("Also copied: " + ", ".join(names + more)))
    if report.own_rules:
        out.show(Text("Rule books: " + ", ".join(map(visible, report.own_rules))))


def _show_adapter(out: Output, adapter: AdapterReport, said: _Said, report: Report) -> None:
    title = visible(adapter.name or Path(report.source).name or report.source)
    kind = f": {adapter.peft_type}, {adapter.source_layout} -> {adapter.target_layout}"
    head = Text.assemble((title, NAME), kind)
    out.show(head, *_bullets(adapter.evidence, FAINT), Text())
    if said.rows:
        out.show(*_targets(said.rows[:_ROWS], out.width), *_more(len(said.rows)), Text())
    out.show(_summary(adapter, said))
    show_notes(out, adapter.notes)


def _targets(rows: Sequence[_Row], width: int) -> list[Table | Text]:
    """The targets, each with its rule beside it; where that does not fit, under their rules."""
    beside = max(len(r.pattern) for r in rows) + max(len(r.how) for r in rows) + 36 <= width
    if beside:
        table = _table("target", "count", "rank", "scale", "how", "numbers")
        for row in rows:
            name, *numbers, exact = _cells(row)
            table.add_row(name, *numbers, _how_cell(row), exact)
        return [table]
    names = ["count", "rank", "scale", "numbers"]
    cells = [[c.plain for c in _cells(row)[1:]] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    room = _room(width, names, cells)
    patterns_shown = {row.pattern: "  " + break_name(row.pattern, room, "    ") for row in rows}
    first = max(len(line) for text in patterns_shown.values() for line in text.split("\n"))
    groups: dict[str, list[_Row]] = {}
    for row in rows:
        groups.setdefault(row.how, []).append(row)
    parts: list[Table | Text] = []
    for same in [[], *groups.values()]:
        table = _table("target", *names)
        table.header = not same
        for column, fixed in zip(table.columns, (first, *widths), strict=True):
            column.width = fixed
        for row in same:
            table.add_row(patterns_shown[row.pattern], *_cells(row)[1:])
        parts += [_how_cell(same[0]), table] if same else [table]
    return parts


def _cells(row: _Row) -> list[Text]:
    numbers = (str(row.count), str(row.target.rank), f"{row.target.scale:g}")
    return [_cell(row.pattern), *map(Text, numbers), _numbers_of(row)]


def _how_cell(row: _Row) -> Text:
    return _cell(row.how, FAINT if row.how == "unchanged" else "")


def _room(width: int, names: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """How wide the first column may be, beside others."""
    return width - sum(2 + max(map(len, column)) for column in zip(names, *rows, strict=True)) - 2


def break_name(name: str, width: int, indent: str = "  ") -> str:
    r"""A name on several lines, broken before dots, where it does not fit on one.

    >>> break_name("model.layers.{0..3}.mlp.gate", 20)
    'model.layers.{0..3}\n  .mlp.gate'
    """
    lines = [""]
    for part in re.split(r"(?=\.(?!\.)(?<!\.\.))", visible(name)):
        lead = 0 if len(lines) == 1 else len(indent)
        if lines[-1] and lead + len(lines[-1]) + len(part) > max(width, 20):
            lines.append("")
        lines[-1] += part
    return f"\n{indent}".join(lines)


def _numbers_of(row: _Row) -> Text:
    """What became of a target's numbers."""
    if row.target.rung == "svd":
        return _cell(f"off by {row.error:.2g}", WARNING)
    told = {"lora": "exact, as LoRA", "base": "exact, by the base", "dense": "full rank"}
    if row.target.rung in told:
        return _cell(told[row.target.rung], GOOD)
    return _cell("exact", GOOD) if row.target.exact else _cell("rescaled", WARNING)


def _rows_of(adapter: AdapterReport) -> list[_Row]:
    alike: dict[tuple[object, ...], list[Target]] = {}
    for target in adapter.targets:
        looks = (target.rank, target.scale, target.rule, target.exact, target.rung)
        alike.setdefault(looks, []).append(target)
    return [
        _Row(
            pattern,
            count,
            targets[0],
            targets[0].rule if targets[0].rule in adapter.rules else "unchanged",
            max(target.error for target in targets),
        )
        for targets in alike.values()
        for pattern, count in patterns(target.key for target in targets)
    ]


def _summary(adapter: AdapterReport, said: _Said) -> Text:
    text = Text(said.counted)
    if adapter.copied:
        text.append("; copied as they are")
    elif said.changed:
        text.append("; ").append("; ".join(said.changed), WARNING)
    elif adapter.targets:
        text.append("; ").append(LOSSLESS, GOOD)
    if adapter.carried and not adapter.copied:
        text.append(f"; {count_in_words(adapter.carried, 'tensor')} of them no LoRA factors")
    if adapter.verified:
        text.append(f"; verified, the largest relative error is {adapter.error:.2g}", GOOD)
        if adapter.sampled:
            text.append(f"; {_sampled(adapter.sampled)}", WARNING)
    return text


def _sampled(keys: Sequence[str]) -> str:
    """Which targets were not compared entry by entry."""
    shown = ", ".join(map(visible, keys[:_FILES])) + (", …" if len(keys) > _FILES else "")
    return (
        f"{count_in_words(len(keys), 'target')} by 16 random vectors only, because the time was spent "
        f"(--verify-budget): {shown}"
    )


def show_adapter_verification(out: Output, result: AdapterVerification) -> None:
    """Whether two adapters add the same to their bases."""
    show_differences(out, result.differences)
    counted = f"{count_in_words(len(result.targets), 'target')}, {count_in_words(result.others, 'other tensor')}"
    error = f"the largest relative error is {result.error:.2g}"
    if result.sampled:
        error += f"; {_sampled(result.sampled)}"
    if result.equal:
        out.show(Text.assemble(("Equal", GOOD), f": {counted}; {error}"))
    else:
        count = count_in_words(len(result.differences), "difference")
        out.show(Text.assemble(("Not equal", BAD), f": {count} in {counted}; {error}"))


def show_differences(out: Output, findings: Sequence[Finding]) -> None:
    """In what two things differ: what is said of many keys, once for all of them."""
    alike: dict[Finding, list[str]] = {}
    for finding in findings:
        keys = alike.setdefault(replace(finding, key=None), [])
        keys += [finding.key] if finding.key is not None else []
    places = {finding.where for finding in findings}
    common = places.pop() if len(places) == 1 else None
    if common is not None:
        out.show(Text(visible(common), NAME))
    for number, (finding, keys) in enumerate(list(alike.items())[:_FINDINGS], 1):
        out.show(*_finding(finding, keys, number, common))
    if len(alike) > _FINDINGS:
        out.show(Text(f"… and {len(alike) - _FINDINGS} more; --json lists them all", WARNING))


def _keys(keys: Sequence[str]) -> list[Text]:
    """Keys, those alike as one pattern with their number where they are many."""
    if len(keys) <= _KEYS:
        return [Text(visible(key), NAME) for key in keys]
    found = [
        Text.assemble((visible(pattern), NAME), f" ({count})" if count > 1 else "")
        for pattern, count in patterns(keys)
    ]
    left = len(found) - _FINDINGS
    return found[:_FINDINGS] + ([Text(f"… and {left} more patterns")] if left > 0 else [])


def show_findings(
    out: Output, title: str, findings: Sequence[Finding], *, more: bool = True
) -> None:
    """Every problem, with where it is, its code and what to do, on stderr; the last line says where ``more`` stands."""
    head = Text.assemble(("regraft: ", NAME), (title, BAD))
    alike: dict[Finding, list[str]] = {}
    for finding in findings:
        keys = alike.setdefault(replace(finding, key=None), [])
        keys += [finding.key] if finding.key is not None else []
    if len(findings) > 1:
        kinds = f" of {count_in_words(len(alike), 'kind')}" if len(alike) < len(findings) else ""
        head.append(f", {len(findings)} problems{kinds}")
    places = {finding.where for finding in findings}
    common = places.pop() if len(places) == 1 else None
    if common is not None:
        head.append(f" in {visible(common)}")
    parts: list[Text | Indented] = [head]
    for number, (finding, keys) in enumerate(list(alike.items())[:_FINDINGS], 1):
        parts += _finding(finding, keys, number if len(alike) > 1 else None, common)
    if len(alike) > _FINDINGS:
        left = len(alike) - _FINDINGS
        parts.append(Text(f"… and {left} kinds more; --json lists them all", WARNING))
    if more:
        parts += explain_codes(findings)
    out.show(*parts, error=True)


_PLAIN = frozenset({"usage", "left"})
"""Codes of which there is no more to say than the message does."""


def explain_codes(findings: Iterable[Finding]) -> list[Text]:
    """A line with the command that explains the codes of findings, where that says more than they do.

    >>> [line.plain for line in explain_codes([Finding("wrong-base", "it is another's")])]
    ['More: regraft errors wrong-base']
    """
    codes = dict.fromkeys(finding.code for finding in findings if finding.code not in _PLAIN)
    if not codes:
        return []
    command = f"regraft errors {'CODE' if len(codes) > 1 else next(iter(codes))}"
    rest = ", for each code in brackets" if len(codes) > 1 else ""
    return [Text.assemble(("More: ", FAINT), command, (rest, FAINT))]


def code_of(finding: Finding) -> Text:
    """Its code in brackets, as it stands behind what is wrong; nothing where that says no more."""
    return Text("" if finding.code in _PLAIN else f" [{finding.code}]", FAINT)


def show_problem(out: Output, finding: Finding) -> None:
    """A problem in a line of its own, among others of a result."""
    out.show(Text.assemble(("Problem", BAD), code_of(finding), (": ", BAD), visible(str(finding))))


def _finding(
    finding: Finding, keys: Sequence[str], number: int | None, common: str | None
) -> list[Text | Indented]:
    """What findings say that are alike but for their keys."""
    lines = []
    if finding.where is not None and finding.where != common:
        lines.append(Text(visible(finding.where)))
    lines += _keys(keys)
    lines.append(Text.assemble(visible(finding.message), code_of(finding)))
    if finding.rule is not None:
        lines.append(Text(f"rule: {visible(finding.rule)}", FAINT))
    if finding.fix is not None:
        lines.append(Text.assemble(("Fix: ", GOOD), visible(finding.fix)))
    lead = "" if number is None else f"{number}. "
    lines[0] = Text.assemble(lead, lines[0])
    indent = len(lead)
    return [Indented(line, 2 + (indent if at else 0)) for at, line in enumerate(lines)]


def show_inspection(out: Output, inspection: Inspection) -> None:
    """What adapters are."""
    for number, adapter in enumerate(inspection.adapters):
        if number:
            out.show(Text())
        _show_inspected(out, adapter, inspection.source)
    if inspection.files:
        names = [visible(name) for name in inspection.files[:_FILES]]
        more = len(inspection.files) - _FILES
        out.show(Text("Other files: " + ", ".join(names + [f"and {more} more"] * (more > 0))))
    if inspection.deeper:
        from regraft.dialects.peft.inspect import DEPTH

        shown = ", ".join(map(visible, inspection.deeper[:_FILES]))
        more = len(inspection.deeper) - _FILES
        rest = f" and {more} more" * (more > 0)
        out.show(
            Text(
                f"Not looked into, because they are over {DEPTH} folders deep: {shown}{rest}",
                WARNING,
            )
        )


def _show_inspected(out: Output, adapter: Inspected, source: str) -> None:
    name = visible(adapter.name or Path(source).name or source)
    kind = " with ".join([adapter.peft_type, *adapter.variants])
    head = Text.assemble((name, NAME), f": {kind}")
    facts = _table("", "", header=False)
    if adapter.layout is not None:
        layout = Text(adapter.layout, GOOD)
    elif adapter.layouts:
        layout = Text(" or ".join(adapter.layouts) + ": it is the same in each", GOOD)
    else:
        layout = Text("not known", WARNING)
    facts.add_row("layout", layout)
    for reason in adapter.evidence:
        facts.add_row("", _cell(visible(reason), FAINT))
    base = adapter.model_type or "not known"
    if adapter.base_model:
        base += f" ({visible(adapter.base_model)})"
    facts.add_row("base", _cell(base))
    if adapter.packing:
        facts.add_row("experts", f"packed as by {adapter.packing}")
    if adapter.peft_version:
        facts.add_row("saved by", f"PEFT {visible(adapter.peft_version)}")
    dtypes = ", ".join(f"{count} {name}" for name, count in adapter.dtypes.items())
    facts.add_row("tensors", f"{dtypes}; {show_size(adapter.bytes)}")
    if adapter.ranks:
        facts.add_row("ranks", _numbers(adapter.ranks))
        facts.add_row("alphas", _numbers(adapter.alphas) + " (rsLoRA)" * adapter.rslora)
        facts.add_row("scales", _numbers(adapter.scales))
    out.show(head, facts)
    if adapter.targets:
        out.show(Text(), *_inspected_targets(adapter, out.width), *_more(len(adapter.targets)))
    if adapter.others:
        table = _table("other tensors", "count", "shape", "dtype")
        for o in adapter.others[:_ROWS]:
            table.add_row(
                _cell(visible(o.pattern)), str(o.count), " x ".join(map(str, o.shape)), o.dtype
            )
        out.show(Text(), table, *_more(len(adapter.others)))
    if adapter.notes:
        out.show(Text())
        show_notes(out, adapter.notes)


def _inspected_targets(adapter: Inspected, width: int) -> list[Table | Text]:
    names = ["count", "base shape", "rank", "alpha", "scale", "dtype"]
    shown = adapter.targets[:_ROWS]
    rows = [
        [
            str(t.count),
            "?" if t.shape is None else " x ".join(map(str, t.shape)),
            str(t.rank),
            f"{t.alpha:g}",
            f"{t.scale:g}",
            t.dtype,
        ]
        for t in shown
    ]
    room = _room(width, names, rows)
    if room < max(len(t.pattern) for t in shown) and len(adapter.dtypes) == 1:
        names, rows = names[:-1], [row[:-1] for row in rows]  # it is told above
        room = _room(width, names, rows)
    if room < _NARROWEST:
        lines: list[Table | Text] = []
        for t, cells in zip(shown, rows, strict=True):
            told = ", ".join(f"{name} {cell}" for name, cell in zip(names, cells, strict=True))
            lines += [Text(break_name(t.pattern, width)), Text(f"  {told}", FAINT)]
        return lines
    table = _table("target", *names)
    for t, cells in zip(shown, rows, strict=True):
        table.add_row(break_name(t.pattern, room), *cells)
    return [table]


_NARROWEST = 20
"""Columns that a name needs beside others; with less, the others stand under it."""


_RIGHT = frozenset({"count", "rank", "alpha", "scale"})
_LONG = frozenset({"target", "other tensors", "how"})


def _table(*names: str, header: bool = True) -> Table:
    columns = [
        Column(name, "right" if name in _RIGHT else "left", wrapped=not header or name in _LONG)
        for name in names
    ]
    return Table(*columns, header=header)


def _cell(text: str, style: str = "") -> Text:
    return Text(visible(text), style)


def _more(rows: int) -> list[Text]:
    """A line that says how many rows are not shown, if any."""
    if rows <= _ROWS:
        return []
    return [Text(f"… and {rows - _ROWS} more; --json lists them all", WARNING)]


def _bullets(lines: Iterable[str], style: str) -> list[Indented]:
    return [Indented(Text(visible(line), style)) for line in lines]


def show_notes(out: Output, notes: Iterable[str]) -> None:
    """Notes, each with its lines one below the other."""
    for note in notes:
        grid = Table(Column("", wrapped=True), Column("", wrapped=True), header=False, gap=1)
        grid.add_row(Text("Note:", WARNING), Text(visible(note)))
        out.show(grid)


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
