"""What a conversion remembers of where components came from, so that the way back gives the same bits.

It is written into the result's metadata. On the way back it is a hint that is checked: components that it leaves out
must be without effect, otherwise it is not used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regraft.adapters.peft_config import Number, Scale
from regraft.plan.plan import Headers

_NUMBERS = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Part:
    """A source's components in a target: the target's component ``places[i]`` is the source's i-th."""

    key: str
    source_batch: int
    target_batch: int
    places: tuple[int, ...]
    scale: Scale


@dataclass(slots=True)
class Record:
    """Parts by the key of the tensor they came from (``recorded``), and what this conversion notes."""

    recorded: dict[str, Part] = field(default_factory=dict)
    noted: dict[str, list[Any]] = field(default_factory=dict)

    def part(self, key: str) -> Part | None:
        """What is recorded of a tensor that is written now."""
        return self.recorded.get(key)

    def note(self, target: str, part: Part) -> None:
        """Remember one source of a target."""
        places: list[int] | int = list(part.places)
        if part.places == tuple(range(part.places[0], part.places[0] + len(part.places))):
            places = part.places[0]
        self.noted.setdefault(target, []).append(
            [part.key, part.target_batch, part.scale.rank, part.scale.alpha, places]
        )

    def note_stack(
        self, target: str, headers: Headers, ids: Sequence[int], places: range, scale: Scale
    ) -> None:
        """Remember sources that are a whole stack: number i of the keys belongs to batch i."""
        first = headers.name(ids[0])
        if len(ids) == 1:
            self.noted.setdefault(target, []).append(
                [first, 0, scale.rank, scale.alpha, places.start]
            )
            return
        second = headers.name(ids[1])
        at = next(i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y)
        end = _NUMBERS.match(first, at)
        assert end is not None
        template = first[:at] + "{}" + first[end.end() :]
        self.noted.setdefault(target, []).append(
            [template, len(ids), scale.rank, scale.alpha, places.start]
        )

    def to_json(self) -> dict[str, Any]:
        """What was noted, as plain data."""
        return self.noted


def read_record(data: Mapping[str, Iterable[Sequence[Any]]], rslora: bool) -> Record:
    """A record from plain data; parts that do not read as such are left out (it is only a hint)."""
    record = Record()
    for target, parts in data.items():
        del target
        for key, batch, rank, alpha, places in parts:
            scale = Scale(rank, _number(alpha), rslora)
            spots = (
                tuple(places) if isinstance(places, list) else tuple(range(places, places + rank))
            )
            if "{}" in key:
                for number in range(batch):
                    name = key.replace("{}", str(number))
                    record.recorded[name] = Part(name, 0, number, spots, scale)
            else:
                record.recorded[key] = Part(key, 0, batch, spots, scale)
    return record


def _number(value: Any) -> Number:
    return value if isinstance(value, (int, float)) else float(value)
