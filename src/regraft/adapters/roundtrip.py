"""The way back: what an adapter was before regraft converted it, as far as its result was not changed since.

It wraps around a conversion: before it, what stood in for something is taken out again (``take_back``) or all of the
original is restored (``restore``); after it, what the result alone would not give back goes into the sidecar.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from regraft.adapters.form import Array, Blob, Factors, Images, Written
from regraft.adapters.protocol import Opened
from regraft.adapters.provenance import digest, digest_all
from regraft.adapters.scale import Scale
from regraft.adapters.uncalled import Kept

AnyOpened = TypeVar("AnyOpened", bound=Opened)


@dataclass(frozen=True, slots=True, eq=False)
class Returned:
    """Factors that come back from the sidecar, under the names they had."""

    tensors: Mapping[str, Array]
    written: tuple[Written, ...] = ()


def comes_back(opened: Opened, layout: str) -> bool:
    """Whether regraft made an adapter from one of the layout that it goes to now."""
    return opened.provenance().source.layout == layout


def restore(opened: Opened) -> Blob | None:
    """All of an adapter that another family stood in for, where nothing was changed since."""
    remembered, sidecar = opened.provenance(), opened.sidecar
    before = remembered.config_before(opened.config)
    if not remembered.kept.whole or before is None or not sidecar:
        return None
    if digest_all(opened.tensors) != remembered.kept.whole:
        return None
    return Blob(before, dict(sidecar), {"format": "pt"})


def take_back(opened: AnyOpened) -> tuple[AnyOpened, Returned]:
    """Leave out what only stood in for something in the layout that an adapter comes back from.

    What was changed since (its digest differs) is left as it is.
    """
    table, spelling = opened.provenance().kept, opened.spelling
    tensors, sidecar = opened.tensors, opened.sidecar
    drop: set[str] = set()
    factors: dict[str, Array] = {}
    written: list[Written] = []

    def unchanged(digests: Mapping[str, str]) -> bool:
        names = ((spelling.spell(key), value) for key, value in digests.items())
        return all(name in tensors and digest(tensors[name]) == value for name, value in names)

    for key, value in table.filled.items():
        if unchanged({key: value}):
            drop.add(spelling.spell(key))
    for module, what in table.modules.items():
        if unchanged(what.saved) and all(n in sidecar for n in spelling.factor_names(module)):
            drop |= {spelling.spell(key) for key in what.saved}
            mine = spelling.spell(module) + "."
            factors.update((name, x) for name, x in sidecar.items() if name.startswith(mine))
            scale = Scale(what.rank, what.alpha, what.rslora)
            written.append(Written(f"{module}.weight", module, None, scale))
    return (opened.without(drop) if drop else opened), Returned(factors, tuple(written))


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


def put_back(blob: Blob, source: Opened) -> None:
    """On a way back: factors that were kept aside because they had changed, where nothing was changed since.

    They mean what they did only under the config that they had: with another alpha or packing the same numbers are
    another delta.
    """
    remembered, sidecar = source.provenance(), source.sidecar
    if not remembered.kept.changed or remembered.config_before(source.config) != blob.config:
        return
    if digest_all(source.tensors) != remembered.kept.changed:
        return
    for name, tensor in sidecar.items():
        if name in blob.tensors and blob.tensors[name].shape == tensor.shape:
            blob.tensors[name] = tensor
