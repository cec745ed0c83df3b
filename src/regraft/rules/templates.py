"""Matching key templates against the templates of a key table, and writing keys from them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache, reduce
from itertools import product
from operator import and_
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from regraft.equation.notation import Equation, Hole, Key, Segments, Term
from regraft.names.keys import MARK, Group, Ints
from regraft.rules.indices import Givens, Indices, Reading, given_names
from regraft.values import replace

_DIGITS = re.compile(r"(?<![0-9])(?:0|[1-9][0-9]*)(?![0-9])")


class Match(Struct, frozen=True, eq=False, dict=True):
    """The rows of a group that a key template matches.

    Most who ask want to know no more than that, so numbers are only taken apart when they are asked for.
    """

    rows: npt.NDArray[np.intp]
    """Which rows of the group."""
    rests: tuple[str, ...]
    """What each ``{*p}`` holds, as a template with marks, in the order of the key."""
    numbers: Ints
    """(rows, marks): those of the whole names."""
    rest_columns: list[int]
    hole_columns: list[int]

    @cached_property
    def rest_numbers(self) -> Ints:
        """(rows, marks in all rests)."""
        return self.numbers[:, self.rest_columns]

    @cached_property
    def holes(self) -> Ints:
        """(rows, holes): the index in each hole."""
        return self.numbers[:, self.hole_columns]

    def indices(self, reading: Reading, givens: Givens) -> tuple[Indices, npt.NDArray[np.bool_]]:
        """What the numbers say, those in rests before the loops, and which rows say anything; see `Reading.read`."""
        found, fits = reading.read(self.holes, givens)
        loops = np.concatenate([self.rest_numbers, found.loops], axis=1)
        return Indices(loops, found.stacked), fits

    def take(self, rows: npt.NDArray[Any]) -> Match:
        """Some of the rows."""
        return replace(self, rows=self.rows[rows], numbers=self.numbers[rows])


class _Compiled(Struct, frozen=True, dict=True):
    expression: str
    kinds: tuple[str, ...]
    """What each capture group is: ``hole``, ``rest``, or the digits of a literal number."""
    head: str
    """What every name begins with that matches: it is faster to look at than the pattern."""
    tail: str
    """What every name ends with that matches."""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The expression, compiled when a name has head and tail, as few do."""
        return re.compile(self.expression, re.DOTALL)

    def match(self, template: str) -> re.Match[str] | None:
        """How the letters of a name fit; ``None`` where they don't."""
        if template.startswith(self.head) and template.endswith(self.tail):
            return self.pattern.fullmatch(template)
        return None


@lru_cache(maxsize=4096)
def _compile(key: Key, lengths: tuple[int, ...] = ()) -> _Compiled:
    """The pattern of a key; ``lengths`` are the segments that its first rests hold, the others hold any number."""
    pieces: list[str] = []
    kinds: list[str] = []
    dot_taken = False
    leading = True
    for position, part in enumerate(key.parts):
        if isinstance(part, Hole):
            pieces.append(f"({MARK})")
            kinds.append("hole")
            leading = False
        elif isinstance(part, Segments):
            number = kinds.count("rest")
            held, often = _held(lengths[number]) if number < len(lengths) else (".+", "?")
            if not leading:
                pieces[-1] = pieces[-1].removesuffix(r"\.")
                pieces.append(rf"(?:\.({held})){often}")
            elif position == len(key.parts) - 1:
                pieces.append(f"({held})")
            else:
                pieces.append(rf"(?:({held})\.){often}")
                dot_taken = True
            kinds.append("rest")
        else:
            text = part
            if dot_taken:
                text, dot_taken = text[1:], False
            leading = leading and not text
            at = 0
            for match in _DIGITS.finditer(text):
                pieces.append(re.escape(text[at : match.start()]) + f"({MARK})")
                kinds.append(match[0])
                at = match.end()
            pieces.append(re.escape(text[at:]))
    first = key.parts[0] if key.parts and isinstance(key.parts[0], str) else ""
    if len(key.parts) > 1 and isinstance(key.parts[1], Segments):
        first = first.removesuffix(".")  # a rest may hold nothing
    last = key.parts[-1] if key.parts and isinstance(key.parts[-1], str) else ""
    if len(key.parts) > 1 and isinstance(key.parts[-2], Segments):
        last = last.removeprefix(".")
    return _Compiled(
        "".join(pieces), tuple(kinds), _DIGITS.sub(MARK, first), _DIGITS.sub(MARK, last)
    )


