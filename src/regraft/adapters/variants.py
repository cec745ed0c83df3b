"""What is more than a plain LoRA: carried over where its base weight stays what it is, refused elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from regraft.adapters.detect import Known
from regraft.adapters.peft_config import LoraConfig
from regraft.adapters.scan import Scan
from regraft.errors import Finding, RefusedError
from regraft.plan.plan import Plan


def names_of(config: Mapping[str, Any]) -> list[str]:
    """What makes a LoRA more than ``scale * B @ A``, in words."""
    lora = LoraConfig(config)
    init = lora.changes_base()
    more = (
        []
        if init is None
        else [f"the initialisation {init!r} (it changes base weights when it loads)"]
    )
    return lora.variants() + more


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


def refuse_variants(
    plan: Plan, scan: Scan, config: Mapping[str, Any], known: Known, where: str
) -> None:
    """Refuse what is more than a plain LoRA where it would have to become ``target_parameters``.

    Raises ``RefusedError``.
    """
    names = " and ".join(names_of(config))
    if not names:
        return
    findings = []
    for entry in plan.entries:
        if entry.moves_nothing and entry.read[0].key == entry.written[0].key:
            continue
        for term, ids in zip(entry.read, entry.sources, strict=True):
            present = np.flatnonzero(ids.reshape(-1) >= 0)
            if len(present):
                findings.append(
                    Finding(
                        "variant",
                        f"{names} cannot follow it: its weight becomes a parameter there, and PEFT adapts "
                        f"parameters with plain LoRA only ({len(present)} like it)",
                        where=where,
                        key=entry.keys(term).name(int(present[0])),
                        rule=str(entry.rule),
                        fix="merge the adapter into its base and convert the base, or train a plain LoRA "
                        "on the experts and keep the rest as a second adapter",
                    )
                )
    reclaimed = reclaimed_names(config, known, plan.target_layout)
    for pairs in scan.pairs if reclaimed and not findings else ():
        hit = [path for path in pairs.modules.names() if path.rpartition(".")[2] in reclaimed]
        if hit:
            findings.append(
                Finding(
                    "variant",
                    "for this model PEFT moves every LoRA with this module's name to the experts when it "
                    f"loads an adapter, and what prevents it (target_parameters) does not go with {names}",
                    where=where,
                    key=hit[0],
                    fix="merge the adapter into its base and convert the base",
                )
            )
    if findings:
        raise RefusedError(findings)
