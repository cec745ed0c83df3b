"""Questions about readings that fit alike, and the answers that were given."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regraft.errors import BadInputError, Choice, Finding
from regraft.learning.blocks import natural

OPTION = "--choose"


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was said of readings that fit alike."""

    tensors: frozenset[tuple[str, str]] = frozenset()
    """Names before and after of tensors that are the same one; others whose names differ in numbers follow."""
    fields: frozenset[str] = frozenset()
    """What says sizes before all else: ``config.num_heads``, ``2 * config.num_heads``."""

    @staticmethod
    def of(answers: Iterable[str], before: Mapping[str, Any], after: Mapping[str, Any]) -> Chosen:
        """Answers as `--choose` takes them: ``AFTER=BEFORE``, two tensors, or a size (``config.FIELD``).

        Raises ``BadInputError`` for one that speaks of no tensor.
        """
        tensors, fields, findings = set(), set(), []
        for answer in answers:
            if _SIZE.fullmatch(answer):
                fields.add(" ".join(answer.split()))
                continue
            target, equals, source = (part.strip() for part in answer.partition("="))
            if not equals:
                message = "it is neither config.FIELD nor AFTER=BEFORE, the names of two tensors"
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
    """Fields of the config, or what is computed of two, that say a size alike in every pair."""

    axis: str
    sides: str
    fields: tuple[str, ...]
    """The one that was taken first."""


@dataclass(slots=True)
class Doubts:
    """What was taken although something else fits as well."""

    sizes: list[Doubt] = field(default_factory=list)

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
            if doubt.fields in asked:
                continue
            asked.add(doubt.fields)
            yield Finding(
                "which-reading",
                f"{len(doubt.fields)} readings of the config say the size {doubt.axis} in every pair, in "
                f"{' '.join(doubt.sides.split())}",
                where=where,
                choices=tuple(
                    Choice(name, "the same size in every pair", f"{doubt.axis} = {name}", OPTION)
                    for name in doubt.fields[:_MOST]
                ),
                fix="choose one, or give one more pair in which they differ",
            )


_NUMBER = re.compile(r"\d+")
_SIZE = re.compile(r"(\d+ *\* *)?config\.[\w.]+( *[*/+] *config\.[\w.]+)?")
_FIELD = re.compile(r"config\.([\w.]+)")


def fields_in(size: str) -> list[str]:
    """The fields of the config in a size: ``heads`` and ``dim`` in ``config.heads * config.dim``."""
    return _FIELD.findall(size)


_MOST = 6
"""Choices that one question lists."""


__all__ = ["NOTHING_CHOSEN", "OPTION", "Chosen", "Doubt", "Doubts", "fields_in"]
