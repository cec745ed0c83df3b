"""Names that a rule book's ``{*p}`` takes although they are not where the model is.

``{*p}`` stands for where a model is inside another: ``model``, ``model.language_model``, nothing. It would take any
module below a layer for one, too: ``model.layers.0.extra.norm.weight`` is called like the norm of a model at
``model.layers.0.extra``. Where most of a file's layers are tells where the model is, and what is elsewhere is outside;
where the layers themselves are in a place that is not usual, all is. So are heads that models of the named class lack.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from regraft.equation.notation import Hole, Key, Segments
from regraft.names.keys import MARK, Group
from regraft.planning.lookup import Lookup, Words
from regraft.planning.model import ModelConfig
from regraft.rules.book import Book

_BY_ITSELF = ("model", "")
"""Where text models of transformers have their layers, with a head and without."""
_INSIDE = ("model.language_model", "language_model", *_BY_ITSELF)
"""Where bigger models usually have those of their language model."""
_HEADS = {
    "ForCausalLM": ("lm_head",),
    "LMHeadModel": ("lm_head",),
    "ForConditionalGeneration": ("lm_head", "language_model.lm_head", "thinker.lm_head"),
    "ForSequenceClassification": ("score", "classifier"),
    "ForTokenClassification": ("score", "classifier"),
    "ForQuestionAnswering": ("qa_outputs", "score"),
    "Model": (),
}
"""The heads that classes have, by how they are called."""
HEADS = tuple(dict.fromkeys(head for heads in _HEADS.values() for head in heads))


def outside(lookup: Lookup, model: ModelConfig | None) -> list[Group]:
    """The names that books take for another model's than the one whose layers most names are of.

    In a composite model there may be several with layers; there, what is below a layer is outside. Of books of the
    user's own, what ``{*p}`` may hold is the user's to say.
    """
    found = [
        (group, *each)
        for group, said in zip(lookup.groups, lookup.found, strict=True)
        for each in _first(group, said, lookup.own)
    ]
    layers: Counter[tuple[str, str]] = Counter()
    for _, key, below, rows in found:
        if _numbers_layers(key):
            layers[below, str(key.parts[1])] += len(rows)
    if not layers:
        return []
    (((place, name), _),) = layers.most_common(1)
    alone = model is not None and not model.is_composite()
    if place not in (_BY_ITSELF if alone else _INSIDE):
        return [group.take(rows) for group, _, _, rows in found]
    layer = f"{place}{name}{MARK}.".removeprefix(".")
    several = model is not None and not alone
    return [
        group.take(rows)
        for group, _, below, rows in found
        if below != place and (not several or f"{below}.".startswith(layer))
    ]


def strange_heads(lookup: Lookup, classes: Sequence[str]) -> list[Group]:
    """The heads that classes of these names have not; none where a name is not called like any.

    Heads that a book of the user's own names are the user's.

    >>> from regraft.names.keys import group_names
    >>> heads = Lookup.of((), group_names(["score.weight", "lm_head.weight"]))
    >>> [group.template for group in strange_heads(heads, ["LlamaForCausalLM"])]
    ['score.weight']
    """
    known = [
        next((heads for end, heads in _HEADS.items() if name.endswith(end)), None)
        for name in classes
    ]
    if not known or None in known:
        return []
    wanted = {head for heads in known for head in heads or ()}
    gone = tuple(f"{head}." for head in HEADS if head not in wanted)
    return [
        group
        for group, found in zip(lookup.groups, lookup.found, strict=True)
        if group.template.startswith(gone)
        and not any(words.book is own for words in found if words.keys for own in lookup.own)
    ]


def _first(
    group: Group, said: Sequence[Words], own: Sequence[Book]
) -> Iterator[tuple[Key, str, npt.NDArray[np.intp]]]:
    """The keys of books that begin with ``{*p}``, what that holds, and the rows that they take; each row once."""
    free = np.ones(len(group.ids), dtype=bool)
    for words in said:
        if words.book.tells != "both" or any(words.book is each for each in own):
            continue
        for key, match in words.keys:
            rows = match.rows[free[match.rows]]
            if not len(rows):
                continue
            if isinstance(key.parts[0], Segments):
                yield key, match.rests[0], rows
            free[rows] = False
            if not free.any():
                return


def _numbers_layers(key: Key) -> bool:
    """Whether a key is ``{*p}.layers.{l}`` and more, by whatever name the layers go."""
    return len(key.parts) > 2 and isinstance(key.parts[2], Hole)


__all__ = ["outside", "strange_heads"]
