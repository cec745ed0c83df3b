"""Questions about readings that fit alike, and the answers that were given."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import add, floordiv, mul, sub
from typing import Any

from regraft.errors import BadInputError, Choice, Finding
from regraft.learning.blocks import natural
from regraft.learning.shrink import layer_fields

OPTION = "--choose"


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was said of readings that fit alike."""

    tensors: frozenset[tuple[str, str]] = frozenset()
    """Names before and after of tensors that are the same one; others whose names differ in numbers follow."""
    fields: frozenset[str] = frozenset()
    """What says sizes before all else: ``config.num_heads``, ``2 * config.num_heads``, ``2``."""

    @staticmethod
    def of(answers: Iterable[str], before: Mapping[str, Any], after: Mapping[str, Any]) -> Chosen:
        """Answers as `--choose` takes them: ``AFTER=BEFORE``, two tensors, or a size (``config.FIELD``, a number).

        Raises ``BadInputError`` for one that speaks of no tensor.
        """
        tensors, fields, findings = set(), set(), []
        for answer in answers:
            if _SIZE.fullmatch(answer):
                fields.add(" ".join(answer.split()))
                continue
            target, equals, source = (part.strip() for part in answer.partition("="))
            if not equals:
                message = (
                    "it is no size (config.FIELD, 2) and not AFTER=BEFORE, the names of two tensors"
                )
            elif target not in after:
                message = f"no tensor after is called {target}"
            elif source not in before:
                message = f"no tensor before is called {source}"
            else:
                tensors.add((source, target))
                continue
            findings.append(Finding("which-reading", message, where=f"{OPTION} {answer}"))
        if findings:
            raise BadInputError(findings)
        return Chosen(frozenset(tensors), frozenset(fields))


NOTHING_CHOSEN = Chosen()


@dataclass(frozen=True, slots=True)
class Doubt:
    """Readings that say a size alike in every pair: fields of the config, what is computed of two, a number."""

    axis: str
    sides: str
    fields: tuple[str, ...]
    """The one that was taken first."""
    sure: bool = False
    """Whether names speak for the one that was taken: then it is said and not asked."""
    verb: str = "="
    """What stands between the axis and what is read."""

    @property
    def note(self) -> str:
        """What is said of it."""
        first, *others = self.fields
        return (
            f"{self.axis} {self.verb} {as_clause(first)} in {' '.join(self.sides.split())}: in every pair "
            f"{', '.join(others[:_MOST])} {'is' if len(others) == 1 else 'are'} that, too"
        )


@dataclass(slots=True)
class Doubts:
    """What was taken although something else fits as well."""

    sizes: list[Doubt] = field(default_factory=list)

    @property
    def readings(self) -> int:
        """How many there are beside those that were taken."""
        return sum(len(doubt.fields) - 1 for doubt in self.sizes)

    def findings(
        self, tied: Sequence[tuple[str, tuple[str, ...]]], where: str
    ) -> Iterator[Finding]:
        """The questions: equal tensors (the target and its sources), then sizes."""
        asked: set[object] = set()
        for target, sources in sorted(tied, key=lambda each: natural(each[0])):
            # An answer for one layer is one for all.
            alike = tuple(sorted({_NUMBER.sub("#", name) for name in (target, *sources)}))
            if alike in asked:
                continue
            asked.add(alike)
            yield Finding(
                "which-reading",
                f"it is equal to {len(sources)} tensors before, and no name tells which of them it is",
                where=where,
                key=target,
                choices=tuple(
                    Choice(
                        f"{target}={source}",
                        "the same values",
                        f"{target} is {source}",
                        OPTION,
                    )
                    for source in sources[:_MOST]
                ),
                fix="choose one, or learn from a probe (regraft probe), in which no two are equal",
            )
        for doubt in self.sizes:
            if doubt.sure or doubt.fields in asked:
                continue
            asked.add(doubt.fields)
            what = f"the size {doubt.axis}" if doubt.verb == "=" else "which layers are meant"
            yield Finding(
                "which-reading",
                f"{len(doubt.fields)} readings say {what} in every pair, in "
                f"{' '.join(doubt.sides.split())}",
                where=where,
                choices=tuple(
                    Choice(
                        name,
                        f"the same {'size' if doubt.verb == '=' else 'layers'} in every pair",
                        f"{doubt.axis} {doubt.verb} {as_clause(name)}",
                        OPTION,
                    )
                    for name in doubt.fields[:_MOST]
                    if name != OTHERS
                ),
                fix="choose one, or give one more pair in which they differ",
            )

    def telling(self, config: Mapping[str, Any]) -> Iterator[dict[str, int]]:
        """Fields of the config with other values: readings differ in a model that has them.

        The most telling ones come first; not every one of them needs to be possible.
        """
        doubts = {doubt.fields: doubt for doubt in self.sizes}.values()
        if any(OTHERS in doubt.fields for doubt in doubts):
            layers = layer_fields(config)
            yield from [dict.fromkeys(layers, _MANY_LAYERS)] if layers else []
        open_ = [doubt.fields for doubt in doubts if not doubt.sure] or [d.fields for d in doubts]
        names = dict.fromkeys(f for readings in open_ for each in readings for f in fields_in(each))
        values = {name: value for name in names if (value := value_of(config, name))}
        if not values:
            return
        chosen: dict[str, int] = {}
        while len(chosen) < _TOGETHER:
            ways = [
                chosen | {name: 2 * value} for name, value in values.items() if name not in chosen
            ]
            best = max(ways, key=lambda way: _apart(open_, config, way), default=chosen)
            if _apart(open_, config, best) <= _apart(open_, config, chosen):
                break
            chosen = best
        single = [{name: times * value} for times in (2, 3) for name, value in values.items()]
        single.sort(key=lambda way: -_apart(open_, config, way))
        yield from ([chosen] if len(chosen) > 1 else [])
        yield from (way for way in single if _apart(open_, config, way))


