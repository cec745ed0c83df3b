"""Equations between tensors of single layers become few with loops: their numbers are functions of few indices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from regraft.equation.notation import parse_equation
from regraft.learning.assemble import Drafted, Written
from regraft.learning.relate import fill_holes, isolated
from regraft.names.keys import Ints, group_names
from regraft.rules.meet import dims_meet
from regraft.rules.templates import match_group

LAYER = "layer"
"""The axis that counts layers, in rules for some of them."""
_LOOPS = ("l", "e", "r", "l1", "e1", "r1", "l2", "e2", "r2")
_LARGEST = 16
"""Factors of computed numbers up to which one believes them."""


@dataclass(frozen=True, slots=True)
class Looped:
    """An equation for several layers, without clauses for sizes."""

    sides: str
    members: tuple[Drafted, ...]


@dataclass(frozen=True, slots=True)
class _Column:
    """A number in the names of one term, for every member."""

    side: int
    term: int
    place: int
    values: tuple[int, ...]
    alone: bool


def with_loops(drafts: Sequence[Drafted]) -> Iterator[Looped]:
    """Few equations that say all of the drafts."""
    groups: dict[object, list[Drafted]] = defaultdict(list)
    for each in drafts:
        sides = tuple(
            tuple((t.template, t.holes, t.dims) for t in side) for side in (each.left, each.right)
        )
        groups[sides, each.tags, each.copies, each.fills, each.ranges].append(each)
    found = [each for same in groups.values() for each in _loop(same)]
    found.sort(key=lambda each: -len(each.members))
    # Those that say of which layers they are come before the others, which are about the rest.
    yield from (each for each in found if is_told(each.members[0]))
    found = [each for each in found if not is_told(each.members[0])]
    for number, one in enumerate(found):
        if any(_collide(one, other) for other in found[:number]):
            # A layer that differs from the others: its numbers are spelled out, which is closer.
            yield from (Looped(_write(m, {}), (m,)) for m in one.members)
        else:
            yield one


def is_told(each: Drafted) -> bool:
    """Whether it says of which layers it is: by a clause, by a number, or by their turn."""
    holes = [hole for term in (*each.left, *each.right) for _, hole in term.holes]
    return bool(each.ranges) or any(hole.isdigit() or LAYER in hole.split() for hole in holes)


def _collide(one: Looped, other: Looped) -> bool:
    """Whether a rule speaks of tensors of another, by names and numbers of dims that are alike."""
    equations = parse_equation(one.sides), parse_equation(other.sides)
    if "{" not in one.sides:
        return False
    for side in (0, 1):
        names = {n for m in one.members for n in m.names[side]}
        for term in equations[1].sides()[side]:
            for mine in equations[0].sides()[side]:
                if term.key is None or mine.key is None or not dims_meet(term, mine):
                    continue
                for group in group_names(list(names)):
                    if match_group(term.key, group) is not None and match_group(mine.key, group):
                        return True
    return False


def _loop(members: Sequence[Drafted]) -> Iterator[Looped]:
    columns = list(_columns(members))
    texts = _fit(columns)
    if isinstance(texts, _Column):
        parts: dict[int, list[Drafted]] = defaultdict(list)
        for value, member in zip(texts.values, members, strict=True):
            parts[value].append(member)
        for part in parts.values():
            yield from _loop(part)
        return
    yield Looped(_write(members[0], texts), tuple(members))


def _write(first: Drafted, texts: Mapping[_Column, str]) -> str:
    """The two sides of an equation."""
    sides = []
    for side, terms in enumerate((first.left, first.right)):
        written = []
        for number, term in enumerate(terms):
            holes = dict(term.holes)
            for column, text in texts.items():
                if (column.side, column.term) == (side, number):
                    holes[column.place] = text
            written.append(f"{_key(term, holes)} : {term.dims}".rstrip())
        sides.append(written)
    return "\n".join(sides[0]) + "\n    == " + "\n       ".join(sides[1])


def _key(term: Written, holes: dict[int, str]) -> str:
    return fill_holes(term.template, term.numbers, holes)


def _columns(members: Sequence[Drafted]) -> Iterator[_Column]:
    first = members[0]
    for side, terms in enumerate((first.left, first.right)):
        for number, term in enumerate(terms):
            alone = isolated(term.template)
            stacked = {column for column, _ in term.holes}
            for place in range(len(term.numbers)):
                if place in stacked:
                    continue
                values = tuple((m.left, m.right)[side][number].numbers[place] for m in members)
                yield _Column(side, number, place, values, alone[place])


def _fit(columns: Sequence[_Column]) -> dict[_Column, str] | _Column:
    """How every number is written; a column by whose values the members are to be taken apart instead."""
    terms = {(c.side, c.term) for c in columns}
    varying = [c for c in columns if len(set(c.values)) > 1]
    if not varying:
        return _shared(columns)
    best: dict[_Column, str] | None = None
    for first in (0, 1):
        basis: list[_Column] = []
        ordered = sorted(varying, key=lambda c: (c.side != first, not c.alone, c.term, c.place))
        for column in ordered:
            if column.side == first and _as_number(column, basis) is None:
                basis.append(column)
        if len(basis) > len(_LOOPS):
            continue
        texts: dict[_Column, str] = {}
        used: dict[tuple[int, int], set[int]] = defaultdict(set)
        for column in varying:
            found = _as_number(column, basis)
            if found is None:
                break
            text, indices = found
            texts[column] = text
            used[column.side, column.term] |= indices
        else:
            whole = all(used[term] == set(range(len(basis))) for term in terms | set(used))
            if whole and (
                best is None or sum(map(len, texts.values())) < sum(map(len, best.values()))
            ):
                best = texts
    if best is not None:
        return best
    return min(varying, key=lambda c: (len(set(c.values)), not c.alone, c.side))


def _shared(columns: Sequence[_Column]) -> dict[_Column, str]:
    """Of a single layer: numbers that are segments and that every name has."""
    terms = {(c.side, c.term) for c in columns}
    texts: dict[_Column, str] = {}
    taken = 0
    for column in columns:
        if (column.side, column.term) != min(terms) or not column.alone:
            continue
        same = [
            next(
                (
                    c
                    for c in columns
                    if (c.side, c.term) == term
                    and c.values[:1] == column.values[:1]
                    and c.alone
                    and c not in texts
                ),
                None,
            )
            for term in sorted(terms)
        ]
        if all(same) and len(terms) > 1:
            for c in same:
                assert c is not None
                texts[c] = _LOOPS[taken]
            taken += 1
    return texts


def _as_number(column: _Column, basis: Sequence[_Column]) -> tuple[str, set[int]] | None:
    """A column as a number computed from the indices of a basis, and which it takes."""
    wanted = np.array(column.values, dtype=np.int64)
    known = [np.array(b.values, dtype=np.int64) for b in basis]
    for at, values in enumerate(known):
        if np.array_equal(values, wanted):
            return _LOOPS[at], {at}
    for at, values in enumerate(known):
        found = _affine([values], wanted)
        if found is not None:
            return _text([at], found), {at}
    for pair in combinations(range(len(known)), 2):
        found = _affine([known[i] for i in pair], wanted)
        if found is None:
            continue
        (a, b), _ = found
        small, large = (pair[0], pair[1]) if abs(a) < abs(b) else (pair[1], pair[0])
        factor, step = sorted(map(abs, (a, b)), reverse=True)
        digits = a * b > 0 and factor != step and factor % step == 0
        if digits and int(known[small].max()) < factor // step:
            factors = [b, a] if abs(a) < abs(b) else [a, b]
            return _text([large, small], (factors, found[1])), set(pair)
    return None


def _affine(known: Sequence[Ints], wanted: Ints) -> tuple[list[int], int] | None:
    """Whole factors and a constant that make one column of others."""
    table = np.stack([*known, np.ones(len(wanted), dtype=np.int64)], axis=1)
    if np.linalg.matrix_rank(table) < table.shape[1]:
        return None
    solved = np.rint(np.linalg.lstsq(table.astype(float), wanted.astype(float), rcond=None)[0])
    numbers = solved.astype(np.int64)
    if not np.array_equal(table @ numbers, wanted):
        return None
    *factors, constant = numbers.tolist()
    if not all(factors) or max(map(abs, factors)) > _LARGEST:
        return None
    return factors, constant


def _text(order: Sequence[int], found: tuple[list[int], int]) -> str:
    factors, constant = found
    text = ""
    for at, factor in zip(order, factors, strict=True):
        name = _LOOPS[at]
        shown = name if abs(factor) == 1 else f"{abs(factor)} {name}"
        text += f" {'-' if factor < 0 else '+'} {shown}"
    if text.startswith(" -"):
        return f"{constant}{text}"
    if constant:
        text += f" {'-' if constant < 0 else '+'} {abs(constant)}"
    return text.removeprefix(" + ")
