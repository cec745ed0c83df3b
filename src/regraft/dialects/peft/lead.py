"""Keys that begin otherwise than PEFT's: what they may be meant to be.

A trainer that adds the name of a part of the model, or of its own module that holds the model, writes it before PEFT's
prefix: ``thinker.base_model.model.model.layers.0``. A part's name belongs behind the prefix, a holder's nowhere; the
base's own names tell which it is. Others write a prefix twice, and some models have a ``model`` in their ``model``.

Sources: NVIDIA-NeMo/Automodel#3595 (the part's name first), huggingface/transformers#45421 (``model.model``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from regraft.dialects.alike import one_of_each
from regraft.dialects.peft.renaming import RenamedTensors
from regraft.dialects.peft.scan import PREFIX
from regraft.errors import BadInputError

if TYPE_CHECKING:
    from typing import TypeVar

    from regraft.dialects.peft.source import Source

    S = TypeVar("S", bound=Source)

_TWICE = PREFIX + "model.model."


def readings(source: S) -> Iterator[tuple[S, str]]:
    """Other ways to read an adapter's keys, each with what is said of it; nothing where they begin as PEFT's do."""
    few = one_of_each(source.tensors)
    lead = _lead(few)
    if lead:
        held = _respelled(source, lambda name: name.removeprefix(lead))
        inside = _inside(held, lead)
        if inside is not None:
            yield (
                inside,
                f"{lead!r} stood before PEFT's prefix and names a part of the model: it was put behind",
            )
        yield (
            held,
            f"{lead!r} stood before PEFT's prefix and names no part of the base: it was taken off",
        )
    elif few and not any(PREFIX in name for name in few):
        yield _respelled(source, lambda name: PREFIX + name), f"{PREFIX!r} was put before its keys"
    elif few and all(name.startswith(_TWICE) for name in few):
        yield replace(source, doubled=True), "the base has a model in its model"
        once = _respelled(source, lambda name: PREFIX + name[len(PREFIX + "model.") :])
        yield once, "the prefix 'model.' stood twice, and the base has it once"


def _lead(few: list[str]) -> str:
    """What all keys begin with before PEFT's last prefix."""
    leads = {name[: max(name.rfind(PREFIX), 0)] for name in few}
    return leads.pop() if len(leads) == 1 else ""


def _inside(held: S, lead: str) -> S | None:
    """With the lead as the name of a part of the base; ``None`` where it is no part's."""
    if PREFIX in lead:
        return None
    try:
        names = held.names()
    except BadInputError:
        return None
    firsts = {g.template.partition(".")[0] for g in (*names.modules, *names.tensors)}

    def rename(path: str) -> str:
        # Entries of the config that are the ends of paths stay what they are.
        first, dot, _ = path.partition(".")
        return lead + path if dot and first in firsts else path

    return held.renamed(rename)


def _respelled(source: S, spell: Callable[[str], str]) -> S:
    names = {spell(name): name for name in source.tensors}
    return replace(source, tensors=RenamedTensors(source.tensors, names), weights=None)


__all__ = ["readings"]
