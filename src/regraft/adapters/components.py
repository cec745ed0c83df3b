"""Whose components are whose: noted on a way there, asked on the way back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct, field

from regraft.adapters.scale import Number, Scale

_MOST = 1 << 20

Noted = tuple[str, int, int, Number, int | list[int]]


class Part(Struct, frozen=True):
    """A source's components in a target: the target's component ``places[i]`` is the source's i-th."""

    key: str
    source_batch: int
    target_batch: int
    places: tuple[int, ...]
    scale: Scale


class Record(Struct):
    """Parts by the key of the tensor they came from (``recorded``), and what this conversion notes.

    What is recorded is a hint that is checked: components that it leaves out must be without effect, otherwise it
    is not used.
    """

    recorded: dict[str, Noted] = field(default_factory=dict)
    """By source key, with ``{}`` where a whole stack is meant: what was noted. It is not spread out, so a record takes
    no more memory than its text."""
    rslora: bool = False
    noted: dict[str, list[Noted]] = field(default_factory=dict)
    """By target: source key (``{}`` for a whole stack), batch (or stack size), rank, alpha, places."""

    def to_json(self) -> dict[str, list[Noted]]:
        """What was noted, as plain data."""
        return self.noted

    def part(self, key: str, components: int) -> Part | None:
        """What is recorded of a tensor that is written now, from sources of so many components in all."""
        found = self.recorded.get(key)
        number = None
        if found is None:
            for match in _NUMBER.finditer(key) if self.recorded else ():
                number = int(match[0])
                found = self.recorded.get(f"{key[: match.start()]}{{}}{key[match.end() :]}")
                if found is not None and number < found[1]:
                    break
            else:
                return None
        assert found is not None
        _, batch, rank, alpha, places = found
        if rank > components:
            return None
        spots = tuple(places) if isinstance(places, list) else tuple(range(places, places + rank))
        scale = Scale(rank, alpha, self.rslora)
        return Part(key, 0, batch if number is None else number, spots, scale)

    def note(self, target: str, part: Part) -> None:
        """Remember one source of a target."""
        first = part.places[0]
        in_a_row = part.places == tuple(range(first, first + len(part.places)))
        self.noted.setdefault(target, []).append(
            (
                part.key,
                part.target_batch,
                part.scale.rank,
                part.scale.alpha,
                first if in_a_row else list(part.places),
            )
        )

    def note_stack(self, target: str, keys: Sequence[str], places: range, scale: Scale) -> None:
        """Remember sources that are a whole stack: number i of the keys belongs to batch i."""
        key, batch = keys[0], 0
        if len(keys) > 1:
            key, batch = _numbered(keys[0], keys[1]), len(keys)
        self.noted.setdefault(target, []).append(
            (key, batch, scale.rank, scale.alpha, places.start)
        )


def read_record(parts: Mapping[str, Iterable[Noted]], *, rslora: bool) -> Record:
    """A record from what another one noted; sizes that no adapter has are passed over."""
    record = Record(rslora=rslora)
    for noted in parts.values():
        for item in noted:
            key, batch, rank, _, _ = item
            if 0 < rank < _MOST and 0 <= batch < _MOST:
                record.recorded[key] = item
    return record


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


_DIGITS = re.compile(r"([0-9]+)")


def _numbered(first: str, second: str) -> str:
    """The key that two neighbours share, with ``{}`` for the number in which they differ.

    >>> _numbered("l.1.experts.0.w1", "l.1.experts.1.w1")
    'l.1.experts.{}.w1'
    """
    parts, others = _DIGITS.split(first), _DIGITS.split(second)
    (at,) = [i for i, (one, other) in enumerate(zip(parts, others, strict=True)) if one != other]
    return "".join([*parts[:at], "{}", *parts[at + 1 :]])
