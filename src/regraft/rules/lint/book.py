"""Lint: what is wrong with a rule book, found before any tensor is read.

Loading a book finds what is wrong inside one table. Lint compares the tables with each other, and with the names of a
checkpoint where there is one. A book's rules apply at once: the closest claims a key, and what it writes is read by
none. So a hazard here is that a layout cannot be told from the other, that two rules make one key, or that a table
never counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from regraft.equation.lower import stacked_holes
from regraft.equation.notation import Axis, Equation, Key, Term, axes_of, parse_key
from regraft.errors import BadInputError, Finding
from regraft.errors.codes import Status
from regraft.rules.book import Book, Rule, Unordered, load_book, read_book, table_of
from regraft.rules.direction import SIDES, Side
from regraft.rules.indices import given_names
from regraft.rules.kinds import KINDS
from regraft.rules.meet import covers, dims_meet, meet, segments_of, write_segment
from regraft.rules.templates import specificity
from regraft.shown import Shown

Severity = Literal["error", "warning", "note"]
_ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that lint found. ``finding`` says what, where (file and line) and what to do."""

    severity: Severity
    """``error``: it will fail or be wrong; ``warning``: it can be; ``note``: good to know."""
    finding: Finding
    other: str | None = None
    """The second rule or table, with its file and line."""
    example: str | None = None
    """A key that shows it."""


@dataclass(frozen=True, slots=True, repr=False)
class Linted(Shown):
    """What lint found in one book; the worst comes first."""

    book: str
    where: str
    rules: int
    keys: int
    """How many keys it was compared with; 0 where there were none."""
    fired: dict[str, int]
    """How many of the keys every rule claims."""
    faults: tuple[Fault, ...]

    @property
    def sound(self) -> bool:
        """Whether there are no errors."""
        return all(fault.severity != "error" for fault in self.faults)

    @property
    def status(self) -> Status:
        """The exit status of the command that found it."""
        return Status.DONE if self.sound else Status.NO

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return {**Shown.to_dict(self), "sound": self.sound}


def lint_file(path: Path) -> Linted | Book:
    """A book that loads, or what loading it found.

    Raises ``BadInputError`` for a file that cannot be read as text.
    """
    text = read_book(path)
    try:
        return load_book(path)
    except BadInputError as error:
        faults = tuple(Fault("error", finding) for finding in error.findings)
        return Linted(path.stem, str(path), text.count("[[equation]]"), 0, {}, faults)


def lint_book(book: Book) -> tuple[Fault, ...]:
    """Everything that is suspicious about a book by itself.

    >>> from regraft.rules.book import library
    >>> [fault for book in library() for fault in lint_book(book) if fault.severity == "error"]
    []
    """
    return in_order(
        [
            *_overlaps(book),
            *_carries(book),
            *_chains(book),
            *_counts(book),
            *_gaps(book),
            *_named(book),
        ]
    )


def in_order(faults: Sequence[Fault]) -> tuple[Fault, ...]:
    """The worst first, then by place."""
    return tuple(sorted(faults, key=lambda f: (_ORDER[f.severity], *_place(f.finding.where))))


def _place(where: str | None) -> tuple[str, int]:
    path, _, line = (where or "").rpartition(":")
    return path, int(line) if line.isdigit() else 0


@dataclass(frozen=True, slots=True)
class _End:
    rule: Rule
    term: Term
    key: Key


def _ends(book: Book, side: Side) -> list[_End]:
    return [
        _End(rule, term, term.key)
        for rule in book.rules
        if rule.reads in (None, side)
        for term in (rule.equation.left if side == "left" else rule.equation.right)
        if term.key is not None
    ]


def _overlaps(book: Book) -> Iterator[Fault]:
    """Two terms of one side that one tensor fits, neither closer than the other."""
    for side in ("left", "right"):
        claimed, made = (
            ("left to right", "right to left")
            if side == "left"
            else ("right to left", "left to right")
        )
        for one, other in combinations(_ends(book, side), 2):
            key = meet(one.key, other.key) if dims_meet(one.term, other.term) else None
            if key is None:
                continue
            first, second = (
                specificity(one.term, one.rule.equation),
                specificity(other.term, other.rule.equation),
            )
            if first == second:
                message = (
                    f"{_named_end(other)} and {_named_end(one)} both speak of {key}: read {claimed} "
                    f"both claim it, read {made} both make it"
                )
                fix = "spell out in one of them what tells them apart, or remove it"
                finding = Finding(
                    "rules-overlap" if side == "left" else "collision",
                    message,
                    where=other.rule.where,
                    rule=other.rule.name,
                    fix=fix,
                )
                yield Fault("error", finding, str(one.rule), key)
                continue
            close, wide = (one, other) if first > second else (other, one)
            if given_names(close.rule.equation, close.key) or close.rule.equation.begins:
                continue  # it speaks of one index, such as that of the last layer, or of those from one on
            if covers(close.key, wide.key) and not wide.term.ends_open:
                message = f"read {claimed} it never fires: {_named_end(close)} claims all its keys"
                fix = "remove it, or spell out what it alone speaks of"
                finding = Finding(
                    "shadowed", message, where=wide.rule.where, rule=wide.rule.name, fix=fix
                )
                yield Fault("error", finding, str(close.rule), key)
            elif not covers(wide.key, close.key):
                message = (
                    f"it and {close.rule.name!r} both speak of {key}; the second is closer only because "
                    "it has more numbers, dims or letters"
                )
                fix = "spell out what tells them apart"
                finding = Finding(
                    "rules-overlap", message, where=wide.rule.where, rule=wide.rule.name, fix=fix
                )
                yield Fault("warning", finding, str(close.rule), key)


