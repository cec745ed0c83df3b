"""Many keys at once: a template with a stand-in for each index is renamed in place of all its keys.

A stand-in is a number that no model has. Where the outcome for a real key is not what the stand-ins say (a pattern
spells a number out), that key is treated by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from msgspec import Struct

from regraft.names.keys import MARK, Group, Ints, group_names

_STAND_IN = re.compile(r"97(\d\d)79")
_INDEX = re.compile(rf"(?<![^.]){MARK}(?![^.])")

Judged = TypeVar("Judged")


def stand_in(column: int) -> str:
    """The stand-in for an index."""
    return f"97{column:02d}79"


class Rows(Struct, frozen=True, eq=False):
    """Keys that differ in whole-segment numbers only."""

    text: str
    """The template with stand-ins."""
    numbers: Ints
    """(keys, stand-ins)."""
    ids: Ints

    def names(self) -> Iterator[str]:
        """All keys."""
        yield from map(writer(self.text, self.numbers.shape[1]), self.numbers.tolist())

    def name(self, row: int) -> str:
        """One key."""
        return put(self.text, self.numbers[row].tolist())

    def take(self, rows: Sequence[int] | Ints) -> Rows:
        """Some of the keys."""
        return Rows(self.text, self.numbers[rows], self.ids[rows])

    def fix(self, column: int, value: int) -> Rows:
        """The keys that have a number in a column, with that number spelled out."""
        rows = np.flatnonzero(self.numbers[:, column] == value)
        return Rows(
            self.text.replace(stand_in(column), str(value)), self.numbers[rows], self.ids[rows]
        )


def rewrite(text: str, write: Callable[[int], str]) -> str:
    """Something else in place of each stand-in."""
    return _STAND_IN.sub(lambda m: write(int(m[1])), text)


def put(text: str, numbers: Sequence[int]) -> str:
    """Numbers in place of stand-ins; those for which there is none stay."""
    return writer(text, len(numbers))(numbers)


def writer(text: str, count: int) -> Callable[[Sequence[int]], str]:
    """What puts rows of so many numbers in place of a text's stand-ins, which is looked through once for all rows."""
    pieces = _STAND_IN.split(text)
    literals, columns = pieces[::2], [int(column) for column in pieces[1::2]]
    form = literals[0].replace("%", "%%")
    for literal, column in zip(literals[1:], columns, strict=True):
        form += ("%s" if column < count else stand_in(column)) + literal.replace("%", "%%")
    used = [column for column in columns if column < count]
    if used == list(range(count)):
        return lambda numbers: form % tuple(numbers)
    return lambda numbers: form % tuple([numbers[column] for column in used])


def columns_of(text: str) -> list[int]:
    """The stand-ins in a text, from left to right."""
    return [int(m[1]) for m in _STAND_IN.finditer(text)]


def holes(text: str, name: Callable[[int], str]) -> str:
    """A key in the notation."""
    return rewrite(text, lambda column: "{" + name(column) + "}")


def rows_of(keys: Iterable[str]) -> list[Rows]:
    """Keys as rows; a number inside a segment is part of the text."""
    return [rows for group in group_names(keys) for rows in _split_inner(group)]


def _split_inner(group: Group) -> Iterator[Rows]:
    marks = [m.start() for m in re.finditer(MARK, group.template)]
    whole = {m.start() for m in _INDEX.finditer(group.template)}
    inner = [n for n, at in enumerate(marks) if at not in whole]
    outer = [n for n, at in enumerate(marks) if at in whole]
    if inner:
        values, code = np.unique(group.numbers[:, inner], axis=0, return_inverse=True)
        code = code.reshape(-1)
    else:
        values, code = np.zeros((1, 0), dtype=np.int64), np.zeros(len(group.ids), dtype=np.int64)
    names = {number: place for place, number in enumerate(outer)}
    for number, spelled in enumerate(values.tolist()):
        rows = np.flatnonzero(code == number)
        given = iter(spelled)
        texts = [stand_in(names[n]) if n in names else str(next(given)) for n in range(len(marks))]
        parts = group.template.split(MARK)
        text = parts[0] + "".join(a + b for a, b in zip(texts, parts[1:], strict=True))
        yield Rows(text, group.numbers[rows][:, outer], group.ids[rows])


def outcomes(
    rows: Rows,
    judge: Callable[[str], Judged],
    place: Callable[[Judged, Sequence[int]], Judged],
    spelled: frozenset[int],
    *,
    each: bool,
) -> Iterator[tuple[Rows, Judged]]:
    """What a function makes of keys: few groups of keys, each with one outcome in terms of stand-ins.

    ``place`` puts numbers into an outcome; ``spelled`` are the numbers that the function may look at, ``each``
    whether it may look at all.
    """
    general = judge(rows.text)
    marks = rows.numbers
    if not each:
        marks = np.where(np.isin(marks, list(spelled)), marks, -1)
    _, first, sort = np.unique(marks, axis=0, return_index=True, return_inverse=True)
    usual = np.ones(len(first), dtype=bool)
    for number, row in enumerate(first.tolist()):
        numbers = rows.numbers[row].tolist()
        usual[number] = judge(put(rows.text, numbers)) == place(general, numbers)
    fine = usual[sort.reshape(-1)]
    if fine.any():
        yield (rows if fine.all() else rows.take(np.flatnonzero(fine))), general
    for row in np.flatnonzero(~fine).tolist():
        numbers = rows.numbers[row].tolist()
        text = put(rows.text, numbers)
        yield Rows(text, rows.numbers[[row]], rows.ids[[row]]), judge(text)


def divide(rows: Rows, sort: Callable[[Rows], Sequence[object]]) -> Iterator[Rows]:
    """Rows in parts that are each of one sort, with as few numbers spelled out as will do."""
    sorts = sort(rows)
    if len(set(sorts)) <= 1:
        yield rows
        return
    best: tuple[int, int] | None = None
    for column in columns_of(rows.text):
        by_value: dict[int, set[object]] = {}
        for value, what in zip(rows.numbers[:, column].tolist(), sorts, strict=True):
            by_value.setdefault(value, set()).add(what)
        mixed = sum(len(kinds) > 1 for kinds in by_value.values())
        score = (mixed * 100000 + len(by_value), column)
        best = score if best is None or score < best else best
    if best is None:
        yield rows
        return
    for value in np.unique(rows.numbers[:, best[1]]).tolist():
        yield from divide(rows.fix(best[1], value), sort)
