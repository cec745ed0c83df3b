"""Errors and findings.

    RegraftError
    ├── BadInputError        the input breaks a rule of its own format, or contradicts its config or its base
    ├── UnmatchedKeysError   keys that no rule and no carry-over explains
    ├── AmbiguousError       more than one reading fits and they lead to different results
    ├── RefusedError         the input is sound, but what was asked for has no exact image
    └── NotEqualError        the certificate of a result could not be given

Every error carries its findings as data, all problems of one input together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem: what is wrong, where, and what to do.

    >>> print(Finding("missing-weights", "the adapter has no weights file", where="lora/", fix="save it again"))
    lora/: the adapter has no weights file. To mend it: save it again
    """

    code: str
    """A stable name in kebab case, for programs."""
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

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.where, self.key) if part)
        text = f"{place}: {self.message}" if place else self.message
        if self.rule:
            text += f" [rule {self.rule}]"
        return f"{text}. To mend it: {self.fix}" if self.fix else text

    def to_dict(self) -> dict[str, Any]:
        """The finding as plain data; fields that say nothing are left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class RegraftError(Exception):
    """The root of regraft's own errors; ``findings`` holds every problem as data."""

    def __init__(self, findings: Finding | Iterable[Finding]) -> None:
        self.findings: tuple[Finding, ...] = (
            (findings,) if isinstance(findings, Finding) else tuple(findings)
        )
        super().__init__(_describe(self.findings))

    def __reduce__(self) -> tuple[type[RegraftError], tuple[tuple[Finding, ...]]]:
        return type(self), (self.findings,)


class BadInputError(RegraftError):
    """The input breaks a rule of its own format, or contradicts its config or its base."""


class UnmatchedKeysError(RegraftError):
    """Keys that no rule and no carry-over explains."""


class AmbiguousError(RegraftError):
    """More than one reading fits, and they lead to different results."""


class RefusedError(RegraftError):
    """The input is sound, but what was asked for has no exact image."""


class NotEqualError(RegraftError):
    """A result was checked against its source, and does not add the same to its base."""


_SHOWN = 20


def _describe(findings: tuple[Finding, ...]) -> str:
    if len(findings) == 1:
        return str(findings[0])
    lines = [f"{len(findings)} problems:"]
    lines += [f"  {i}. {finding}" for i, finding in enumerate(findings[:_SHOWN], 1)]
    if len(findings) > _SHOWN:
        lines.append(f"  … and {len(findings) - _SHOWN} more (all of them in .findings)")
    return "\n".join(lines)
