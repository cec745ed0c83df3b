"""What two key templates have in common: a key that both match, and whether one matches all that the other does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from regraft.equation.notation import Affine, Hole, Key, Term

_NUMBER = re.compile(r"((?:0|[1-9][0-9]*)(?![0-9]))")


@dataclass(frozen=True, slots=True)
class Turn:
    """Every so many-th number, from one on: ``{3 l + 2}``."""

    step: int
    first: int

    def has(self, number: int) -> bool:
        """Whether it is one of them."""
        return number >= self.first and (number - self.first) % self.step == 0

    def common(self, other: Turn) -> int | None:
        """The smallest number of both."""
        first, second = sorted((self, other), key=lambda turn: turn.first)
        within = range(second.first, second.first + first.step * second.step, second.step)
        return next(filter(first.has, within), None)


Token = str | int | None
"""Letters, a number, or ``None`` for any number."""
Segment = tuple[Token, ...] | None
"""What stands between two dots; ``None`` for any number of segments."""
_Token = Token | Turn
_Segment = tuple[_Token, ...] | None


def segments_of(key: Key) -> tuple[Segment, ...]:
    """A template between its dots.

    >>> from regraft.equation.notation import parse_key
    >>> segments_of(parse_key("{*p}.l.{e}.w1"))
    (None, ('l',), (None,), ('w', 1))
    """
    return tuple(
        None
        if segment is None
        else tuple(None if isinstance(token, Turn) else token for token in segment)
        for segment in _segments_of(key)
    )


@lru_cache(maxsize=4096)
def _segments_of(key: Key) -> tuple[_Segment, ...]:
    """The same, with what is known of computed numbers."""
    segments: list[_Segment] = []
    open_one: list[_Token] | None = []
    for part in key.parts:
        if isinstance(part, Hole):
            assert open_one is not None
            open_one.append(_turn(part))
        elif isinstance(part, str):
            for number, text in enumerate(part.split(".")):
                if number:
                    if open_one is not None:
                        segments.append(tuple(open_one))
                    open_one = []
                if open_one is not None:
                    open_one += tokens_of(text)
        else:
            segments.append(None)
            open_one = None
    if open_one is not None:
        segments.append(tuple(open_one))
    return tuple(segments)


def _turn(hole: Hole) -> Turn | None:
    """What is known of a hole's numbers: nothing of an axis alone, or of several."""
    match hole.expr:
        case Affine(((step, _),), first) if step > 0 and first >= 0:
            return Turn(step, first)
    return None


def tokens_of(text: str) -> list[Token]:
    """Letters and numbers of a segment.

    >>> tokens_of("w12_b")
    ['w', 12, '_b']
    """
    return [
        int(piece) if _NUMBER.fullmatch(piece) else piece for piece in _NUMBER.split(text) if piece
    ]


def write_segment(segment: Segment, hole: str = "{}") -> str:
    """A segment as text, any number as ``hole``."""
    if segment is None:
        return "{*}"
    return "".join(hole if token is None else str(token) for token in segment)


