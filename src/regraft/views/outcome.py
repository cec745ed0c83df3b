"""What became of one source among many."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from regraft.checking.certificate import AdapterVerification
from regraft.checking.for_tool import ToolCheck
from regraft.checking.verdict import Check
from regraft.checkpoints.verify import Verification
from regraft.errors import Finding, RefusedError, RegraftError, is_unknown
from regraft.report import SCHEMA_VERSION, AdapterReport, Report, count_in_words
from regraft.rules.book import rules_words
from regraft.views.loading import how_to_load

Verdict = Literal[
    "converted",
    "unchanged",
    "healthy",
    "not healthy",
    "equal",
    "not equal",
    "skipped",
    "refused",
    "unknown",
    "failed",
]


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a command gave no result."""

    kind: Literal[
        "bad-input",
        "unmatched-keys",
        "ambiguous",
        "not-equal",
        "refused",
        "usage",
        "interrupted",
        "internal",
    ]
    """What kind of error it is; it goes with the exit status."""
    findings: list[Finding]
    """Every problem of the input."""


@dataclass(frozen=True, slots=True)
class SourceOutcome:
    """What became of one source among many; one line of JSON each."""

    name: str
    """Relative to the folder that was named."""
    source: str
    destination: str | None
    verdict: Verdict
    """``unknown``: regraft has to be told more about it. ``skipped``: it is not what the command is for."""
    why: str = ""
    """In a few words."""
    report: Report | Check | ToolCheck | Verification | AdapterVerification | None = None
    """What the command prints where this is its only source."""
    error: Problem | None = None
    load: str = ""
    """How to load the result."""
    fix: list[str] = field(default_factory=list)
    """The commands that mend it."""
    hint: str = ""
    """What to do, in words, where no command mends it."""

    @property
    def good(self) -> bool:
        """Whether nothing is left to do."""
        return self.verdict in ("converted", "unchanged", "healthy", "equal", "skipped")

    def to_dict(self) -> dict[str, Any]:
        """The outcome as plain data."""
        report = error = None
        if self.report is not None:
            report = {"schema_version": SCHEMA_VERSION, **self.report.to_dict()}
        if self.error is not None:
            findings = [finding.to_dict() for finding in self.error.findings]
            error = {"kind": self.error.kind, "findings": findings}
        return {
            "name": self.name,
            "source": self.source,
            "destination": self.destination,
            "verdict": self.verdict,
            "why": self.why,
            "report": report,
            "error": error,
            "load": self.load,
            "fix": list(self.fix),
            "hint": self.hint,
        }


def converted(
    name: str, path: Path, place: Path, report: Report, other: str | None = None
) -> SourceOutcome:
    """A source that was converted, to ``place``; ``other`` says why the base that was given was left out."""
    made = report.checkpoint
    if made is not None:
        ways = [(made.source_layout, made.target_layout)]
        same = made.source_layout == made.target_layout
    else:
        ways = [(each.source_layout, each.target_layout) for each in report.adapters]
        same = all(map(_is_same, report.adapters))
    verdict: Verdict = "unchanged" if same else "converted"
    why = ", ".join(dict.fromkeys(f"{before} -> {after}" for before, after in ways))
    if same:
        why = f"the same in {why.partition(' -> ')[2]}"
    if other is not None:
        why += f" (without --model: {other})"
    load = how_to_load(report) if report.written and made is None else ""
    return SourceOutcome(name, str(path), str(place), verdict, why, report, load=load)


def _is_same(adapter: AdapterReport) -> bool:
    """Whether a result has the names and numbers of its source: no rule fired, and no tool's files became another's."""
    files = {_files_of(name) for name in (adapter.source_layout, adapter.target_layout)}
    moved = any(adapter.rules.values()) or not all(target.exact for target in adapter.targets)
    return adapter.copied or (
        len(files) == 1 and not moved and adapter.tensors_in == adapter.tensors_out
    )


def _files_of(layout: str) -> str:
    """The dialect of a layout's name (``LAYOUT:DIALECT``, or one word for both, as mlx); empty where it is PEFT's."""
    from regraft.dialects.base import dialects

    name, _, dialect = layout.partition(":")
    return dialect or (name if name in dialects() else "")


def checked(
    name: str, path: Path, result: Check | ToolCheck, other: str | None = None
) -> SourceOutcome:
    """A source that was checked; ``other`` says why the base that was given is not its own, and was left out."""
    verdict: Verdict = "healthy" if result.healthy else "not healthy"
    findings: list[Finding] = []
    reasons = [result.no_fix] if isinstance(result, ToolCheck) else []
    verdict = "unknown" if result.is_unknown else verdict
    if isinstance(result, Check):
        findings = [each for one in result.verdicts for each in one.findings]
        reasons += [one.no_remedy for one in result.verdicts]
    why = result.why
    if other is not None:
        # Untried, nothing is known to load; what speaks against it stands, and what a tool does with any such base.
        if isinstance(result, Check) and verdict == "healthy":
            verdict = "unknown"
        why = f"{why} (without --model: {other})" if verdict == "not healthy" else other
        if verdict == "healthy":
            why = f"without --model: {other}"
    hint = ""
    if verdict != "healthy" and not result.remedy:
        hint = _hint(findings, path) or next(filter(None, reasons), "")
        if not hint and verdict == "unknown":
            words = ["regraft", "check", str(path), *rules_words()]
            hint = f"{shlex.join(words)} --model BASE, with its base"
    if isinstance(result, ToolCheck) and result.remedy_needs:
        hint = result.remedy_needs
    return SourceOutcome(name, str(path), None, verdict, why, result, fix=result.remedy, hint=hint)


def verified(
    name: str, path: Path, place: Path, result: Verification | AdapterVerification
) -> SourceOutcome:
    """A source that was compared with what stands at ``place``."""
    verdict: Verdict = "equal" if result.equal else "not equal"
    if isinstance(result, Verification):
        why = count_in_words(result.tensors, "tensor")
    else:
        why = f"{count_in_words(len(result.targets), 'target')}, error {result.error:.2g}"
    if not result.equal:
        more = len(result.differences) - 1
        why = result.differences[0].message + (f" (and {more} more)" if more else "")
    return SourceOutcome(name, str(path), str(place), verdict, why, result)


def failure(name: str, path: Path, error: RegraftError) -> SourceOutcome:
    """A source that gave an error: refused, not known well enough, or wrong."""
    verdict: Verdict = "failed"
    if isinstance(error, RefusedError):
        verdict = "refused"
    elif is_unknown(error):
        verdict = "unknown"
    first = error.findings[0]
    more = f" (and {len(error.findings) - 1} more)" if len(error.findings) > 1 else ""
    problem = Problem(error.kind, list(error.findings))  # type: ignore[arg-type]
    why, hint = first.message + more, _hint(error.findings, path)
    return SourceOutcome(name, str(path), None, verdict, why, error=problem, hint=hint)


def _hint(findings: Iterable[Finding], path: Path) -> str:
    """What to do about the first problem of which that is known, and where, if not for all of the source.

    >>> _hint([Finding("not-json", "not JSON", where="lora/a.json:2", fix="correct the file")], Path("lora"))
    'correct the file (lora/a.json:2)'
    """
    for finding in findings:
        if finding.fix:
            apart = finding.where not in (None, str(path))
            return f"{finding.fix} ({finding.where})" if apart else finding.fix
    return ""
