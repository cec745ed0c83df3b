"""Where the blocks of one rule at work lie: the ends, and the pieces that go from one to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from regraft.equation.lower import Copy
from regraft.equation.notation import Equation, Term
from regraft.explaining.explanation import End, Explanation, Piece
from regraft.layouts.graph import Edge
from regraft.names.keys import Group, Ints
from regraft.names.patterns import patterns
from regraft.planning.plan import Entry, Headers, Plan, walk
from regraft.rules.book import Rule
from regraft.rules.indices import given_names, reading_of
from regraft.rules.templates import Match, Specificity, match_group


@dataclass(frozen=True, slots=True)
class Claim:
    """A term of a rule that a key matches, and how closely."""

    edge: Edge
    rule: Rule
    term: Term
    match: Match
    rank: Specificity


def values_of(term: Term, match: Match) -> dict[str, int | str]:
    """What the holes of a template stand for in the only row of a match."""
    assert term.key is not None
    values: dict[str, int | str] = {}
    at = 0
    for name, text in zip(term.key.rests, match.rests, strict=True):
        marks = text.count("\0")
        numbers = match.rest_numbers[0][at : at + marks].tolist()
        parts = text.split("\0")
        values["*" + name] = parts[0] + "".join(
            f"{n}{part}" for n, part in zip(numbers, parts[1:], strict=True)
        )
        at += marks
    for hole, index in zip(term.key.holes, match.holes[0].tolist(), strict=True):
        values[str(hole)] = index
    return values


def family_of(best: Claim, headers: Headers, read: Sequence[Term]) -> list[Group]:
    """The keys that a rule takes together with one: the same loops, any stacked index."""
    equation = best.rule.equation
    mine = _loop_values(equation, best.term, best.match)[0]
    groups = []
    for group in headers.groups:
        rows: set[int] = set()
        for term in read:
            match = match_group(term.key, group) if term.key is not None else None
            if match is None or match.rests != best.match.rests:
                continue
            values = _loop_values(equation, term, match)
            rows.update(match.rows[(values == mine).all(axis=1)].tolist())
        if rows:
            groups.append(group.take(np.array(sorted(rows))))
    return groups


def _loop_values(equation: Equation, term: Term, match: Match) -> Ints:
    assert term.key is not None
    given = dict.fromkeys(given_names(equation, term.key), 0)
    found, _ = reading_of(equation, term.key).read(match.holes, given)
    return np.concatenate([match.rest_numbers, found.loops], axis=1)


def locate(plan: Plan, base: str | None) -> tuple[Entry, int] | None:
    """The entry that reads a key, and which of its loop values."""
    for entry in plan.entries:
        for term in entry.read:
            names = entry.keys(term).names()
            if base in names:
                return entry, names.index(base) // max(1, len(names) // len(entry))
    return None


def unsized(best: Claim, *, reading: bool) -> Iterator[End]:
    """The terms of a rule where sizes are not known: holes stay holes, except those that are."""
    values = values_of(best.term, best.match)
    loops = best.rule.equation.loops
    sides, kinds = best.edge.sides(best.rule), best.rule.kinds(best.edge.direction)
    for term, kind in zip(sides[not reading], kinds[not reading], strict=True):
        key = str(term.key)
        for name, value in values.items():
            if name in loops or name.startswith("*") or term is best.term:
                text = str(value)
                key = key.replace("{" + name + "}" + ("." if not text else ""), text)
        yield End((key,), 0, 0, None, kind, str(term), term is best.term)


def with_entry(
    made: Explanation, plan: Plan, entry: Entry, row: int, key: str | None
) -> Explanation:
    """Sources, targets and pieces of one loop value of an entry."""
    loops = entry.rule.equation.loops
    sizes = {name: size for name, size in entry.sizes.items() if name not in loops}
    sources: list[End] = []
    targets: list[End] = []
    names: list[list[list[str]]] = [[], []]
    for reading, terms, kinds in (
        (True, entry.read, entry.read_kinds),
        (False, entry.written, entry.written_kinds),
    ):
        for number, (term, kind) in enumerate(zip(terms, kinds, strict=True)):
            whole = entry.keys(term).names()
            each = len(whole) // len(entry)
            mine = whole[row * each : (row + 1) * each]
            names[not reading].append(mine)
            absent = int((entry.sources[number][row] < 0).sum()) if reading else 0
            end = End(
                tuple(pattern for pattern, _ in patterns(mine)),
                each,
                absent,
                entry.shape(term),
                kind,
                str(term),
                key in mine,
            )
            (sources if reading else targets).append(end)
    pieces = [
        piece
        for copy in entry.copies
        for piece in _pieces(entry, copy, names)
        if key in (piece.source, piece.target)
    ]
    return replace(
        made,
        sizes=sizes,
        sources=tuple(sources),
        targets=tuple(targets),
        pieces=tuple(pieces),
    )


def _pieces(entry: Entry, copy: Copy, names: list[list[list[str]]]) -> Iterator[Piece]:
    """Every pair of tensors that a copy joins, and the block in each."""
    outer = [axis for axis in copy.axes if axis.source.in_key or axis.target.in_key]
    from_slots, from_dims = walk(entry, copy, outer, entry.read, target=False)
    to_slots, to_dims = walk(entry, copy, outer, entry.written, target=True)
    read, written = entry.read[copy.source], entry.written[copy.target]
    for point in range(len(from_slots)):
        yield Piece(
            names[0][copy.source][int(from_slots[point])],
            _place(
                entry, copy, read, copy.source_start, from_dims[:, point].tolist(), target=False
            ),
            names[1][copy.target][int(to_slots[point])],
            _place(
                entry, copy, written, copy.target_start, to_dims[:, point].tolist(), target=True
            ),
        )


def _place(
    entry: Entry,
    copy: Copy,
    term: Term,
    starts: Sequence[int],
    moved: Sequence[int],
    *,
    target: bool,
) -> tuple[str, ...]:
    """A block in one tensor, dim by dim, as a slice is written."""
    shape = entry.shapes[term]
    result = []
    for dim, (start, offset, size) in enumerate(zip(starts, moved, shape, strict=True)):
        first = start + offset
        inner: list[tuple[int, int]] = []
        for axis in copy.axes:
            place = axis.target if target else axis.source
            other = axis.source if target else axis.target
            if not place.in_key and not other.in_key and place.index == dim and axis.size > 1:
                inner.append((place.step, axis.size))
        inner.sort()
        step, span = (inner[0][0], 1) if inner else (1, 1)
        regular = True
        for stride, count in inner:
            regular &= stride == step * span
            span *= count
        if not regular:
            result.append(f"{first}:… in {span} blocks")
        elif span == size and first == 0:
            result.append(":")
        elif not inner:
            result.append(str(first) if size > 1 else ":")
        elif step == 1:
            result.append(f"{first}:{first + span}")
        else:
            result.append(f"{first}:{first + span * step}:{step}")
    return tuple(result)
