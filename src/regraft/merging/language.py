"""Adapters of language models as what they add to a base: PEFT's of any family, and those of other tools."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from regraft.adapters.convert import source_layout
from regraft.adapters.deltas import Deltas
from regraft.adapters.families.base import NoImageError
from regraft.adapters.home import at_home
from regraft.adapters.protocol import Opened
from regraft.checking.certificate import carried, moved_biases
from regraft.dialects.names import SourceName
from regraft.dialects.opening import Opening
from regraft.dialects.peft.saved import token_rows
from regraft.errors import BadInputError, Finding, RefusedError
from regraft.layouts.names import Layout
from regraft.merging.addends import Addend, Replacement
from regraft.merging.base import Base
from regraft.planning.model import Foreign


def language_addend(
    opening: Opening, base: Base, weight: float, given: SourceName, foreign: Foreign
) -> Addend:
    """An adapter as what it adds to a base of a language model.

    Raises what opening and reading it raise, ``RefusedError`` where it cannot be added.
    """
    opened = opening.one()
    if getattr(opened, "convert", None) is not None:
        raise BadInputError(
            Finding(
                "wrong-base",
                "this is a LoRA of an image or video model, and the base is a language model",
                where=opened.where,
                fix="give the base that it was trained on",
            )
        )
    opened, moved = at_home(opened, base.model, foreign)
    target = base.layout or base.any_layout
    here, known, evidence = source_layout(opened, Layout(target), base.model, given.layout, foreign)
    before = opened.deltas(known, here)
    check_biases(before)
    addend = Addend(
        str(opening.src),
        opened.where,
        weight,
        carried(before, target),
        base.find,
        peft_type=opened.kind,
        layout=here,
        evidence=tuple(evidence),
        tensors=len(opened.tensors),
        ties=bool(_config(opened).get("ensure_weight_tying")),
        files=opening.files,
    )
    addend.notes += [moved] if moved is not None else []
    addend.replaced = _replaced(before, target, opened)
    return addend


def _config(opened: Opened) -> dict[str, Any]:
    config = getattr(opened, "config", None)
    return config if isinstance(config, dict) else {}


def _replaced(before: Deltas, target: str, opened: Opened) -> dict[str, Replacement]:
    """Tensors and rows that an adapter has as they are to be, and biases that it changes."""
    made: dict[str, Replacement] = {}
    shared = set(before.family.shared) if before.family is not None else set()
    findings: list[Finding] = []
    for item in before.moved_others(target):
        if item.old in shared:
            continue
        if not item.bound:
            findings.append(_unbound(item.old, before.source.where))
            continue
        rows = None
        if item.rows:
            rows = np.asarray(token_rows(_config(opened), item.old), dtype=np.int64)
        made[item.new] = Replacement(item.tensor, rows)
    for name, bias in moved_biases(before, target).items():
        made[name] = Replacement(bias)
    if findings:
        raise RefusedError(findings)
    return made


def _unbound(key: str, where: str) -> Finding:
    return Finding(
        "no-image",
        "it belongs to no weight of the base (a prompt, say), and cannot be merged into one",
        where=where,
        key=key,
        fix="keep the adapter as it is; PEFT cannot merge it either",
    )


def check_biases(before: Deltas) -> None:
    """Refuse an adapter that makes biases for modules that have none: the model would not read them."""
    found = [
        Finding(
            "no-image",
            "the adapter adds a bias, and this module has none in the base",
            where=before.source.where,
            key=name,
            fix="keep it with the layout that it was trained in; PEFT cannot merge it either",
        )
        for name in before.bare_biases()
    ]
    if found:
        raise RefusedError(found)


@contextmanager
def located(key: str, where: str) -> Iterator[None]:
    """Give a refusal the tensor and the adapter that it is about."""
    try:
        yield
    except RefusedError as error:
        raise RefusedError(replace(f, key=key, where=where) for f in error.findings) from error


def cannot(error: NoImageError, where: str) -> RefusedError:
    """Why an adapter cannot be added to weights."""
    return RefusedError(
        Finding(
            "needs-base-weights" if error.needs_base else "no-image",
            f"it cannot be merged: {error.why}",
            where=where,
            fix="give the base that it was trained on, with all of its weights"
            if error.needs_base
            else "merge it with the tool that trained it",
        )
    )
