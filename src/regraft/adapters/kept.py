"""What only the base's own weights can supply, and what is kept aside so that the way back finds it again.

A model may read a module's weight without calling the module; a LoRA on it has no effect there, and its sum with the
base weight is saved in its place (``modules_to_save``). And a module saved as a whole may hold more tensors in one
layout than in the other; what is missing is filled in from the base. The original factors go into a file beside the
result, which only regraft reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from regraft.adapters.base_weights import BaseWeights
from regraft.adapters.detect import Known
from regraft.adapters.form import Array, Factors, Images, Lora, delta
from regraft.adapters.saved import Moved, owner_of
from regraft.adapters.scale import Scale
from regraft.dialects.peft.provenance import KeptModule, KeptTable
from regraft.dialects.peft.scan import PREFIX
from regraft.dialects.peft.writing import Result, Written
from regraft.errors import Finding, RefusedError
from regraft.names.keys import Group, group_names, tail_of
from regraft.rules.book import Special
from regraft.rules.templates import match_group


@dataclass(slots=True)
class Kept:
    """Factors kept aside (by their tensor names in the source), and digests of what stands in their place."""

    tensors: dict[str, Array] = field(default_factory=dict)
    table: KeptTable = field(default_factory=KeptTable)
    entries: list[str] = field(default_factory=list)
    """New entries of ``modules_to_save``."""


def digest(array: Array) -> str:
    """A digest of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:32]


def digest_all(tensors: Mapping[str, Array]) -> str:
    """A digest of all tensors with their names, dtypes and shapes."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        whole.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()[:32]


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
    others: list[Moved],
    known: Known,
    layout: str,
    base: BaseWeights,
    where: str,
    everywhere: Iterable[str] = (),
) -> tuple[list[Images], list[Moved], Kept]:
    """Take LoRAs off modules that are never called, and save the sum of base and delta in their place.

    Other tensors of such a module (a trained bias) are saved with it. ``everywhere`` are endings of paths that
    name only modules which the adapter has: an entry of ``modules_to_save`` may be as short as they are.

    Raises ``RefusedError`` where the base's weights are needed and not at hand.
    """
    special = [m for m in modules_of(known, layout) if not m.called]
    kept = Kept()
    saved = {item.new: item for item in others}
    result: list[Images] = []
    findings: list[Finding] = []
    for image in images:
        template = image.keys.template.removesuffix(".weight")
        modules = Group(template, image.keys.ids, image.keys.numbers)
        table = next((m for m in special if match_group(m.module, modules) is not None), None)
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
                        f"a LoRA has no effect here ({table.why}); its sum with the base weight can be saved in "
                        "its place, but the base's weights are not at hand",
                        where=where,
                        key=name,
                        fix="give the base's folder with its model.safetensors as --model",
                    )
                )
                continue
            tensors = {leaf: base.find(f"{name}.{leaf}") for leaf in table.tensors}
            tensors["weight"] = (weight.astype(np.float64) + delta(lora)).astype(weight.dtype)
            _save(name, lora, tensors, kept, saved, everywhere)
    if findings:
        raise RefusedError(findings)
    return result, list(saved.values()), kept


def _save(
    name: str,
    lora: Lora,
    tensors: Mapping[str, Array | None],
    kept: Kept,
    saved: dict[str, Moved],
    everywhere: Iterable[str],
) -> None:
    digests = {}
    for leaf, tensor in tensors.items():
        key = f"{name}.{leaf}"
        own = saved.get(key)
        if own is not None:
            wrapped = ".base_layer" * own.wrapped
            kept.tensors[f"{PREFIX}{name}{wrapped}.{leaf}"] = own.tensor
            tensor = own.tensor
        if tensor is not None:
            saved[key] = Moved(key, key, tensor)
            digests[key] = digest(tensor)
    kept.tensors[f"{PREFIX}{name}.lora_A.weight"] = lora.a
    kept.tensors[f"{PREFIX}{name}.lora_B.weight"] = lora.b
    scale = lora.scale
    kept.table.modules[name] = KeptModule(scale.rank, scale.alpha, scale.rslora, digests)
    entry = tail_of(name) if tail_of(name).endswith(tuple(everywhere)) else name
    if entry not in kept.entries:
        kept.entries.append(entry)


def fill_saved(
    others: list[Moved],
    entries: Iterable[str],
    known: Known,
    layout: str,
    base: BaseWeights,
    kept: Kept,
    where: str,
) -> list[Moved]:
    """Complete modules that are saved as a whole and have more tensors in this layout.

    Raises ``RefusedError`` where the base's weights are needed and not at hand.
    """
    have = {item.new for item in others}
    owners = {o for item in others for e in entries if (o := owner_of(item.new, e)) is not None}
    filled: list[Moved] = []
    findings: list[Finding] = []
    for table in modules_of(known, layout):
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
                filled.append(Moved(name, name, tensor))
                kept.table.filled[name] = digest(tensor)
    if findings:
        raise RefusedError(findings)
    return others + filled


def drop_stand_ins(
    tensors: Mapping[str, Array], table: KeptTable, aside: Mapping[str, Array]
) -> tuple[set[str], dict[str, Array], list[Written]]:
    """On a way back: tensors that only stood in for something, and the factors that they stood in for.

    What was changed since (its digest differs) is left as it is.
    """
    drop: set[str] = set()
    factors: dict[str, Array] = {}
    written: list[Written] = []

    def unchanged(names: Mapping[str, str]) -> bool:
        return all(
            PREFIX + name in tensors and digest(tensors[PREFIX + name]) == value
            for name, value in names.items()
        )

    for name, value in table.filled.items():
        if unchanged({name: value}):
            drop.add(PREFIX + name)
    for module, what in table.modules.items():
        names = [f"{PREFIX}{module}.lora_{x}.weight" for x in "AB"]
        if unchanged(what.saved) and all(name in aside for name in names):
            drop |= {PREFIX + name for name in what.saved}
            mine = PREFIX + module + "."
            factors.update((name, x) for name, x in aside.items() if name.startswith(mine))
            scale = Scale(what.rank, what.alpha, what.rslora)
            written.append(Written(f"{module}.weight", module, None, scale))
    return drop, factors, written


def keep_changed(
    images: Iterable[Images], factors: Factors, tensors: Mapping[str, Array], kept: Kept
) -> int:
    """Keep aside factors that their image alone does not give back bit for bit; how many cannot be kept.

    They were rounded to another scale, or joined with factors of another dtype.
    """
    names = {id(tensor): name for name, tensor in tensors.items()}
    lost = 0
    for image in images:
        for lora in image.loras:
            for source in lora.changed if lora is not None else ():
                found = [names.get(id(x)) for x in (factors.a[source], factors.b[source])]
                lost += None in found
                kept.tensors.update((name, tensors[name]) for name in found if name is not None)
    return lost


def put_back(
    tensors: dict[str, Array],
    source: Mapping[str, Array],
    table: KeptTable,
    aside: Mapping[str, Array],
) -> None:
    """On a way back: factors that were kept aside because they had changed, where nothing was changed since."""
    if table.changed and digest_all(source) == table.changed:
        for name, tensor in aside.items():
            if name in tensors and tensors[name].shape == tensor.shape:
                tensors[name] = tensor


def add_factors(result: Result, factors: Mapping[str, Array], written: Iterable[Written]) -> None:
    """Put factors back under the names they had."""
    result.tensors.update(factors)
    for item in written:
        result.written.append(item)
        result.wrappers[item.module] = 1
