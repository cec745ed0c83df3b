"""What became of one source among many."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from regraft.checking.for_tool import ToolCheck
from regraft.checking.verdict import Check
from regraft.errors import Finding, RefusedError, RegraftError, is_unknown
from regraft.report import SCHEMA_VERSION, Report

Verdict = Literal[
    "converted", "unchanged", "healthy", "not healthy", "refused", "unknown", "failed"
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
    """``unknown``: regraft has to be told more about it."""
    why: str = ""
    """In a few words."""
    report: Report | Check | ToolCheck | None = None
    """What the command prints where this is its only source."""
    error: Problem | None = None
    load: str = ""
    """How to load the result."""
    fix: list[str] = field(default_factory=list)
    """The commands that mend it."""

    @property
    def good(self) -> bool:
        """Whether nothing is left to do."""
        return self.verdict in ("converted", "unchanged", "healthy")

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
        }


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
    return SourceOutcome(name, str(path), None, verdict, first.message + more, error=problem)
