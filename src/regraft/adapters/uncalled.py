"""What only the base's own weights can supply.

A model may read a module's weight without calling the module; a LoRA on it has no effect there, and its sum with the
base weight is saved in its place. And a module saved as a whole may hold more tensors in one layout than in the
other; what is missing is filled in from the base. The original factors go into a sidecar, which only regraft reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from msgspec import Struct, field

from regraft.adapters.base_weights import BaseWeights
from regraft.adapters.detect import Known
from regraft.adapters.form import Array, Images, Lora, Saved, delta
from regraft.adapters.protocol import Writer
from regraft.adapters.provenance import KeptModule, KeptTable, digest
from regraft.errors import Finding, RefusedError
from regraft.names.keys import Group, group_names
from regraft.rules.book import Special
from regraft.rules.templates import match_group


class Kept(Struct):
    """What goes into the sidecar (by names in the file), and digests of what stands in its place."""

    tensors: dict[str, Array] = field(default_factory=dict)
    table: KeptTable = field(default_factory=KeptTable)
    entries: list[str] = field(default_factory=list)
    """What the config must say beside its own entries, so that the sums are saved."""


def modules_of(known: Known, layout: str) -> list[Special]:
    """The special modules of a layout."""
    return [
        module
        for book in known.books
        for module in book.specials
        if ("right" if book.right == layout else "left") in module.sides
    ]


def keep_uncalled(
    images: Iterable[Images],
    saved: Sequence[Saved],
    special: Sequence[Special],
    base: BaseWeights,
    writer: Writer,
    where: str,
) -> tuple[list[Images], list[Saved], Kept]:
    """Take LoRAs off ``special`` modules that are never called, and save the sum of base and delta in their place.

    Other tensors of such a module (a trained bias) are saved with it.

    Raises ``RefusedError`` where the base's weights are needed and not at hand.
    """
    uncalled = [m for m in special if not m.called]
    kept = Kept()
    by_key = {item.new: item for item in saved}
    result: list[Images] = []
    findings: list[Finding] = []
    for image in images:
        template = image.keys.template.removesuffix(".weight")
        modules = Group(template, image.keys.ids, image.keys.numbers)
        table = next((m for m in uncalled if match_group(m.module, modules) is not None), None)
        if table is None:
            result.append(image)
            continue
        for row, lora in enumerate(image.loras):
            if lora is None:
                continue
            name = modules.name(row)
            weight = base.find(f"{name}.weight")
            if weight is None:
                findings.append(
                    Finding(
                        "needs-base-weights",
                        f"a LoRA on it would have no effect: {table.why}. What it does can be kept as a changed "
                        "weight, the base's plus the LoRA's, and for that the base's weights are needed",
                        where=where,
                        key=name,
                        fix="give the base's folder with its model.safetensors as --model",
                    )
                )
                continue
            tensors = {leaf: base.find(f"{name}.{leaf}") for leaf in table.tensors}
            tensors["weight"] = (weight.astype(np.float64) + delta(lora)).astype(weight.dtype)
            _save(name, lora, tensors, kept, by_key, writer)
    if findings:
        raise RefusedError(findings)
    return result, list(by_key.values()), kept


def _save(
    name: str,
    lora: Lora,
    tensors: Mapping[str, Array | None],
    kept: Kept,
    saved: dict[str, Saved],
    writer: Writer,
) -> None:
    digests = {}
    for leaf, tensor in tensors.items():
        key = f"{name}.{leaf}"
        own = saved.get(key)
        if own is not None:
            kept.tensors[writer.spelling.saved_name(own)] = own.tensor
            tensor = own.tensor
        if tensor is not None:
            saved[key] = Saved(key, key, tensor)
            digests[key] = digest(tensor)
    names = writer.spelling.factor_names(name)
    kept.tensors.update(zip(names, (lora.a, lora.b), strict=True))
    scale = lora.scale
    kept.table.modules[name] = KeptModule(scale.rank, scale.alpha, scale.rslora, digests)
    entry = writer.entry_for(name)
    if entry not in kept.entries:
        kept.entries.append(entry)


def fill_saved(
    saved: Sequence[Saved],
    entries: Iterable[str],
    special: Sequence[Special],
    base: BaseWeights,
    kept: Kept,
    writer: Writer,
    where: str,
) -> list[Saved]:
    """Complete ``special`` modules that are saved as a whole and have more tensors in this layout.

    Raises ``RefusedError`` where the base's weights are needed and not at hand.
    """
    have = {item.new for item in saved if not item.rows}
    owners = {o for key in have for e in entries if (o := writer.owner(key, e)) is not None}
    filled: list[Saved] = []
    findings: list[Finding] = []
    for table in special:
        for owner in sorted(owners):
            (group,) = group_names([owner])
            if match_group(table.module, group) is None:
                continue
            for leaf in table.tensors:
                name = f"{owner}.{leaf}"
                if name in have:
                    continue
                tensor = base.find(name)
                if tensor is None:
                    findings.append(
                        Finding(
                            "needs-base-weights",
                            f"the saved module holds {leaf}, too, which the adapter has not: the base has it, "
                            "but the base's weights are not at hand",
                            where=where,
                            key=owner,
                            fix="give the base's folder with its model.safetensors as --model",
                        )
                    )
                    continue
                filled.append(Saved(name, name, tensor))
                kept.table.filled[name] = digest(tensor)
    if findings:
        raise RefusedError(findings)
    return [*saved, *filled]