def meet(one: Key, other: Key) -> str | None:
    """A key that both templates match, with 0 for every index; ``None`` where there is none.

    A ``{*p}`` of one may hold what the other spells out, but not each of them what the other does: every template
    that begins with one and every template that ends with one would meet otherwise. And something must be spelled
    out by both.

    >>> from regraft.equation.notation import parse_key
    >>> meet(parse_key("{*p}.l.{e}.w"), parse_key("{*p}.l.3.w")), meet(parse_key("{*p}.l.w"), parse_key("{*p}.n.{*q}"))
    ('l.3.w', None)
    >>> meet(parse_key("l.{2 e}"), parse_key("l.{2 e + 1}")), meet(parse_key("l.{2 e}"), parse_key("l.{3 e + 1}"))
    (None, 'l.4')
    """
    left, right = _segments_of(one), _segments_of(other)
    seen: set[tuple[int, int, bool, int]] = set()

    def walk(i: int, j: int, *, common: bool, holder: int) -> list[str] | None:
        """``holder`` is 1 where the left one holds something of the right, -1 the other way round, 0 so far not."""
        if (i, j, common, holder) in seen:
            return None
        seen.add((i, j, common, holder))
        if i == len(left) and j == len(right):
            return [] if common else None
        a = left[i] if i < len(left) else ()
        b = right[j] if j < len(right) else ()
        if a is not None and b is not None:
            both = _unify(a, b)
            rest = (
                walk(i + 1, j + 1, common=True, holder=holder)
                if both is not None and a and b
                else None
            )
            return None if both is None or rest is None else [both, *rest]
        if a is None:
            found = walk(i + 1, j, common=common, holder=holder)
            if found is None and b is not None and b != () and holder >= 0:
                rest = walk(i, j + 1, common=common, holder=1)
                found = None if rest is None else [_least(b), *rest]
            if found is not None or b is not None:
                return found
        found = walk(i, j + 1, common=common, holder=holder)
        if found is None and a is not None and a != () and holder <= 0:
            rest = walk(i + 1, j, common=common, holder=-1)
            found = None if rest is None else [_least(a), *rest]
        return found

    found = walk(0, 0, common=False, holder=0)
    return None if found is None else ".".join(found)


def _least(segment: Sequence[_Token]) -> str:
    """The first that a segment holds."""
    return "".join("0" if token is None else str(_first(token)) for token in segment)


def _first(token: str | int | Turn) -> str | int:
    return token.first if isinstance(token, Turn) else token


def _unify(a: Sequence[_Token], b: Sequence[_Token]) -> str | None:
    if len(a) != len(b):
        return None
    found = [_both(one, other) for one, other in zip(a, b, strict=True)]
    return None if None in found else "".join(map(str, found))


def _both(one: _Token, other: _Token) -> str | int | None:
    """A number, or the letters, that two tokens have in common."""
    if isinstance(one, str) or isinstance(other, str):
        return one if one == other and isinstance(one, str) else None
    if one is None or other is None:
        rest = other if one is None else one
        return rest.first if isinstance(rest, Turn) else rest or 0
    if isinstance(one, Turn):
        if isinstance(other, Turn):
            return one.common(other)
        return other if one.has(other) else None
    if isinstance(other, Turn):
        return one if other.has(one) else None
    return one if one == other else None


def _holds(one: _Token, other: _Token) -> bool:
    """Whether all that the second token stands for is of the first, too."""
    if one is None or isinstance(one, str) or isinstance(other, str) or other is None:
        return one == other or (one is None and not isinstance(other, str))
    if isinstance(one, Turn):
        if isinstance(other, Turn):
            return one.has(other.first) and other.step % one.step == 0
        return one.has(other)
    return one == other


def covers(general: Key, special: Key) -> bool:
    """Whether every key that the second template matches is one that the first does, too.

    >>> from regraft.equation.notation import parse_key
    >>> covers(parse_key("{*p}.l.{*q}"), parse_key("{*p}.l.{e}.w")), covers(parse_key("l.3"), parse_key("l.{e}"))
    (True, False)
    >>> covers(parse_key("l.{e}"), parse_key("l.{2 e}")), covers(parse_key("l.{2 e}"), parse_key("l.{4 e + 1}"))
    (True, False)
    """
    left, right = _segments_of(general), _segments_of(special)

    def walk(i: int, j: int) -> bool:
        if i == len(left):
            return j == len(right)
        a = left[i]
        if a is None:
            return walk(i + 1, j) or (j < len(right) and walk(i, j + 1))
        b = right[j] if j < len(right) else None
        if b is None or len(a) != len(b):
            return False
        fits = all(map(_holds, a, b))
        return fits and walk(i + 1, j + 1)

    return walk(0, 0)


def dims_meet(one: Term, other: Term) -> bool:
    """Whether a tensor can have the number of dims of both terms."""
    a, b = len(one.dims) - one.ends_open, len(other.dims) - other.ends_open
    if one.ends_open and other.ends_open:
        return True
    if one.ends_open:
        return b >= a
    return a >= b if other.ends_open else a == b
