"""What wrappers leave in the names of a checkpoint: state dicts of compiled, sharded and checkpointed models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from regraft.checkpoints.source import Source
from regraft.errors import BadInputError, Finding
from regraft.rules.book import Book, own_books
from regraft.values import replace

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Segments that no model of transformers has: of ``torch.compile``, FSDP and activation checkpointing."""
_MODULE = "module"
"""That of DDP and DeepSpeed, which a model may have, too: it goes where every name begins with it."""


def strip_wrappers(source: Source) -> tuple[Source, list[str]]:
    """A checkpoint without wrappers' segments in its names, and what is said of it.

    What a rule book of the user's own has in its keys is part of the model, and stays.

    Raises ``BadInputError`` where two names would become one.
    """
    names = source.tensors.names
    templates = [group.template for group in source.tensors.groups]
    gone = {w for w in _WRAPPERS if any(w in template for template in templates)}
    in_front = any(template.startswith(f"{_MODULE}.") for template in templates)
    if not gone and not in_front:
        return source, []
    spoken = {word for book in own_books() for word in _words(book)}
    gone -= spoken
    if in_front and _MODULE not in spoken:
        bare = (next((s for s in n.split(".") if s not in gone), "") for n in names)
        if all(first == _MODULE for first in bare):
            gone.add(_MODULE)
    if not gone:
        return source, []
    made = [".".join(_strip(name.split("."), gone)) for name in names]
    changed = sum(old != new for old, new in zip(names, made, strict=True))
    if not changed:
        return source, []
    seen: dict[str, str] = {}
    findings = []
    for old, new in zip(names, made, strict=True):
        if seen.setdefault(new, old) != old:
            findings.append(
                Finding(
                    "duplicate-key",
                    f"without wrappers' segments it is the same tensor as {seen[new]}",
                    where=source.where,
                    key=old,
                    fix="keep one of them",
                )
            )
    if findings:
        raise BadInputError(findings)
    said = f"segments of wrappers ({', '.join(sorted(gone))}) were taken out of {changed} names"
    return replace(source, tensors=replace(source.tensors, names=made)), [said]


def refuse_adapters(source: Source) -> None:
    """Raises ``BadInputError`` for a checkpoint with an adapter's factors beside the weights that they are around.

    Their scale is nowhere in it, so the file alone does not say what the adapter adds.
    """
    if not any(".base_layer." in group.template for group in source.tensors.groups):
        return
    names = source.tensors.names
    inside = [name for name in names if ".lora_" in name]
    if inside:
        from regraft.dialects.peft.without_config import split_factor

        inside = [name for name in inside if split_factor(name)]
    if inside and len(inside) < len(names):
        raise BadInputError(
            Finding(
                "adapter-inside",
                f"{len(inside)} of its {len(names)} tensors are factors of a LoRA, around the weights of its base: it "
                "is the state dict of a model with an adapter inside, and does not say how the adapter is scaled",
                where=source.where,
                key=inside[0],
                fix="make the model with its adapter, and load it there: model.load_state_dict("
                "regraft.convert_state_dict(state_dict, to=model)); then save what you need of it",
            )
        )


def _strip(segments: Iterable[str], gone: set[str]) -> Iterator[str]:
    """The segments without wrappers'; of ``module`` only those in front."""
    front = True
    for segment in segments:
        if segment in gone and (segment != _MODULE or front):
            continue
        front = False
        yield segment


def _words(book: Book) -> Iterator[str]:
    """All segments that a book's keys spell out."""
    keys = [t.key for r in book.rules for t in (*r.equation.left, *r.equation.right)]
    for key in [*keys, *(c.term.key for c in book.carries)]:
        for part in key.parts if key is not None else ():
            if isinstance(part, str):
                yield from re.split(r"\.", part)