def _held(segments: int) -> tuple[str, str]:
    """What a rest of so many segments holds, and how often it and its dot are there."""
    return rf"(?:[^.]+\.){{{max(segments - 1, 0)}}}[^.]+", "{1}" if segments else "{0}"


_MOST_SEGMENTS = 64
"""In the name of a tensor that a template with more than one rest is tried on; no module is nested as deep."""


def _lengths(key: Key, template: str) -> Iterator[tuple[int, ...]]:
    """The ways to share a name's segments among the rests of a key, but for the last one, which takes what is left."""
    rests = len(key.rests)
    most = template.count(".") + 1
    if most <= _MOST_SEGMENTS:
        segments = range(most, -1, -1)
        yield from (each for each in product(segments, repeat=rests - 1) if sum(each) <= most)


Specificity = tuple[int, int, int, int]


def specificity(term: Term, equation: Equation) -> Specificity:
    """How closely a term describes a tensor; where two match, the closer one wins.

    Numbers spelled out count most (not every digit is an index), and indices that have one value like them; then
    indices that begin somewhere, then dims, then letters.
    """
    assert term.key is not None
    texts = [part for part in term.key.parts if isinstance(part, str)]
    digits = sum(len(_DIGITS.findall(text)) for text in texts)
    digits += len(given_names(equation, term.key))
    return digits, len(equation.begins), len(term.dims) - term.ends_open, sum(map(len, texts))


class _Fit(Struct, frozen=True):
    """How the letters of a key fit those of a template: where its parts are, whatever the numbers are."""

    rests: tuple[str, ...]
    rest_columns: list[int]
    hole_columns: list[int]
    fixed: tuple[tuple[int, int], ...]
    """Columns of numbers that the key spells out, with the number."""

    @staticmethod
    def of(compiled: _Compiled, template: str) -> _Fit | None:
        """``None`` where they don't fit."""
        found = compiled.match(template)
        if found is None:
            return None
        hole_columns: list[int] = []
        rests: list[str] = []
        rest_columns: list[int] = []
        fixed: list[tuple[int, int]] = []
        for number, kind in enumerate(compiled.kinds, 1):
            start = found.start(number)
            column = template.count(MARK, 0, start) if start >= 0 else 0
            if kind == "hole":
                hole_columns.append(column)
            elif kind == "rest":
                text = found[number] or ""
                rests.append(text)
                rest_columns.extend(range(column, column + text.count(MARK)))
            else:
                fixed.append((column, int(kind)))
        return _Fit(tuple(rests), rest_columns, hole_columns, tuple(fixed))

    def match(self, group: Group) -> Match | None:
        """The rows of a group of this template whose numbers are those that the key spells out."""
        if not self.fixed:
            rows = np.arange(len(group.ids))
            numbers = group.numbers
        else:
            masks = (group.numbers[:, column] == number for column, number in self.fixed)
            rows = reduce(and_, masks).nonzero()[0]
            numbers = group.numbers[rows]
        if not len(rows):
            return None
        return Match(rows, self.rests, numbers, self.rest_columns, self.hole_columns)


def match_group(key: Key, group: Group) -> Match | None:
    """Match a key template against a group; ``None`` where no row matches.

    A key with several ``{*p}`` may match in several ways; the first one counts in which the numbers that it spells
    out are those of any row.

    >>> from regraft.equation.notation import parse_key
    >>> from regraft.names.keys import table
    >>> (group,) = table("model.layers.0.w1", "model.layers.1.w1", "model.layers.1.w2")
    >>> match = match_group(parse_key("{*p}.layers.{l}.w1"), group)
    >>> match.rests, match.rows.tolist(), match.holes.ravel().tolist()
    (('model',), [0, 1], [0, 1])
    """
    fit = _Fit.of(_compile(key), group.template)
    return None if fit is None else _match(key, fit, group)


