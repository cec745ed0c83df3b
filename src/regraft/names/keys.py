"""Key tables: many tensor names held as few templates and columns of numbers.

``model.layers.7.mlp.experts.12.w1.weight`` is the template ``model.layers.#.mlp.experts.#.w#.weight`` and the
numbers 7, 12, 1. A checkpoint of a hundred thousand tensors has a few dozen templates, so rules are matched
against templates, and everything that depends on numbers is done in columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from regraft.errors import BadInputError, Finding

MARK = "\0"
"""Stands for a number in a template."""

Ints = npt.NDArray[np.int64]

_NUMBER = re.compile(r"[0-9]+")


class Group(Struct, frozen=True, eq=False):
    """All names of one template. Row i is the name number ``ids[i]``, its numbers are ``numbers[i]``."""

    template: str
    ids: Ints
    numbers: Ints

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, row: int) -> str:
        """The name in a row.

        >>> table("a.3.b", "a.4.b")[0].name(1)
        'a.4.b'
        """
        return fill(self.template, self.numbers[row].tolist())

    def names(self) -> list[str]:
        """All names, row by row."""
        return fill_rows(self.template, self.numbers)

    def take(self, rows: Ints | npt.NDArray[np.bool_]) -> Group:
        """The same template with some of the rows."""
        return Group(self.template, self.ids[rows], self.numbers[rows])


def fill(template: str, numbers: Sequence[int]) -> str:
    """Put numbers into a template's marks, from left to right."""
    parts = template.split(MARK)
    return parts[0] + "".join(f"{n}{text}" for n, text in zip(numbers, parts[1:], strict=True))


def fill_rows(template: str, numbers: Ints) -> list[str]:
    """One name for each row of numbers."""
    if not len(numbers):
        return []
    pattern = template.replace("%", "%%").replace(MARK, "%d")
    if not numbers.shape[1]:
        return [pattern % ()] * len(numbers)
    return [pattern % row for row in zip(*numbers.T.tolist(), strict=True)]


def table(*names: str) -> list[Group]:
    """Group names by template; ``ids`` count the names from 0.

    >>> [group.template.replace(MARK, "#") for group in table("a.0.w1", "a.1.w3", "b")]
    ['a.#.w#', 'b']
    """
    return group_names(names)


def group_names(names: Iterable[str]) -> list[Group]:
    """Group names by template, in order of first appearance. A number written with leading zeros is text."""
    names = names if isinstance(names, (list, tuple)) else list(names)
    if not names:
        return []
    text = "\n".join(names)
    split = None if text.count("\n") != len(names) - 1 or MARK in text else _split(text)
    templates, numbers = _split_slowly(names) if split is None else split
    index = {template: code for code, template in enumerate(dict.fromkeys(templates))}
    codes = np.array([index[template] for template in templates], dtype=np.int64)
    widths = np.fromiter((t.count(MARK) for t in index), dtype=np.int64, count=len(index))
    starts = np.zeros(len(codes) + 1, dtype=np.int64)
    np.cumsum(widths[codes], out=starts[1:])
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(index) + 1))
    groups = []
    for number, template in enumerate(index):
        ids = order[bounds[number] : bounds[number + 1]]
        columns = starts[ids][:, None] + np.arange(widths[number])
        groups.append(Group(template, ids, numbers[columns]))
    return groups


def _split(text: str) -> tuple[list[str], Ints] | None:
    """Templates and numbers of lines; ``None`` where a number has leading zeros or is too long for an index."""
    letters = np.frombuffer(f"\n{text}\n".encode(), dtype=np.uint8)
    digit = (letters - ord("0")) < 10
    edges = np.flatnonzero(digit[1:] != digit[:-1]) + 1
    starts, ends = edges[::2], edges[1::2]
    if len(starts):
        lengths = ends - starts
        longest = int(lengths.max())
        if longest > 17 or ((lengths > 1) & (letters[starts] == ord("0"))).any():
            return None
        numbers = np.zeros(len(starts), dtype=np.int64)
        for place in range(longest):
            longer = lengths > place
            at = starts[longer] + place
            numbers[longer] = numbers[longer] * 10 + (letters[at] - ord("0"))
        marked = letters.copy()
        marked[starts] = ord(MARK)
        kept = marked.tobytes().translate(None, b"0123456789")
    else:
        numbers, kept = np.zeros(0, dtype=np.int64), letters.tobytes()
    return kept[1:-1].decode().split("\n"), numbers


def _split_slowly(names: Sequence[str]) -> tuple[list[str], Ints]:
    templates, numbers = [], []

    def mark(match: re.Match[str]) -> str:
        digits = match[0]
        if (len(digits) > 1 and digits[0] == "0") or len(digits) > 17:
            return digits
        numbers.append(int(digits))
        return MARK

    for name in names:
        if MARK in name:
            raise BadInputError(
                Finding(
                    "name",
                    "a tensor's name has a NUL character, which no tool writes",
                    key=name.replace(MARK, "\ufffd"),
                    fix="save the file again",
                )
            )
        templates.append(_NUMBER.sub(mark, name))
    return templates, np.array(numbers, dtype=np.int64)


def in_order(path: str) -> list[tuple[int, str]]:
    """What sorts paths as a model lists its layers: by number where they have one.

    >>> sorted(["l.10.q", "l.9.q"], key=in_order)
    ['l.9.q', 'l.10.q']
    """
    return [(int(p), "") if p.isdigit() else (-1, p) for p in path.split(".")]
