"""Many names in few words: ``model.layers.{0..31}.mlp.experts.{0..7}.w1``.

Only segments that are numbers become ranges; digits inside a segment (``w1``, ``fc2``) are part of
a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, product
from math import prod

from msgspec import Struct

_INDEX = re.compile(r"(?<![^.])(?:0|[1-9][0-9]*)(?![^.])")
_SHOWN = 8

Row = tuple[int, ...]


class Pattern(Struct, frozen=True):
    """Names that differ in numbers only, and have every choice of them."""

    texts: tuple[str, ...]
    """What stands around the numbers; one more than there are numbers."""
    columns: tuple[tuple[int, ...], ...]
    """The values that each number has, sorted."""

    def __len__(self) -> int:
        return prod(map(len, self.columns))

    def __iter__(self) -> Iterator[str]:
        for numbers in product(*self.columns):
            yield self._fill(map(str, numbers))

    def __str__(self) -> str:
        return self._fill(map(ranges, self.columns))

    def _fill(self, numbers: Iterable[str]) -> str:
        pairs = zip(numbers, self.texts[1:], strict=True)
        return self.texts[0] + "".join(number + text for number, text in pairs)


def group_alike(names: Iterable[str]) -> list[Pattern]:
    """Patterns that together stand for exactly these names.

    >>> (pattern,) = group_alike(["l.0.w1", "l.2.w1"])
    >>> str(pattern), len(pattern), list(pattern)
    ('l.{0,2}.w1', 2, ['l.0.w1', 'l.2.w1'])
    """
    templates: dict[tuple[str, ...], dict[Row, None]] = {}
    for name in names:
        numbers = tuple(map(int, _INDEX.findall(name)))
        templates.setdefault(tuple(_INDEX.split(name)), {})[numbers] = None
    return [
        Pattern(texts, tuple(map(tuple, columns)))
        for texts, rows in templates.items()
        for columns in _blocks(list(rows), len(texts) - 1)
    ]


def patterns(names: Iterable[str]) -> list[tuple[str, int]]:
    """The same in words, each with how many names it stands for.

    >>> patterns(["l.0.w1", "l.1.w1", "l.2.w1", "l.0.w2", "norm"])
    [('l.{0..2}.w1', 3), ('l.0.w2', 1), ('norm', 1)]
    >>> patterns([f"l.{l}.e.{e}" for l in range(3) for e in range(4) if l > 0 or e < 2])
    [('l.0.e.{0,1}', 2), ('l.{1,2}.e.{0..3}', 8)]
    """
    return [(str(pattern), len(pattern)) for pattern in group_alike(names)]


def _blocks(rows: list[Row], width: int) -> list[list[list[int]]]:
    """Rows as few products of column values: columns that are alike below are put together."""
    if not width:
        return [[]]
    below: dict[int, list[Row]] = {}
    for first, *rest in rows:
        below.setdefault(first, []).append(tuple(rest))
    alike: dict[tuple[Row, ...], list[int]] = {}
    for first, rests in below.items():
        alike.setdefault(tuple(sorted(rests)), []).append(first)
    return [
        [sorted(firsts), *block]
        for rests, firsts in alike.items()
        for block in _blocks(list(rests), width - 1)
    ]


def ranges(values: Sequence[int]) -> str:
    """Sorted numbers in the way a shell would write them; what is too irregular is cut short.

    >>> ranges([3]), ranges([0, 1, 2, 3]), ranges([0, 2, 4, 6]), ranges([0, 1, 2, 7])
    ('3', '{0..3}', '{0..6..2}', '{0..2,7}')
    """
    if len(values) == 1:
        return str(values[0])
    step = values[1] - values[0]
    if len(values) > 2 and all(b - a == step for a, b in pairwise(values)):
        return f"{{{values[0]}..{values[-1]}{f'..{step}' if step > 1 else ''}}}"
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    words = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    if len(words) > _SHOWN:
        words = [*words[: _SHOWN - 2], "…", words[-1]]
    return "{" + ",".join(words) + "}"
