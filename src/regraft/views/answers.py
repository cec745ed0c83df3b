"""Pages from what explain, diff and lint answer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.names.patterns import patterns
from regraft.report import count_in_words
from regraft.views.flows import Facts
from regraft.views.model import Fact, Flow, Page, Row, Rows, Runs, Side, Tone, runs_of
from regraft.views.wording import shape_in_words

if TYPE_CHECKING:
    from regraft.explaining.diff import Diff, Moved, Some
    from regraft.explaining.explanation import End, Explanation
    from regraft.rules.lint.book import Linted

_PIECES = 40
_SEGMENT = re.compile(r"(?:\{[^{}]*\}|[^.{}])+|[{}]")
_HOLE = re.compile(r"\{[0-9.,]+\}")


def path_of_text(pattern: str) -> tuple[str | Runs, ...]:
    """A pattern in words, by segments; the inverse of what `regraft.names.patterns.ranges` writes.

    >>> path_of_text("l.{0..2,7}.e.{0..6..2}.w")
    ('l', ((0, 2), (7, 7)), 'e', ((0, 0), (2, 2), (4, 4), (6, 6)), 'w')
    """
    return tuple(
        runs_of(_numbers(segment[1:-1])) if _HOLE.fullmatch(segment) else segment
        for segment in _SEGMENT.findall(pattern)
    )


def _numbers(text: str) -> list[int]:
    numbers: list[int] = []
    for run in text.split(","):
        first, *rest = map(int, run.split(".."))
        last, step = (*rest, *(first, 1)[len(rest) :])
        numbers += range(first, last + 1, step)
    return numbers


class _Patterns(Rows):
    """Rows of what is a pattern in words already."""

    def put(self, some: Iterable[Some], state: str, facts: Facts | None = None) -> tuple[int, ...]:
        start = len(self.rows)
        self.rows += [Row(path_of_text(s.pattern), s.count, state, facts or {}) for s in some]
        return tuple(range(start, len(self.rows)))


def page_of_explanation(found: Explanation) -> Page:
    """The way of one tensor, or what is near where it goes nowhere."""
    left, right = Rows(), Rows()
    flows: tuple[Flow, ...] = ()
    rule = f"{found.rule or found.why or ''} ({found.where})"
    if found.sources or found.targets:
        state = _state_of(found)
        sources = [n for end in found.sources for n in _add_end(left, end, state)]
        targets = [n for end in found.targets for n in _add_end(right, end, state)]
        note = found.equation or found.why or ""
        flows = (Flow(tuple(sources), tuple(targets), state, rule, note),)
    else:
        left.add([found.base or found.key], "kept" if found.arrives else "unmatched")
    facts = [Fact("file", found.src), Fact("layout", found.source_layout or "unknown")]
    facts += [Fact("evidence", line) for line in found.evidence]
    facts += [Fact("its name", line) for line in found.steps]
    if found.rule is not None:
        facts.append(Fact("rule", rule, "good"))
    values = {**found.values, **{f"size of {name}": size for name, size in found.sizes.items()}}
    facts += [Fact(name, str(value)) for name, value in values.items() if value != ""]
    facts += [Fact("spelled alike", name, "warning") for name in found.closest]
    return Page(
        title=found.key,
        command="explain",
        verdict=_fate(found),
        facts=tuple(facts),
        left=left.side(f"source: {found.source_layout or 'unknown'}"),
        right=right.side(f"result: {found.target_layout}") if right.rows else None,
        flows=flows,
        findings=found.problems,
        notes=tuple(_explained_notes(found)),
    )


def _fate(found: Explanation) -> Fact:
    if found.fate == "moved":
        return Fact("Moved", f"by {found.rule} ({found.where})", "good")
    if found.fate in ("carried", "there"):
        word = "Carried over" if found.fate == "carried" else "There already"
        return Fact(word, found.why or "", "good")
    return Fact("It goes nowhere", "no rule matches it", "bad")


def _state_of(found: Explanation) -> str:
    if found.fate != "moved":
        return "kept"
    read, written = (sum(end.count for end in ends) for ends in (found.sources, found.targets))
    if read != written:
        return "fused" if read > written else "split"
    dims = [[end.term.partition(" : ")[2] for end in e] for e in (found.sources, found.targets)]
    if dims[0] != dims[1]:
        return "turned"
    keys = [[end.keys for end in ends] for ends in (found.sources, found.targets)]
    return "kept" if keys[0] == keys[1] else "renamed"


def _add_end(rows: Rows, end: End, state: str) -> list[int]:
    facts: Facts = {"kind": end.kind, "written as": end.term}
    if end.shape is not None:
        facts = {"shape": shape_in_words(end.shape), **facts}
    if end.mine:
        facts["asked for"] = "yes"
    if end.absent:
        facts["absent"] = end.absent
    start = len(rows.rows)
    for pattern in end.keys:
        path = path_of_text(pattern)
        runs = [part for part in path if not isinstance(part, str)]
        count = prod(sum(b - a + 1 for a, b in part) for part in runs)
        rows.rows.append(Row(path, count, state, facts))
    return list(range(start, len(rows.rows)))


def _explained_notes(found: Explanation) -> Iterable[str]:
    for piece in found.pieces[:_PIECES]:
        source, target = (", ".join(p) for p in (piece.source_place, piece.target_place))
        yield f"{piece.source}[{source}] -> {piece.target}[{target}]"
    if len(found.pieces) > _PIECES:
        yield f"and {len(found.pieces) - _PIECES} more pieces; --json lists them all"
    for name in found.passed:
        yield f"it also fits {name}, which is less close"
    for near in found.near:
        yield f"{near.rule} ({near.where}) comes close: {near.template}: {near.why}"


def page_of_diff(found: Diff) -> Page:
    """What two files have in common and what not."""
    left, right = _Patterns(), _Patterns()
    flows: list[Flow] = []

    def join(sources: Iterable[Some], targets: Iterable[Some], state: str, rule: str) -> None:
        flows.append(Flow(left.put(sources, state), right.put(targets, state), state, rule))

    for some in found.same:
        join([some], [some], "equal", "same name, same content")
    for moved in found.moved:
        state = _state_of_moved(moved)
        sources = left.put(moved.sources, state)
        equal = right.put(_without(moved.targets, moved.differ), state)
        wrong = right.put(moved.differ, "differs")
        if sources or equal or wrong:
            flows.append(Flow(sources, equal + wrong, state, moved.rule, moved.equation))
    for each in found.differ:
        join([each.some], [each.some], "differs", each.why)
    left.put(found.only_a, "missing", {"why": "only in A"})
    right.put(found.only_b, "extra", {"why": "only in B"})
    verdict = Fact("Equal", "they hold the same, bit for bit", "good")
    if not found.equal:
        verdict = Fact("Not equal", "they do not hold the same", "bad")
    facts = [Fact("A", found.a), Fact("B", found.b), Fact("compared as", f"{found.kind}s")]
    if found.book is not None:
        tone: Tone = "good" if found.verified else "warning"
        word = "carried out both ways, it gives the other file bit for bit"
        facts.append(
            Fact("proposed rule book", word if found.verified else "not the whole way", tone)
        )
    one, other = (layout or "layout unknown" for layout in found.layouts)
    return Page(
        title=f"{Path(found.a).name} and {Path(found.b).name}",
        command="diff",
        verdict=verdict,
        facts=tuple(facts),
        left=left.side(f"A: {one}"),
        right=right.side(f"B: {other}"),
        flows=tuple(flows),
        notes=found.notes,
        next=(Fact("the rule book that leads from A to B", found.book),) if found.book else (),
    )


def _state_of_moved(moved: Moved) -> str:
    read, written = (sum(some.count for some in s) for s in (moved.sources, moved.targets))
    if read != written:
        return "fused" if read > written else "split"
    return "renamed"


def _without(targets: Iterable[Some], differ: Iterable[Some]) -> Iterable[Some]:
    """The targets that are equal."""
    from regraft.explaining.diff import Some

    wrong = {name for some in differ for name in _names(some)}
    if not wrong:
        return targets
    left = [name for some in targets for name in _names(some) if name not in wrong]
    return [Some(pattern, count) for pattern, count in patterns(left)]


def _names(some: Some) -> Iterable[str]:
    parts = [
        [part] if isinstance(part, str) else [str(n) for a, b in part for n in range(a, b + 1)]
        for part in path_of_text(some.pattern)
    ]
    return map(".".join, product(*parts))


_SEVERITY = {"error": "problem", "warning": "warned", "note": "noted"}


def page_of_lint(found: Linted) -> Page:
    """What lint found, by file, line and rule; filters tell the severities apart."""
    rows = []
    for fault in found.faults:
        finding = fault.finding
        known = {
            "what": finding.message,
            "key": finding.key,
            "the other": fault.other,
            "example": fault.example,
            "to mend it": finding.fix,
        }
        told: Facts = {name: value for name, value in known.items() if value is not None}
        path = (finding.code, finding.rule) if finding.rule else (finding.code,)
        place = Path(finding.where or found.where).name
        rows.append(Row(path, 1, _SEVERITY[fault.severity], told, place))
    counts = {kind: sum(f.severity == kind for f in found.faults) for kind in _SEVERITY}
    sums = ", ".join(count_in_words(n, kind) for kind, n in counts.items() if n)
    tone: Tone = "good" if not counts["warning"] else "warning"
    verdict = Fact("Sound", sums or "nothing to say against it", tone)
    if not found.sound:
        verdict = Fact("Not sound", sums, "bad")
    facts = [Fact("file", found.where), Fact("rules", str(found.rules))]
    if found.keys:
        facts.append(Fact("compared with", count_in_words(found.keys, "key")))
    facts += [Fact(f"{rule} claims", count_in_words(n, "key")) for rule, n in found.fired.items()]
    return Page(
        title=found.book,
        command="rules lint",
        verdict=verdict,
        facts=tuple(facts),
        left=Side("what lint found", tuple(rows)) if rows else None,
        findings=tuple(f.finding for f in found.faults if f.severity != "note"),
        unit="finding",
    )
