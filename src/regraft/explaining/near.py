"""What comes close to a name: templates that almost match, and names that are spelled alike."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches

from regraft.equation.notation import Key
from regraft.names.keys import MARK
from regraft.rules.meet import Segment, segments_of, tokens_of, write_segment

_NUMBER = re.compile(r"[0-9]+")


@dataclass(frozen=True, slots=True)
class Parting:
    """Where a key and a template part: the first segment that differs."""

    cost: float
    """0 where the template matches; about 1 for each segment that is wrong, missing or too many."""
    at: int
    """The number of the key's segment."""
    expected: str | None
    """What the template has there; ``None`` where the key has a segment too many."""
    found: str | None
    """What the key has there; ``None`` where a segment is missing."""
    agree: int
    """How many segments agree, those that a ``{*p}`` holds left out."""


def part_ways(key: str, template: Key) -> Parting:
    """Compare a key with a template, segment by segment, in the way that leaves the fewest differences.

    >>> from regraft.equation.notation import parse_key
    >>> part_ways("model.layers.0.mlp.w4", parse_key("{*p}.layers.{l}.mlp.w1"))
    Parting(cost=0.5, at=4, expected='w1', found='w4', agree=3)
    """
    words = key.split(".")
    segments = segments_of(template)
    shown = re.split(r"\.(?![^{]*\})", str(template))
    columns = len(segments) + 1
    # best[i][j]: the cost of what is left from the key's segment i and the template's segment j on.
    best = [[0.0] * columns for _ in range(len(words) + 1)]
    for i in range(len(words), -1, -1):
        for j in range(len(segments), -1, -1):
            if i == len(words) and j == len(segments):
                continue
            best[i][j] = min(cost for cost, *_ in _moves(words, segments, best, i, j))
    first: tuple[int, str | None, str | None] | None = None
    i = j = agree = 0
    while i < len(words) or j < len(segments):
        _, di, dj, step = min(_moves(words, segments, best, i, j), key=lambda move: move[0])
        if step and first is None:
            expected = shown[j] if dj and j < len(shown) else None
            first = i, expected, words[i] if di else None
        agree += bool(di and dj and not step)
        i, j = i + di, j + dj
    at, expected, found = first if first is not None else (len(words), None, None)
    return Parting(round(best[0][0], 3), at, expected, found, agree)


def _moves(
    words: list[str], segments: tuple[Segment, ...], best: list[list[float]], i: int, j: int
) -> list[tuple[float, int, int, float]]:
    """Ways to go on: total cost, steps in the key and in the template, and what this step costs."""
    moves: list[tuple[float, int, int, float]] = []
    segment = segments[j] if j < len(segments) else ()
    if j < len(segments) and segment is None:
        moves.append((best[i][j + 1], 0, 1, 0.0))
        if i < len(words):
            moves.append((best[i + 1][j], 1, 0, 0.0))
        return moves
    if i < len(words) and segment:
        cost = _differ(words[i], segment)
        moves.append((best[i + 1][j + 1] + cost, 1, 1, cost))
    if i < len(words):
        moves.append((best[i + 1][j] + 1, 1, 0, 1.0))
    if segment:
        moves.append((best[i][j + 1] + 1, 0, 1, 1.0))
    return moves


def _differ(word: str, segment: tuple[object, ...]) -> float:
    """0 where a segment matches, otherwise how much it differs, at least a quarter."""
    tokens = tokens_of(word)
    if len(tokens) == len(segment) and all(
        one == other or (other is None and isinstance(one, int))
        for one, other in zip(tokens, segment, strict=True)
    ):
        return 0.0
    if (None in segment) != word.isdigit() and len(segment) == 1:
        return 1.2
    written = write_segment(tuple(segment), "0")  # type: ignore[arg-type]
    return max(0.25, 1 - SequenceMatcher(None, word, written).ratio())


def closest(key: str, names: Iterable[str], count: int = 3) -> tuple[str, ...]:
    """The names that are spelled most like a key; indices count less than words.

    >>> closest("a.layers.1.mlp.gate", ["a.layers.0.mlp.gates", "a.layers.1.mlp.gates", "head"])
    ('a.layers.1.mlp.gates',)
    """
    numbers = _NUMBER.findall(key)
    by_template: dict[str, str] = {}
    alike: dict[str, int] = {}
    for name in names:
        template = _NUMBER.sub(MARK, name)
        same = sum(a == b for a, b in zip(numbers, _NUMBER.findall(name), strict=False))
        if same > alike.get(template, -1):
            by_template[template], alike[template] = name, same
    found = get_close_matches(_NUMBER.sub(MARK, key), by_template, count, 0.7)
    return tuple(by_template[template] for template in found)