def _apart(
    doubts: Sequence[Sequence[str]], config: Mapping[str, Any], changed: Mapping[str, int]
) -> int:
    """How many readings differ from others where fields of the config have other values."""
    sizes = [{size_of(each, config, changed) for each in readings} for readings in doubts]
    return sum(len(found) - 1 for found in sizes)


_MANY_LAYERS = 9
"""So many show what comes again after up to four of them."""
OTHERS = "others"
"""A reading that no pair contradicts, and that cannot be written: every second layer, for one."""
AXIS = "axis."
"""Before the name of an axis, in a reading that is another one's size: ``2 * axis.a``."""
_NUMBER = re.compile(r"\d+")
_SIZE = re.compile(
    r"last|\d+(, *\d+)*|(\d+ *\* *)?(config|axis)\.[\w.]+( *[-*/+] *(config\.[\w.]+|\d+)){0,3}"
)
_FIELD = re.compile(r"config\.([\w.]+)")
_WORD = re.compile(r"config\.[\w.]+|\d+|[-*/+]")
_SIGNS: Mapping[str, Callable[[int, int], int]] = {"*": mul, "+": add, "-": sub, "/": floordiv}


def as_clause(reading: str) -> str:
    """A reading as it stands after ``where a =``."""
    return reading.replace(f" * {AXIS}", " ").replace(AXIS, "")


def fields_in(size: str) -> list[str]:
    """The fields of the config in a size: ``heads`` and ``dim`` in ``config.heads * config.dim``."""
    return _FIELD.findall(size)


def value_of(config: Mapping[str, Any] | None, path: str) -> int | None:
    """A whole number of a config, by its path: ``text_config.hidden_size``."""
    node: Any = config
    for name in path.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node if isinstance(node, int) and not isinstance(node, bool) else None


def size_of(
    reading: str, config: Mapping[str, Any], changed: Mapping[str, int] | None = None
) -> int | None:
    """What a reading says in a model with a config; ``None`` where it speaks of something else.

    >>> size_of("config.a + config.b", {"a": 4, "b": 5}), size_of("2 * config.a", {"a": 4}, {"a": 7})
    (9, 14)
    """
    if AXIS in reading or not _WORD.search(reading):
        return None
    found, sign = 1, mul
    for word in _WORD.findall(reading):
        if word in _SIGNS:
            sign = _SIGNS[word]
            continue
        field = word.removeprefix("config.")
        value = int(word) if word.isdigit() else (changed or {}).get(field, value_of(config, field))
        if value is None or (sign is floordiv and not value):
            return None
        found = sign(found, value)
    return found


_TOGETHER = 4
"""Fields that one probe changes at most."""
_MOST = 6
"""Choices that one question lists."""


__all__ = [
    "AXIS",
    "NOTHING_CHOSEN",
    "OPTION",
    "OTHERS",
    "Chosen",
    "Doubt",
    "Doubts",
    "as_clause",
    "fields_in",
    "size_of",
    "value_of",
]
