"""What explain tells of a key, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from regraft.errors import Finding
from regraft.errors.codes import Status
from regraft.shown import Shown


@dataclass(frozen=True, slots=True)
class End:
    """The tensors of one term of a rule: those that are read together, or made together."""

    keys: tuple[str, ...]
    """As patterns (``experts.{0..7}.w1``)."""
    count: int
    absent: int
    """How many of them are not there; an adapter need not have them all."""
    shape: tuple[int, ...] | None
    kind: str
    term: str
    """As the rule writes it."""
    mine: bool
    """Whether the key that was asked for is among them."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A block that goes from one tensor to another."""

    source: str
    source_place: tuple[str, ...]
    """One entry for each dim: ``:`` for all of it, ``0:6``, ``3``, or ``1::2``."""
    target: str
    target_place: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Near:
    """A rule that almost matches."""

    rule: str
    where: str
    template: str
    why: str
    """Where they part."""
    at: int | None = None
    """The number of the key's segment where they part."""
    expected: str | None = None
    found: str | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Explanation(Shown):
    """The way of one key; ``fate`` is moved, carried, unmatched, unknown or there."""

    src: str
    key: str
    """As it was asked for."""
    kind: str
    """adapter or checkpoint."""
    fate: str
    base: str | None
    """The base tensor that it is about, without what PEFT and wrappers add."""
    role: str
    source_layout: str | None
    target_layout: str
    evidence: tuple[str, ...]
    steps: tuple[str, ...]
    """What is taken off the name before a rule sees it, and the scope of the rule book."""
    rule: str | None = None
    where: str | None = None
    """The rule's file and line."""
    equation: str | None = None
    values: Mapping[str, int | str] = field(default_factory=dict)
    """What holes and ``{*p}`` stand for in this key."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """How large the axes are."""
    sources: tuple[End, ...] = ()
    targets: tuple[End, ...] = ()
    pieces: tuple[Piece, ...] = ()
    why: str | None = None
    """Why it is carried over."""
    passed: tuple[str, ...] = ()
    """Other rules that match and are less close."""
    near: tuple[Near, ...] = ()
    closest: tuple[str, ...] = ()
    problems: tuple[Finding, ...] = ()

    @property
    def arrives(self) -> bool:
        """Whether the key is explained."""
        return self.fate in ("moved", "carried", "there") and not self.problems

    @property
    def status(self) -> Status:
        """The exit status of the command that found it."""
        return Status.DONE if self.arrives else Status.NO

    def to_dict(self) -> dict[str, Any]:
        """The explanation as plain data."""
        return {**Shown.to_dict(self), "arrives": self.arrives}