def _match(key: Key, fit: _Fit, group: Group) -> Match | None:
    """The match of a key whose letters fit; with several rests, other ways to share the segments are tried, too."""
    match = fit.match(group)
    if match is not None or len(fit.rests) < 2:
        return match
    for lengths in _lengths(key, group.template):
        shared = _Fit.of(_compile(key, lengths), group.template)
        match = None if shared is None else shared.match(group)
        if match is not None:
            return match
    return None


_Value = TypeVar("_Value")
_Found = tuple[Key, _Fit, _Value]
_MOST_ENDINGS = 4096
"""Endings, and templates, that are remembered: many thousands of keys have a few dozen."""


class KeyTable(Generic[_Value]):
    """Values by key templates; those whose template matches a group are found without trying all.

    >>> from regraft.equation.notation import parse_key
    >>> from regraft.names.keys import table
    >>> known = KeyTable([(parse_key("{*p}.a.{l}.w"), "first"), (parse_key("a.{l}.v"), "second")])
    >>> [value for value, _ in known.matching(table("a.0.v", "a.1.v")[0])]
    ['second']
    """

    def __init__(self, values: Iterable[tuple[Key, _Value]]) -> None:
        self._all = [(key, _compile(key), value) for key, value in values]
        self._ending: dict[str, list[tuple[Key, _Compiled, _Value]]] = {}
        self._found: dict[str, list[_Found[_Value]]] = {}

    def matching(self, group: Group) -> Iterator[tuple[_Value, Match]]:
        """The values whose templates match a group, in their order, each with its match."""
        found = self._found.get(group.template)
        if found is None:
            found = self._look_up(group.template)
            if len(self._found) < _MOST_ENDINGS:
                self._found[group.template] = found
        for key, fit, value in found:
            match = _match(key, fit, group)
            if match is not None:
                yield value, match

    def _look_up(self, template: str) -> list[_Found[_Value]]:
        """The values that a template's letters fit, whatever its numbers are."""
        last = template.rfind(".")
        ending = template[template.rfind(".", 0, max(last, 0)) + 1 :]
        near = self._ending.get(ending)
        if near is None:
            near = [
                each
                for each in self._all
                if each[1].tail.endswith(ending) or ending.endswith(each[1].tail)
            ]
            if len(self._ending) < _MOST_ENDINGS:
                self._ending[ending] = near
        return [
            (key, fit, value)
            for key, compiled, value in near
            if (fit := _Fit.of(compiled, template)) is not None
        ]

    def __iter__(self) -> Iterator[_Value]:
        return (value for _, _, value in self._all)

    def matches(self, group: Group) -> bool:
        """Whether one of the templates matches a group."""
        return any(True for _ in self.matching(group))


def write_group(
    key: Key, rests: Sequence[str], rest_numbers: Ints, holes: Ints, ids: Ints | None = None
) -> Group:
    """The keys that a template gives for rests and hole indices, one row each; the inverse of a match."""
    template: list[str] = []
    columns: list[Ints | int] = []
    hole = rest = rest_column = 0
    for part in key.parts:
        if isinstance(part, Hole):
            template.append(MARK)
            columns.append(holes[:, hole])
            hole += 1
        elif isinstance(part, Segments):
            text = rests[rest]
            rest += 1
            marks = text.count(MARK)
            columns.extend(rest_numbers[:, rest_column + i] for i in range(marks))
            rest_column += marks
            if text:
                template.append(text)
            elif template:
                template[-1] = template[-1].removesuffix(".")
            else:
                template.append("")
        else:
            text = part
            if template and not any(template):
                text = text.removeprefix(".")
            columns.extend(int(m[0]) for m in _DIGITS.finditer(text))
            template.append(_DIGITS.sub(MARK, text))
    count = len(holes)
    numbers = np.empty((count, len(columns)), dtype=np.int64)
    for position, column in enumerate(columns):
        numbers[:, position] = column
    return Group("".join(template), np.arange(count) if ids is None else ids, numbers)