def _named_end(end: _End) -> str:
    return f"{end.rule.name!r} ({end.key})"


def _carries(book: Book) -> Iterator[Fault]:
    """Carry-overs that never count, and those that let in keys of the other layout."""
    sides: tuple[Side, Side] = ("left", "right")
    for number, carry in enumerate(book.carries):
        assert carry.term.key is not None
        key = carry.term.key
        for before in book.carries[:number]:
            assert before.term.key is not None
            if not covers(before.term.key, key):
                continue
            twice = covers(key, before.term.key)
            # What the first checks as well is not lost.
            any_sizes = len(carry.term.dims) == carry.term.ends_open
            sizes = not any_sizes and carry.term.dims != before.term.dims
            checks = sizes or not set(carry.equation.where) <= set(before.equation.where)
            message = (
                f"{key} never counts: {before.term.key} ({before.where}) takes all its keys first"
            )
            fix = "remove it" if twice else "put it before the other"
            finding = Finding("shadowed", message, where=carry.where, fix=fix)
            yield Fault("warning" if checks else "note", finding, before.where, str(key))
            break
        for side in sides:
            reads = _ends(book, "right" if side == "left" else "left")
            for end in _ends(book, side):
                met = meet(key, end.key)
                if met is None or any(covers(r.key, parse_key(met)) for r in reads):
                    continue
                layout = book.left if side == "left" else book.right
                message = (
                    f"{key} carries {met} over, which {end.rule.name!r} makes in {layout}: where a file "
                    "holds keys of both layouts, two would become one"
                )
                fix = "carry over only what no rule makes"
                finding = Finding("carry-collides", message, where=carry.where, fix=fix)
                yield Fault("warning", finding, str(end.rule), met)
                break


def _chains(book: Book) -> Iterator[Fault]:
    """Rules whose result is read again: by another rule, or by themselves."""
    for one in _ends(book, "right"):
        for other in _ends(book, "left"):
            key = meet(one.key, other.key) if dims_meet(one.term, other.term) else None
            if key is None:
                continue
            if one.rule != other.rule:
                if _same_in_both(one.rule, one.key) or _same_in_both(other.rule, other.key):
                    continue
                message = (
                    f"{other.rule.name!r} reads what {one.rule.name!r} makes ({key}): a file that is in "
                    f"{book.right} already, or half of it, would be converted once more"
                )
                fix = "give one of the two another name, or spell out what tells them apart"
                finding = Finding(
                    "eats-output", message, where=other.rule.where, rule=other.rule.name, fix=fix
                )
                yield Fault("warning", finding, str(one.rule), key)
            elif one.term.dims == other.term.dims and _does_nothing(one.rule):
                if one.rule.module:
                    continue  # it says which modules there are, and of what kind
                message = f"{key} is the same on both sides, with the same dims and kinds"
                finding = Finding(
                    "does-nothing",
                    message,
                    where=one.rule.where,
                    rule=one.rule.name,
                    fix="make it a [[carry]]",
                )
                yield Fault("warning", finding, None, key)
            elif one.term.dims != other.term.dims:
                message = (
                    f"{key} has one name in both layouts and is not the same tensor: converting twice is "
                    "not converting once, and only shapes tell the layout"
                )
                finding = Finding(
                    "not-idempotent",
                    message,
                    where=one.rule.where,
                    rule=one.rule.name,
                    fix="give sizes in where (config fields), so that shapes tell the layouts apart",
                )
                yield Fault("note" if _sized(one.rule.equation) else "warning", finding, None, key)


def _same_in_both(rule: Rule, key: Key) -> bool:
    equation = rule.equation
    return any(t.key == key for t in equation.left) and any(t.key == key for t in equation.right)


def _does_nothing(rule: Rule) -> bool:
    """Whether it stands for what a carry-over says; a parameter is packed otherwise by PEFT even where it stays."""
    left, right = rule.equation.left, rule.equation.right
    kinds = {KINDS[name] for name in (*rule.left_kinds, *rule.right_kinds)}
    return (
        [(t.key, t.dims) for t in left] == [(t.key, t.dims) for t in right]
        and rule.left_kinds == rule.right_kinds
        and all(kind.module or kind.name == "vector" for kind in kinds)
    )


def _sized(equation: Equation) -> bool:
    """Whether config fields give the size of an axis of every term that has dims."""
    told = _told(equation)
    return all(
        any(name in told for dim in term.dims for name in axes_of(dim)) for term in equation.left
    )


