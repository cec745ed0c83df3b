"""Errors and findings.

    RegraftError
    ├── BadInputError        the input breaks a rule of its own format, or contradicts its config or its base
    ├── UnmatchedKeysError   keys that no rule matches
    ├── AmbiguousError       more than one reading fits and they lead to different results
    ├── RefusedError         the input is sound, but there is no exact equivalent, or no safe way
    └── NotEqualError        the certificate of a result could not be given

Every error carries its findings as data, all problems of one input together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from regraft.errors.codes import CODES, Part, Status


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer to a question that an `AmbiguousError` asks."""

    source: str
    """What to give as ``source``, or ``--from``."""
    why: str
    """What speaks for it."""
    differs: str = ""
    """What becomes different with it."""
    option: str = "--from"
    """The command's option that takes it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem: what is wrong, where, and what to do.

    >>> print(Finding("no-weights", "the adapter has no weights file", where="lora/", fix="save it again"))
    lora/: the adapter has no weights file. Fix: save it again
    """

    code: str
    """A stable name in kebab case, for programs: one of `regraft.errors.codes.Code`."""
    message: str
    """What is wrong and what was expected."""
    where: str | None = None
    """The file or folder, with a line where there is one."""
    key: str | None = None
    """The tensor's key or the config's field."""
    rule: str | None = None
    """The rule that asked for it, with its file and line."""
    fix: str | None = None
    """What to do about it."""
    choices: tuple[Choice, ...] = ()
    """The readings that fit, where it is a question."""

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"{self.code!r} is no code of a finding: add it to errors/codes.py")

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.where, self.key) if part)
        text = f"{place}: {self.message}" if place else self.message
        if self.rule:
            text += f" [rule {self.rule}]"
        for choice in self.choices:
            differs = f": {choice.differs}" if choice.differs else ""
            text += f"; {choice.option} {choice.source} ({choice.why}{differs})"
        return f"{text}. Fix: {self.fix}" if self.fix else text

    def to_dict(self) -> dict[str, Any]:
        """The finding as plain data; fields that say nothing are left out."""
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}


class RegraftError(Exception):
    """The root of regraft's own errors; ``findings`` holds every problem as data."""

    kind: ClassVar[str] = "internal"
    """The stable name of this kind of error, for programs."""
    title: ClassVar[str] = "a bug in regraft"
    """What people read."""
    status: ClassVar[Status] = Status.BUG
    """The exit status that the command ends with."""

    def __init__(self, findings: Finding | Iterable[Finding]) -> None:
        self.findings: tuple[Finding, ...] = (
            (findings,) if isinstance(findings, Finding) else tuple(findings)
        )
        super().__init__(_describe(self.findings))

    def __reduce__(self) -> tuple[type[RegraftError], tuple[tuple[Finding, ...]]]:
        return type(self), (self.findings,)


_UNKNOWN = frozenset(
    {
        "unknown-model",
        "model-needed",
        "which-model",
        "which-dialect",
        "packing",
        "not-an-adapter",
    }
)


def is_unknown(error: RegraftError) -> bool:
    """Whether regraft must be told more about a source; nothing is known to be wrong with it.

    >>> is_unknown(BadInputError(Finding("model-needed", "the base model is not known")))
    True
    """
    return isinstance(error, AmbiguousError) or {f.code for f in error.findings} <= _UNKNOWN


def is_unreadable(error: RegraftError) -> bool:
    """Whether a file could not be read at all, so that nothing is known of what it holds.

    >>> is_unreadable(BadInputError(Finding("not-json", "not JSON")))
    True
    """
    unreadable = (Part.FILES, Part.HEADERS)
    return bool(error.findings) and all(CODES[f.code].part in unreadable for f in error.findings)


class BadInputError(RegraftError):
    """The input breaks a rule of its own format, or contradicts its config or its base."""

    kind = "bad-input"
    title = "bad input"
    status = Status.BAD_INPUT


class UnmatchedKeysError(BadInputError):
    """Keys that no rule matches."""

    kind = "unmatched-keys"
    title = "no rule matches these keys"
    status = Status.BAD_INPUT


class AmbiguousError(RegraftError):
    """More than one reading fits, and they lead to different results."""

    kind = "ambiguous"
    title = "more than one reading fits"
    status = Status.BAD_INPUT


class RefusedError(RegraftError):
    """The input is sound, but there is no exact equivalent of it, or no safe way to what was asked for."""

    kind = "refused"
    title = "refused"
    status = Status.REFUSED


class NotEqualError(RegraftError):
    """A result was checked against its source, and does not add the same to its base."""

    kind = "not-equal"
    title = "not equal"
    status = Status.NO


_SHOWN = 20


def _describe(findings: tuple[Finding, ...]) -> str:
    if len(findings) == 1:
        return str(findings[0])
    lines = [f"{len(findings)} problems:"]
    lines += [f"  {i}. {finding}" for i, finding in enumerate(findings[:_SHOWN], 1)]
    if len(findings) > _SHOWN:
        lines.append(f"  … and {len(findings) - _SHOWN} more (all of them in .findings)")
    return "\n".join(lines)
