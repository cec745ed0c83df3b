"""Learning a book from a converter that is a command, by running it on probes of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from regraft.bridges.transformers.outlines import outlines
from regraft.errors import BadInputError
from regraft.learning.command import Command
from regraft.learning.learn import Learned, learn_pairs, learn_telling
from regraft.learning.pairs import Pair
from regraft.learning.watch import pair_of

if TYPE_CHECKING:
    from regraft.bridges.transformers.probing import Outline

_SIZES = 3


@dataclass(frozen=True, slots=True)
class Probes:
    """What probes are made of: see `outlines`."""

    model: str
    layout: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    headers: str | PathLike[str] | None = None

    def outlines(self, count: int, changed: Mapping[str, Any] | None = None) -> list[Outline]:
        """Models of so many sizes, with other values of some fields.

        Raises ``BadInputError``.
        """
        fixed = {**self.fixed, **(changed or {})}
        return outlines(self.model, count, self.layout, fixed, self.headers)


def learn_command(
    probes: Probes,
    command: Command,
    *,
    layouts: tuple[str, str],
    name: str,
    choose: Sequence[str] = (),
) -> Learned:
    """What a converter does, from two sizes; a third one tests it, and more of them answer what is open.

    Sizes that were made from headers need not be those of a model. Where the converter fails on them, or what it makes
    of them is not explained, the checkpoint's own size is what is learned from, and a note says so.

    Raises ``BadInputError`` where the converter fails.
    """
    command.words()
    known = probes.outlines(_SIZES)
    kinds = known[0].kinds

    def watched(outline: Outline, where: str, *, other_values: bool = False) -> Pair:
        pair = pair_of(
            command.on(outline.config),
            outline.shapes,
            outline.config,
            with_torch=False,
            where=where,
            other_values=other_values,
        )
        return replace(pair, notes=(*pair.notes, *command.notes()))

    def found() -> Learned:
        return learn_pairs(
            pairs,
            layouts=layouts,
            name=name,
            kind_of=(kinds.get, lambda _: None) if kinds else None,
            orders=lambda: known[0].parameters,
            source=f"regraft learn --with {command.text!r}",
            choose=choose,
        )

    def more(changed: dict[str, int]) -> bool:
        told = ", ".join(f"{field} = {value}" for field, value in changed.items())
        try:
            outline = probes.outlines(1, changed)[0]
            pairs.insert(1, watched(outline, f"size 1 with {told}"))
        except BadInputError:
            return False  # there is no such model
        return True

    pairs: list[Pair] = []
    failed = ""
    for number, outline in enumerate(known, 1):
        try:
            pairs.append(watched(outline, f"size {number}", other_values=not pairs))
        except BadInputError as error:
            if not outline.from_headers or outline is known[-1]:
                raise
            failed = error.findings[0].message
    if failed:
        pairs[0] = _noting(pairs[0], f"the converter fails on some of them: {failed}")
    result = learn_telling(found, known[0].config, more)
    if known[-1].from_headers and len(pairs) > 1 and not result.sound:
        why = "what the converter makes of them is not explained"
        pairs = [_noting(watched(known[-1], "the checkpoint's own size", other_values=True), why)]
        alone = found()
        return alone if alone.sound else result
    return result


def _noting(pair: Pair, why: str) -> Pair:
    note = f"not every size that was made from the headers is one of a model: {why}"
    return replace(pair, notes=(*pair.notes, note))


__all__ = ["Probes", "learn_command"]
