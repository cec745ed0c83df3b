"""What `check` finds out, as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from regraft.adapters.detect import why_of_another
from regraft.errors import Finding
from regraft.errors.codes import Status
from regraft.names.patterns import group_alike
from regraft.shown import Shown

OUTCOMES = {
    "lands": ("loaded", "loaded"),
    "dropped": ("ignored", "ignored"),
    "scaled": ("wrong scale", "with a wrong scale"),
    "differs": ("other values", "with other values"),
    "extra": ("adapted without cause", "adapted without cause"),
    "uncalled": ("no effect", "without effect"),
    "fails": ("fails when the model runs", "that fail when the model runs"),
    "refused": ("not loaded", "not loaded"),
    "elsewhere": ("another name or shape there", "under another name or shape there"),
    "missing": ("missing", "missing"),
    "unexpected": ("not used", "not used"),
    "mismatched": ("wrong shape", "with a wrong shape"),
}
"""What can become of a tensor: in words, and in words after a number."""


@dataclass(frozen=True, slots=True)
class Row:
    """Tensors that fare alike."""

    pattern: str
    count: int
    outcome: str
    """One of `OUTCOMES`."""
    rank: int | None = None
    scale: float | None = None
    """What should multiply ``B @ A``."""
    factor: float | None = None
    """How many times too large the effect would be, where only the scale is wrong."""
    dead: bool = False
    """Whether B is zero: nothing would change."""
    detail: str = ""
    keys: Iterable[str] = ()
    """The tensors; not in `Check.to_dict`."""


def rows_of(alike: Iterable[tuple[str, dict[str, Any]]]) -> list[Row]:
    """Rows from keys with what there is to say of each; those alike come together, what is wrong first.

    >>> [(r.pattern, r.count) for r in rows_of([("l.0.w", {"outcome": "lands"}), ("l.1.w", {"outcome": "lands"})])]
    [('l.{0,1}.w', 2)]
    """
    groups: dict[tuple[tuple[str, Any], ...], list[str]] = {}
    for key, facts in alike:
        groups.setdefault(tuple(facts.items()), []).append(key)
    rows = []
    for looks, keys in groups.items():
        for same in group_alike(keys):
            rows.append(Row(str(same), len(same), **dict(looks), keys=same))
    return sorted(rows, key=lambda row: row.outcome == "lands")


@dataclass(slots=True)
class Verdict:
    """What would become of one adapter or checkpoint."""

    name: str
    """The sub-folder, or an empty string."""
    kind: str
    """``LORA``, ``IA3``, ... or ``checkpoint``."""
    layout: str | None = None
    """The layout that it is in, where that is known."""
    healthy: bool | None = None
    """Whether all of it lands and has its full effect; ``None`` where that cannot be told."""
    tried: str | None = None
    """What it was tried with; ``None`` where it was judged by names, shapes and config alone."""
    error: str | None = None
    """What the loader raises."""
    rows: list[Row] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    """Why, in plain words."""
    remedy: list[str] = field(default_factory=list)
    """The commands that mend it."""
    remedy_tried: bool = False
    """Whether their result was tried, and loads rightly."""
    no_remedy: str | None = None
    """Why there is none."""
    findings: list[Finding] = field(default_factory=list)
    """What is wrong with it, or why it cannot be converted."""
    unreadable: bool = False
    """Whether a file of it cannot be read at all."""
    warnings: list[str] = field(default_factory=list)
    """What the loader says."""
    notes: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors fare how."""
        found: dict[str, int] = {}
        for row in self.rows:
            found[row.outcome] = found.get(row.outcome, 0) + row.count
        return found

    @property
    def dead(self) -> int:
        """How many LoRAs change nothing."""
        return sum(row.count for row in self.rows if row.dead)


@dataclass(slots=True, repr=False)
class Check(Shown):
    """Whether adapters or a checkpoint load as they are."""

    source: str
    layout: str
    """The layout that they were checked for."""
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether all of them do, for certain."""
        return bool(self.verdicts) and all(v.healthy is True for v in self.verdicts)

    @property
    def why(self) -> str:
        """Why not, or why nothing is proven, in one line; empty where nothing is wrong."""
        for verdict in () if self.healthy else self.verdicts:
            lines = (*verdict.causes, *(each.message for each in verdict.findings), verdict.error)
            said = next(filter(None, lines), None)
            if said is not None:
                return said
            if verdict.healthy is None and verdict.notes:
                return verdict.notes[0]
        return ""

    @property
    def remedy(self) -> list[str]:
        """The commands that mend it."""
        return [line for verdict in self.verdicts for line in verdict.remedy]

    @property
    def is_unknown(self) -> bool:
        """Whether nothing speaks against it, and nothing proves that it loads."""
        return not self.healthy and all(v.healthy is not False for v in self.verdicts)

    @property
    def is_unproven(self) -> bool:
        """Whether it is only not proven: all fits by names, shapes and config, and nothing was tried."""
        return self.is_unknown and not any(verdict.findings for verdict in self.verdicts)

    @property
    def of_another(self) -> str | None:
        """Why the base that was given is of another family than an adapter; ``None`` where it is not."""
        return why_of_another(each for verdict in self.verdicts for each in verdict.findings)

    @property
    def status(self) -> Status:
        """The exit status of the command that found it."""
        if any(verdict.unreadable for verdict in self.verdicts):
            return Status.BAD_INPUT
        return Status.DONE if self.healthy else Status.NO

    def to_dict(self) -> dict[str, Any]:
        """The check as plain data."""
        data = asdict(self)
        data["healthy"] = self.healthy
        for plain, verdict in zip(data["verdicts"], self.verdicts, strict=True):
            plain["counts"] = verdict.counts
            plain["findings"] = [finding.to_dict() for finding in verdict.findings]
            for row in plain["rows"]:
                del row["keys"]
        return data
