"""A function of the positions in one dim, taken apart into as few nests of axes as there can be.

Between neighbours, here and there, are steps. Where steps repeat with some period, their positions are an axis: so many
times the same, one after the other. What repeats is taken apart in the same way. All ways of cutting the positions into
repetitions and single ones are compared, because where one piece ends and the next begins, the step between
them may be that of either piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from regraft.names.keys import Ints

Axis = tuple[int, int, int, int]
"""Size, step here, dim there (-1 for none), step there."""


class NoOrderError(ValueError):
    """Positions that follow no rule."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Positions of one dim in arithmetic order: where they begin, and axes with steps on both sides."""

    start: int
    moved: Ints
    """Where it begins on the other side."""
    axes: tuple[Axis, ...]
    """The outermost first."""


def pieces_of(positions: Ints, moved: Ints) -> list[Piece]:
    """A function of positions in one dim as few pieces, each a nest of axes.

    ``positions`` ascend (n); ``moved`` are coordinates on the other side (n, dims).

    >>> pieces = pieces_of(np.arange(6), np.array([0, 3, 1, 4, 2, 5])[:, None])
    >>> [piece.axes for piece in pieces]
    [((3, 2, 0, 1), (2, 1, 0, 3))]

    Raises ``NoOrderError``.
    """
    cut = _Cuts(positions.astype(np.int64), moved.astype(np.int64))
    found = list(cut.pieces(0, len(positions)))
    told = sum(1 + len(piece.axes) for piece in found)
    if len(found) > _FEW and told > _SHARE * len(positions):
        raise NoOrderError
    return found


_FEW = 6
"""So many pieces are an order, whatever they are made of."""
_SHARE = 0.6
"""Of more pieces, the numbers that tell them must be fewer than this share of the positions."""
_FEW_REPEATED = 3
_STEPS = 4_000_000
"""Comparisons after which positions are taken to follow no rule."""
_SLACK = 3
"""By how many times less one the longest repetition may be shortened for the sake of what is beside it."""

_Cost = tuple[int, int, int]
"""Pieces, axes, and pieces that are a single position: fewer are better."""


@dataclass(slots=True)
class _Cuts:
    """The best cuts of every interval that is looked at."""

    starts: Ints
    values: Ints
    ending: list[list[tuple[int, int]]] = field(default_factory=list)
    """For every position the repetitions that may end before it: where they begin at the earliest, and their period."""
    known: dict[tuple[int, int], tuple[_Cost, list[tuple[int, int]]]] = field(default_factory=dict)
    """For an interval, its cost and its parts: where each ends, and its period (0 for a single position)."""
    steps: int = 0

    def __post_init__(self) -> None:
        self.ending = [[] for _ in range(len(self.starts) + 1)]
        for first, last, period in _repetitions(self.starts, self.values):
            for end in range(first + 2 * period, last + 1):
                self.ending[end].append((first, period))
        for each in self.ending:
            each.sort()

    def best(self, low: int, high: int) -> _Cost:
        """How few pieces an interval is."""
        if high - low == 1:
            return 1, 0, 1
        if (low, high) not in self.known:
            self.known[low, high] = self._whole(low, high) or self._cut(low, high)
        return self.known[low, high][0]

    def _whole(self, low: int, high: int) -> tuple[_Cost, list[tuple[int, int]]] | None:
        """One repetition of few pieces: nothing is better, or little."""
        for first, period in self.ending[high]:
            if first <= low and (high - low) % period == 0 and high - low > period:
                pieces, axes, _ = self.best(low, low + period)
                if pieces <= _FEW_REPEATED:
                    return (pieces, axes + 1, 0), [(high, period)]
        return None

    def _cut(self, low: int, high: int) -> tuple[_Cost, list[tuple[int, int]]]:
        costs: list[_Cost] = [(0, 0, 0)]
        parts: list[tuple[int, int]] = []
        for end in range(low + 1, high + 1):
            pieces, axes, single = costs[-1]
            cost, part = (pieces + 1, axes, single + 1), (end - 1, 0)
            for first, period in self.ending[end]:
                longest = (end - max(first, low)) // period
                for times in range(longest, max(1, longest - _SLACK), -1):
                    self._count()
                    begin = end - times * period
                    before = costs[begin - low]
                    if (before[0] + 1, before[1] + 1, before[2]) >= cost:
                        continue
                    inner = self.best(begin, begin + period)
                    found = before[0] + inner[0], before[1] + inner[1] + 1, before[2]
                    if found < cost:
                        cost, part = found, (begin, period)
            costs.append(cost)
            parts.append(part)
        chosen: list[tuple[int, int]] = []
        end = high
        while end > low:
            begin, period = parts[end - low - 1]
            chosen.append((end, period))
            end = begin
        return costs[-1], chosen[::-1]

    def _count(self) -> None:
        self.steps += 1
        if self.steps > _STEPS:
            raise NoOrderError

    def pieces(self, low: int, high: int) -> Iterator[Piece]:
        """The pieces of an interval."""
        if high - low == 1:
            yield Piece(int(self.starts[low]), self.values[low], ())
            return
        self.best(low, high)
        for end, period in self.known[low, high][1]:
            if not period:
                yield from self.pieces(low, low + 1)
            else:
                step = int(self.starts[low + period] - self.starts[low])
                change = self.values[low + period] - self.values[low]
                axis = ((end - low) // period, step, *_along(change))
                for piece in self.pieces(low, low + period):
                    yield Piece(piece.start, piece.moved, (axis, *piece.axes))
            low = end


def _along(change: Ints) -> tuple[int, int]:
    """The one dim in which something moves, and how far; -1 where it stays."""
    dims = np.flatnonzero(change)
    return (int(dims[0]), int(change[dims[0]])) if len(dims) else (-1, 0)


def _repetitions(starts: Ints, values: Ints) -> Iterator[tuple[int, int, int]]:
    """Longest intervals in which steps repeat at least twice: the first position, the one after the last, the period.

    Each is told with its shortest period only. From one time to the next it moves in one dim at most, and never back.
    """
    steps = np.concatenate([np.diff(starts)[:, None], np.diff(values, axis=0)], axis=1)
    _, numbers = np.unique(steps, axis=0, return_inverse=True)
    numbers = numbers.reshape(-1)
    seen: set[tuple[int, int]] = set()
    for period in range(1, len(starts) // 2 + 1):
        same = numbers[period:] == numbers[:-period]
        edges = np.flatnonzero(np.diff(np.concatenate([[0], same.astype(np.int8), [0]])))
        long = edges[1::2] - edges[::2] >= period - 1
        spans = list(zip(edges[::2][long].tolist(), edges[1::2][long].tolist(), strict=True))
        if period == 1:
            # Two neighbours repeat by themselves.
            covered = np.zeros(len(numbers) + 1, dtype=bool)
            for a, b in spans:
                covered[a : b + 1] = True
            spans += [(int(n), int(n)) for n in np.flatnonzero(~covered[: len(numbers)])]
        for a, b in spans:
            first, last = a, b + period + 1
            if (first, last) in seen:
                continue
            seen.add((first, last))
            change = values[first + period] - values[first]
            if np.count_nonzero(change) <= 1 and (change >= 0).all():
                yield first, last, period


__all__ = ["NoOrderError", "Piece", "pieces_of"]