def _told(equation: Equation) -> set[str]:
    """Axes that a clause gives a size which is in no tensor of the rule."""
    told = {
        clause.axis
        for clause in equation.where
        if not any(isinstance(value, Axis) for _, value in clause.values)
    }
    same = [
        (clause.axis, clause.values[0][1].name)
        for clause in equation.where
        if len(clause.values) == 1 and isinstance(clause.values[0][1], Axis)
    ]
    for _ in same:
        told |= {a for a, b in same if b in told} | {b for a, b in same if a in told}
    return told


def _counts(book: Book) -> Iterator[Fault]:
    """Stacked indices whose number only the keys tell: a missing last one would not be noticed."""
    for rule in book.rules:
        told = _told(rule.equation)
        reported: set[str] = set()
        for side in (rule.equation.left, rule.equation.right):
            sized = {name for term in side for dim in term.dims for name in axes_of(dim)}
            for term in side:
                for hole in stacked_holes(rule.equation, term):
                    for name in axes_of(hole):
                        if name in told | sized | reported:
                            continue
                        reported.add(name)
                        message = (
                            f"nothing but the keys says how many values {{{name}}} has in {term.key}: "
                            "if the last are missing, the result is smaller, and nobody is told"
                        )
                        finding = Finding(
                            "incomplete-index",
                            message,
                            where=rule.where,
                            rule=rule.name,
                            fix=f"add to where: {name} = config.FIELD",
                        )
                        yield Fault("warning", finding, None, str(term.key))


def _gaps(book: Book) -> Iterator[Fault]:
    """Spelled-out indices of one side that leave one out: shard.0, shard.1, shard.3.

    Numbers that each have a rule of their own are places in an ``nn.Sequential``, and its activations have no weights.
    """
    for side in ("left", "right"):
        seen: dict[tuple[str, ...], dict[int, Rule]] = defaultdict(dict)
        for end in _ends(book, side):
            segments = segments_of(end.key)
            words = [write_segment(segment) for segment in segments]
            for place, segment in enumerate(segments):
                if segment is not None and len(segment) == 1 and isinstance(segment[0], int):
                    around = (*words[:place], "#", *words[place + 1 :])
                    seen[around].setdefault(segment[0], end.rule)
        for around, numbers in seen.items():
            missing = [n for n in range(max(numbers)) if n not in numbers]
            if len({rule.module or rule.name for rule in numbers.values()}) == len(numbers):
                continue
            if len(numbers) > 1 and missing:
                rule = numbers[max(numbers)]
                shown = ".".join(around).replace("#", str(missing[0]))
                finding = Finding(
                    "incomplete-index",
                    f"there are rules for {', '.join(map(str, sorted(numbers)))} of "
                    f"{'.'.join(around)}, and none for {missing[0]}",
                    where=rule.where,
                    rule=rule.name,
                    fix=f"add {shown}, or write a hole in place of the number",
                )
                yield Fault("warning", finding, None, shown)


def _named(book: Book) -> Iterator[Fault]:
    """Tables about modules that no rule and no carry-over speaks of."""
    for table in book.parameters:
        for side in table.sides:
            for name in table.names:
                if not _spoken_of(book, side, parse_key(f"{table.module}.{name}")):
                    yield _nobody(book, side, f"{table.module}.{name}", table.where)
    for side in SIDES:
        for lacking in book.unordered(side):
            yield _out_of_order(side, lacking)
    for module in book.specials:
        for side in module.sides:
            for name in module.tensors:
                if not _spoken_of(book, side, parse_key(f"{module.module}.{name}")):
                    yield _nobody(book, side, f"{module.module}.{name}", module.where)
    if bool(book.reclaimed) != bool(book.reclaimed_model_types):
        finding = Finding(
            "dead-table",
            "reclaimed and reclaimed_model_types have an effect together only",
            where=f"{book.path}:1",
            fix="add the other",
        )
        yield Fault("warning", finding)


def _out_of_order(side: Side, module: Unordered) -> Fault:
    table = table_of(side, module.module, module.names)
    finding = Finding(
        "parameter-order",
        f"{module.module} has {len(module.names)} stacked parameters ({', '.join(module.names)}), and no table gives "
        "the order in which its class registers them: adapters of several of them are refused",
        where=module.rule.where,
        rule=module.rule.name,
        fix=f"add these lines, with the names in that order: {'; '.join(table.splitlines())}",
    )
    return Fault("warning", finding, None, f"{module.module}.{module.names[0]}")


def _spoken_of(book: Book, side: Side, key: Key) -> bool:
    keys = [end.key for end in _ends(book, side)]
    keys += [carry.term.key for carry in book.carries if carry.term.key is not None]
    return any(meet(key, other) is not None for other in keys)


def _nobody(book: Book, side: Side, key: str, where: str) -> Fault:
    layout = book.left if side == "left" else book.right
    finding = Finding(
        "dead-table",
        f"no rule and no carry-over speaks of {key} in {layout}",
        where=where,
        fix="correct the module's path or the names, or remove the table",
    )
    return Fault("warning", finding, None, key)


__all__ = ["Fault", "Linted", "Severity", "in_order", "lint_book", "lint_file"]
