"""One page for many sources: each with its verdict, and the tensors of all, by source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from regraft.checking.certificate import AdapterVerification
from regraft.checking.for_tool import ToolCheck
from regraft.checking.verdict import Check
from regraft.checkpoints.verify import Verification
from regraft.report import Report
from regraft.views.data import (
    page_of_adapter_verification,
    page_of_check,
    page_of_failure,
    page_of_report,
    page_of_tool_check,
    page_of_verification,
)
from regraft.views.model import Fact, Flow, Page, Row, Side, Tone
from regraft.views.outcome import SourceOutcome

_TONES: dict[str, Tone] = {
    "converted": "good",
    "healthy": "good",
    "equal": "good",
    "unchanged": "plain",
    "skipped": "plain",
    "refused": "warning",
    "unknown": "warning",
}
_WANTED = {"convert": "converted", "check": "healthy", "verify": "equal"}
"""What each source should be, by the command."""


def page_of_many(
    title: str, command: str, outcomes: Sequence[SourceOutcome], *, asked: int
) -> Page:
    """The page of what became of some sources, of ``asked`` ones."""
    pages = [(outcome, _page_of(outcome, command)) for outcome in outcomes]
    left, right, flows = _Joined(), _Joined(), list[Flow]()
    for outcome, page in pages:
        before, after = left.add(outcome.name, page.left), right.add(outcome.name, page.right)
        flows += [
            replace(
                flow,
                sources=tuple(before + row for row in flow.sources),
                targets=tuple(after + row for row in flow.targets),
            )
            for flow in page.flows
        ]
    counts = Counter(outcome.verdict for outcome in outcomes)
    said = [f"{count} {verdict}" for verdict, count in counts.items()]
    if asked > len(outcomes):
        said.append(f"{asked - len(outcomes)} not tried")
    all_good = asked == len(outcomes) and all(outcome.good for outcome in outcomes)
    word = f"{'All' if all_good else 'Not all'} {_WANTED[command]}"
    return Page(
        title=title,
        command=command,
        verdict=Fact(word, ", ".join(said), "good" if all_good else "bad"),
        sources=tuple(map(_line_of, outcomes)),
        facts=tuple(_facts(pages)),
        left=left.side("sources"),
        right=right.side("results") if right.rows else None,
        flows=tuple(flows),
        findings=tuple(finding for _, page in pages for finding in page.findings),
        notes=tuple(f"{o.name}: {note}" for o, page in pages for note in page.notes),
        next=tuple(
            replace(fact, name=f"{o.name}: {fact.name}") for o, p in pages for fact in p.next
        ),
    )


def _page_of(outcome: SourceOutcome, command: str) -> Page:
    result = outcome.report
    if isinstance(result, Report):
        return page_of_report(result)
    if isinstance(result, Check):
        return page_of_check(result)
    if isinstance(result, ToolCheck):
        return page_of_tool_check(result)
    if isinstance(result, Verification):
        return page_of_verification(result)
    if isinstance(result, AdapterVerification):
        return page_of_adapter_verification(result)
    if outcome.error is not None:
        return page_of_failure(command, outcome.source, outcome.error)
    return Page(title=outcome.name, command=command, verdict=_line_of(outcome))


def _line_of(outcome: SourceOutcome) -> Fact:
    words = [outcome.verdict, *([outcome.why] if outcome.why else [])]
    if outcome.hint:
        words.append(f"Fix: {outcome.hint}")
    return Fact(outcome.name, "; ".join(words), _TONES.get(outcome.verdict, "bad"))


def _facts(pages: Iterable[tuple[SourceOutcome, Page]]) -> Iterator[Fact]:
    """What is out of the ordinary of each source; its verdict stands among the sources."""
    for outcome, page in pages:
        for fact in page.facts:
            if fact.tone in ("warning", "bad"):
                yield replace(fact, name=f"{outcome.name}: {fact.name}")


class _Joined:
    """The rows of one side of several pages, each under its source's name."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(self, name: str, side: Side | None) -> int:
        """Add a side; where its rows begin."""
        start = len(self.rows)
        for row in side.rows if side is not None else ():
            self.rows.append(replace(row, group=str(Path(name) / row.group) if row.group else name))
        return start

    def side(self, title: str) -> Side:
        """All of them."""
        return Side(title, tuple(self.rows))
