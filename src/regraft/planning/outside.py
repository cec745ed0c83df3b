"""Names that a rule book's ``{*p}`` takes although they are not where the model is.

``{*p}`` stands for where a model is inside another: ``model``, ``model.language_model``, nothing. It would take any
module below a layer for one, too: ``model.layers.0.extra.norm.weight`` is called like the norm of a model at
``model.layers.0.extra``. Where most of a file's layers are tells where the model is, and what is elsewhere is outside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from regraft.equation.notation import Hole, Key, Segments
from regraft.names.keys import MARK, Group
from regraft.planning.lookup import Lookup, Words
from regraft.planning.model import ModelConfig
from regraft.rules.book import Book
from regraft.rules.templates import Match, match_group


def outside(lookup: Lookup, model: ModelConfig | None) -> list[Group]:
    """The names that books take for another model's than the one whose layers most names are of.

    In a composite model there may be several with layers; there, what is below a layer is outside. Of books of the
    user's own, what ``{*p}`` may hold is the user's to say.
    """
    found = [
        (group, key, match)
        for group, said in zip(lookup.groups, lookup.found, strict=True)
        for key, match in _first(group, said, lookup.own)
    ]
    layers: Counter[tuple[str, str]] = Counter()
    for _, key, match in found:
        if _numbers_layers(key):
            layers[match.rests[0], str(key.parts[1])] += len(match.rows)
    if not layers:
        return []
    (((place, name), _),) = layers.most_common(1)
    below = f"{place}{name}{MARK}.".removeprefix(".")
    several = model is not None and model.is_composite()
    return [
        group.take(match.rows)
        for group, _, match in found
        if match.rests[0] != place and (not several or f"{match.rests[0]}.".startswith(below))
    ]


def _first(group: Group, said: Sequence[Words], own: Sequence[Book]) -> Iterator[tuple[Key, Match]]:
    """The keys of books that take rows of a group, where they begin with ``{*p}``; each row once."""
    left = np.arange(len(group.ids))
    for words in said:
        if words.book.tells != "both" or any(words.book is each for each in own):
            continue
        for key, whole in words.keys:
            match = whole if len(left) == len(group.ids) else match_group(key, group.take(left))
            if match is None:
                continue
            if isinstance(key.parts[0], Segments):
                yield key, Match(left[match.rows], match.rests, match.rest_numbers, match.holes)
            left = np.delete(left, match.rows)
            if not len(left):
                return


def _numbers_layers(key: Key) -> bool:
    """Whether a key is ``{*p}.layers.{l}`` and more, by whatever name the layers go."""
    return len(key.parts) > 2 and isinstance(key.parts[2], Hole)


__all__ = ["outside"]
