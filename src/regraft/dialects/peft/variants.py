"""What is more than a plain LoRA, and names that PEFT takes for the experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regraft.adapters.detect import Known
from regraft.adapters.families.lora_variants import changes_base
from regraft.dialects.peft.config import LoraConfig
from regraft.dialects.peft.scan import Scan
from regraft.errors import Finding, RefusedError


def names_of(config: Mapping[str, Any]) -> list[str]:
    """What makes a LoRA more than ``scale * B @ A``, in words."""
    lora = LoraConfig(config)
    init = changes_base(config)
    more = (
        []
        if init is None
        else [f"the initialisation {init!r} (it changes base weights when it loads)"]
    )
    return lora.variants() + more


def refuse_nested(scan: Scan, where: str) -> None:
    """Refuse a LoRA on a module inside another one that is adapted, but for torch's MultiheadAttention."""
    inside = ".base_layer."
    findings = [
        Finding(
            "no-image",
            "it adapts a module inside of another one that is adapted, and regraft has no rule for these",
            where=where,
            key=pairs.modules.name(0).split(inside)[0],
            fix="merge the adapter into its base, where it was trained, and convert the base",
        )
        for pairs in scan.pairs
        if inside in pairs.modules.template
    ]
    if findings:
        raise RefusedError(findings)


def reclaimed_names(config: Mapping[str, Any], known: Known, target: str) -> tuple[str, ...]:
    """Leaf names that must not stand in ``target_modules`` of the result, because PEFT moves them to the experts.

    For model types where PEFT is not known to do so yet, a plain LoRA is kept out of its way all the same.
    """
    plain = not names_of(config)
    names: dict[str, None] = {}
    for book in known.books:
        certain = known.model_type is None or known.model_type in book.reclaimed_model_types
        if book.right == target and (plain or certain):
            names.update(dict.fromkeys(book.reclaimed))
    return tuple(names)


def claimed_names(config: Mapping[str, Any], known: Known, layout: str) -> frozenset[str]:
    """Leaf names in a plain LoRA that PEFT is known to move to the experts, for just this model type."""
    if names_of(config):
        return frozenset()
    return frozenset(
        name
        for book in known.books
        if book.right == layout and known.model_type in book.reclaimed_model_types
        for name in book.reclaimed
    )
