"""Names with segments of the model's where it has none, as some releases saved them.

A release wrote ``model.language_model.language_model.language_model.layers.0`` and ``model.language_model.visual`` for
``model.language_model.layers.0`` and ``model.visual`` (transformers 5.4, Qwen3.5), others ``thinker.model.thinker``
(5.23, Qwen2.5-Omni's thinker). The model's own names decide: a name is read without the fewest segments that make it
one of them, and only where every name that nothing explains can be read so, in one way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, takewhile

from regraft.checkpoints.source import Source
from regraft.names.keys import MARK
from regraft.planning.identify import Detected
from regraft.planning.lookup import Lookup
from regraft.planning.plan import Headers
from regraft.rules.book import Book
from regraft.values import replace

_MOST = 3
"""How many segments one name may have too many."""
_DEEPEST = 8


def read_misspelled(source: Source, headers: Headers, known: Detected) -> Source | None:
    """The checkpoint under the names that its model has; ``None`` where that is no repair for all of them."""
    left = Lookup.of(known.books, headers.groups, known.scopes).unexplained
    own = {template for book in known.books for template in _templates(book)}
    words = {segment for template in own for segment in template.split(".")}
    words |= set(_shared_lead(source.tensors.names))  # what held the model where it was saved
    repaired: dict[str, str] = {}
    gone: dict[str, None] = {}
    for group in left:
        found = _shorter(group.template, own, words)
        if found is None:
            return None
        lead, short, taken = found
        repaired[lead] = short
        gone.update(dict.fromkeys(taken))
    strange = {name for group in left for name in group.names()}
    there = {name for group in headers.groups for name in group.names()} - strange
    names = [n if n in there else _spell(n, repaired) for n in source.tensors.names]
    changed = [pair for pair in zip(source.tensors.names, names, strict=True) if pair[0] != pair[1]]
    if not changed or len(set(names)) < len(names):
        return None
    said = (
        f"{len(changed)} names have segments that the model has elsewhere or not at all ({', '.join(gone)}), as some "
        f"releases and trainers saved them; they are read without, {changed[0][0]} as {changed[0][1]}"
    )
    return replace(
        source, tensors=replace(source.tensors, names=names), notes=(*source.notes, said)
    )


def _shared_lead(names: Sequence[str]) -> list[str]:
    """The segments that all names begin with.

    >>> _shared_lead(["policy.model.norm.weight", "policy.lm_head.weight"])
    ['policy']
    """
    least, most = min(names).split("."), max(names).split(".")
    return [
        one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(least, most, strict=False))
    ]


def _templates(book: Book) -> Iterator[str]:
    """The names that a book spells out, with a mark for each index."""
    terms = [t for rule in book.rules for t in (*rule.equation.left, *rule.equation.right)]
    terms += [carry.term for carry in book.carries]
    for term in terms:
        text = str(term.key) if term.key is not None else "{*"
        if "{*" not in text:
            yield re.sub(r"\{[^{}]*\}|\d+", MARK, text)


def _shorter(
    template: str, own: Iterable[str], words: set[str]
) -> tuple[str, str, tuple[str, ...]] | None:
    """What stands before the first index, what it is read as, and the segments that are left out."""
    segments = template.split(".")
    end = next((i for i, segment in enumerate(segments) if MARK in segment), len(segments) - 1)
    places = [i for i in range(min(end, _DEEPEST)) if segments[i] in words]
    for count in range(1, _MOST + 1):
        made = {}
        for out in combinations(places, count):
            kept = [segment for i, segment in enumerate(segments) if i not in out]
            text = ".".join(kept)
            if text in own:
                made[text] = ".".join(kept[: end - count]), tuple(segments[i] for i in out)
        if len(made) == 1:
            ((short, taken),) = made.values()
            return ".".join(segments[:end]), short, taken
        if made:
            return None
    return None


def _spell(name: str, repaired: Mapping[str, str]) -> str:
    """A name with the longest lead that is misspelled spelled as the model has it."""
    leads = [lead for lead in repaired if name.startswith(f"{lead}.")]
    if not leads:
        return name
    lead = max(leads, key=len)
    rest = name[len(lead) + 1 :]
    return f"{repaired[lead]}.{rest}" if repaired[lead] else rest
