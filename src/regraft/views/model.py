"""What a page shows, as plain data: a verdict, facts, two trees of names, and the flows between them.

Whatever has names on one side or two, and something to say about them, can make a page; `regraft.views.html`
writes it. A tree holds patterns, not keys, so a page of a hundred thousand tensors stays small.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from regraft.errors import Finding
from regraft.names.patterns import Pattern, group_alike

Tone = Literal["plain", "good", "info", "change", "warning", "bad"]
Runs = tuple[tuple[int, int], ...]
"""Numbers as runs, first and last."""


@dataclass(frozen=True, slots=True)
class State:
    """What can become of a tensor, in a word, a colour, and a sentence."""

    label: str
    tone: Tone
    means: str


STATES: dict[str, State] = {
    "kept": State("unchanged", "plain", "it is the same in both"),
    "renamed": State("renamed", "info", "only its name changes"),
    "fused": State("fused", "change", "several tensors become one"),
    "split": State("split", "change", "one tensor becomes several"),
    "turned": State("rearranged", "change", "its elements stand in another order"),
    "dropped": State("dropped", "warning", "it has no place in the result"),
    "refused": State("refused", "bad", "it has no exact equivalent"),
    "unmatched": State("unmatched", "bad", "nothing explains it"),
    "problem": State("wrong", "bad", "something is wrong with it"),
    "differs": State("differs", "bad", "it is not what it should be"),
    "missing": State("missing", "bad", "it should be there and is not"),
    "extra": State("extra", "bad", "nothing leads to it"),
    "adapted": State("adapted", "info", "it has a low-rank factor pair"),
    "equal": State("equal", "good", "it is the same in both"),
    "lands": State("loaded", "good", "all of it takes effect"),
    "ignored": State("ignored", "bad", "it is left out, without an error"),
    "scaled": State("wrong scale", "bad", "its effect is too large or too small"),
    "values": State("other values", "bad", "it changes something else"),
    "causeless": State("adapted without cause", "bad", "the adapter has nothing for it"),
    "fails": State("not loaded", "bad", "the loader raises an error"),
    "uncallable": State("fails when the model runs", "bad", "it loads, and cannot be called"),
    "idle": State("no effect", "bad", "the model never calls it"),
    "elsewhere": State("another name or shape there", "bad", "names or shapes do not fit"),
    "unused": State("not used", "bad", "the model has no such tensor"),
    "misshaped": State("wrong shape", "bad", "the model has another shape"),
    "unknown": State("not known without the base", "warning", "it hangs on the base"),
    "warned": State("warning", "warning", "it can go wrong"),
    "noted": State("note", "info", "good to know"),
    "saved": State("saved", "plain", "it is stored as it is"),
}
"""The states that rows and flows can have, in the order in which filters show them."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A name and what it is."""

    name: str
    value: str
    tone: Tone = "plain"


@dataclass(frozen=True, slots=True)
class Row:
    """Tensors that are alike, under one pattern."""

    path: tuple[str | Runs, ...]
    """The segments of the name; the numbers that a segment can be, as runs."""
    count: int
    state: str
    """One of `STATES`."""
    facts: Mapping[str, str | int | float] = field(default_factory=dict)
    """Shape, rank, scale, and what else there is to say of each of them."""
    group: str = ""
    """What they belong to, where a page has several: the adapter's name, say."""


@dataclass(frozen=True, slots=True)
class Side:
    """One tree of names."""

    title: str
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True, slots=True)
class Flow:
    """Which rows of the left become which rows of the right, and by what."""

    sources: tuple[int, ...]
    """Numbers of rows on the left."""
    targets: tuple[int, ...]
    """Numbers of rows on the right."""
    state: str
    rule: str
    """The rule, with its file and line, or why nothing changed."""
    note: str = ""
    """The equation, or whatever else explains it."""
    times: int = 1


@dataclass(frozen=True, slots=True)
class Page:
    """Everything that one page shows."""

    title: str
    command: str
    """The command that made it, such as ``convert``."""
    verdict: Fact
    """The answer in a line; its name is a word such as ``Equal``."""
    sources: tuple[Fact, ...] = ()
    """What became of each source, where there are several."""
    facts: tuple[Fact, ...] = ()
    left: Side | None = None
    right: Side | None = None
    flows: tuple[Flow, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    next: tuple[Fact, ...] = ()
    """What to do next: what for, and the command or the line of Python."""
    unit: str = "tensor"
    """What the rows count."""


class Rows:
    """Collects the rows of a side.

    >>> rows = Rows()
    >>> rows.add(["l.0.w", "l.1.w"], "kept", {"rank": 4})
    (0,)
    >>> rows.side("source").rows[0].path
    ('l', ((0, 1),), 'w')
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(
        self,
        names: Iterable[str],
        state: str,
        facts: Mapping[str, str | int | float] | None = None,
        group: str = "",
    ) -> tuple[int, ...]:
        """Add names that are alike; the numbers of their rows."""
        start = len(self.rows)
        # JSON knows no infinity; a fact that is none all the same is shown as a word.
        known = {
            name: str(value) if isinstance(value, float) and not isfinite(value) else value
            for name, value in (facts or {}).items()
        }
        self.rows += [
            Row(path_of(pattern), len(pattern), state, known, group)
            for pattern in group_alike(names)
        ]
        return tuple(range(start, len(self.rows)))

    def side(self, title: str) -> Side:
        """What was collected."""
        return Side(title, tuple(self.rows))


_HOLE = "\0"


def path_of(pattern: Pattern) -> tuple[str | Runs, ...]:
    """A pattern by segments.

    >>> path_of(group_alike(["a.0.b", "a.1.b", "a.5.b"])[0])
    ('a', ((0, 1), (5, 5)), 'b')
    """
    columns = iter(pattern.columns)
    path: list[str | Runs] = []
    for segment in _HOLE.join(pattern.texts).split("."):
        if segment != _HOLE:
            path.append(segment)
            continue
        values = next(columns)
        path.append(str(values[0]) if len(values) == 1 else runs_of(values))
    return tuple(path)


def runs_of(values: Sequence[int]) -> Runs:
    """Sorted numbers as runs.

    >>> runs_of([0, 1, 2, 5])
    ((0, 2), (5, 5))
    """
    runs: list[tuple[int, int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], value)
        else:
            runs.append((value, value))
    return tuple(runs)
