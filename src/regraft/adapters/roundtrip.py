"""The way back: what an adapter was before regraft converted it, as far as its result was not changed since.

It wraps around a conversion: before it, what stood in for something is taken out again (``take_back``) or all of the
original is restored (``restore``); after it, what the result alone would not give back goes into the sidecar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from msgspec import Struct

from regraft.adapters.base_weights import BaseWeights
from regraft.adapters.form import Array, Blob, Factors, Images, Lora, Written, delta
from regraft.adapters.protocol import Opened
from regraft.adapters.provenance import Asked, KeptModule, digest, digest_all, read_remembered
from regraft.adapters.scale import Scale
from regraft.adapters.uncalled import Kept
from regraft.errors import RegraftError

if TYPE_CHECKING:
    from regraft.adapters.convert import Converted

AnyOpened = TypeVar("AnyOpened", bound=Opened)

_ROUNDED = 1e-6
"""How far rescaling in float32, there and back, takes a factor from what it was, relative to its greatest entry."""

_STEPS = {"float16": 2.0**-9, "bfloat16": 2.0**-6, "float32": 2.0**-22, "float64": 2.0**-50}
"""Two steps of the greatest number of a dtype: a sum that another machine made may be rounded otherwise."""


class Returned(Struct, frozen=True, eq=False):
    """Factors that come back from the sidecar, under the names they had."""

    tensors: Mapping[str, Array]
    written: tuple[Written, ...] = ()
    note: str = ""
    """What could not be confirmed, and is left as it is."""


def comes_back(opened: Opened, layout: str) -> bool:
    """Whether regraft made an adapter from one of the layout that it goes to now."""
    return read_remembered(opened.metadata).source.layout == layout


def restore(opened: Opened, again: Callable[[Opened, Asked], Converted]) -> tuple[Blob | None, str]:
    """All of an adapter that another family stood in for, where it makes this one; otherwise why not, for a note.

    What the metadata says is no proof: anybody can write it, and the file beside. So what is kept is converted
    ``again``, and has to give the tensors and the config that are there.
    """
    remembered, sidecar = read_remembered(opened.metadata), opened.sidecar
    before, kept = remembered.config_before(opened.config), remembered.kept
    if not kept.whole or before is None or not sidecar:
        return None, ""
    if digest_all(opened.tensors) != kept.whole:
        return None, ""
    try:
        made = again(opened.before(before, sidecar), kept.asked)
    except RegraftError as error:
        return None, f"{_NOT_BACK}: {error.findings[0].message}"
    tensors = opened.tensors
    if made.config != opened.config or made.tensors.keys() != tensors.keys():
        return None, f"{_NOT_BACK}: it does not make this one"
    if not all(_close(made.tensors[name], x, _ROUNDED) for name, x in tensors.items()):
        return None, f"{_NOT_BACK}: it does not make this one"
    return Blob(before, dict(sidecar), {"format": "pt"}), ""


_NOT_BACK = "the adapter that is kept beside this one is not given back"


def take_back(opened: AnyOpened, base: BaseWeights) -> tuple[AnyOpened, Returned]:
    """Leave out what only stood in for something in the layout that an adapter comes back from.

    What was changed since (its digest differs), and what the base's weights do not confirm, is left as it is: a saved
    sum of base and delta means the same as the LoRA that was kept aside.
    """
    table, spelling = read_remembered(opened.metadata).kept, opened.spelling
    tensors, sidecar = opened.tensors, opened.sidecar
    drop: set[str] = set()
    factors: dict[str, Array] = {}
    written: list[Written] = []
    doubtful = 0

    def unchanged(digests: Mapping[str, str]) -> bool:
        names = ((spelling.spell(key), value) for key, value in digests.items())
        return all(name in tensors and digest(tensors[name]) == value for name, value in names)

    for key, value in table.filled.items():
        if unchanged({key: value}):
            if _is_base(base, key, tensors[spelling.spell(key)]):
                drop.add(spelling.spell(key))
            else:
                doubtful += 1
    for module, what in table.modules.items():
        if not unchanged(what.saved) or any(
            n not in sidecar for n in spelling.factor_names(module)
        ):
            continue
        mine = _kept_of(opened, module, what, base)
        if mine is None:
            doubtful += 1
            continue
        drop |= {spelling.spell(key) for key in what.saved}
        factors.update(mine)
        scale = Scale(what.rank, what.alpha, what.rslora)
        written.append(Written(f"{module}.weight", module, None, scale))
    note = ""
    if doubtful:
        note = (
            f"{doubtful} of its saved tensors may stand for something that the base has or that is kept beside them; "
            "the base's weights do not confirm it (give its folder as --model), so they stay as they are"
        )
    rest = opened.without(drop) if drop else opened
    return rest, Returned(factors, tuple(written), note)


def _kept_of(
    opened: Opened, module: str, what: KeptModule, base: BaseWeights
) -> dict[str, Array] | None:
    """What was kept aside of a module, where the base and it make what is saved in its place."""
    spelling, sidecar = opened.spelling, opened.sidecar
    a, b = spelling.factor_names(module)
    found = {name: sidecar[name] for name in (a, b)}
    if not _makes_sum(opened, module, what, base):
        return None
    others = {key.rpartition(".")[2]: spelling.spell(key) for key in what.saved}
    del others["weight"]
    for name in sidecar:
        start, _, leaf = name.rpartition(".")
        if start in (spelling.spell(module), spelling.spell(f"{module}.base_layer")) and (
            leaf in others
        ):
            saved = opened.tensors[others.pop(leaf)]
            if sidecar[name].shape != saved.shape or digest(sidecar[name]) != digest(saved):
                return None
            found[name] = sidecar[name]
    if not all(_is_base(base, f"{module}.{x}", opened.tensors[n]) for x, n in others.items()):
        return None
    return found


def _makes_sum(opened: Opened, module: str, what: KeptModule, base: BaseWeights) -> bool:
    """Whether a base weight and a LoRA beside the file make, to rounding, what is saved as the weight."""
    key = f"{module}.weight"
    weight = base.find(key)
    a, b = (opened.sidecar[name] for name in opened.spelling.factor_names(module))
    if weight is None or key not in what.saved or what.rank < 1 or a.ndim != 2 or b.ndim != 2:
        return False
    if (b.shape[0], a.shape[1]) != weight.shape or not len(a) == b.shape[1] == what.rank:
        return False
    saved = opened.tensors[opened.spelling.spell(key)]
    with np.errstate(all="ignore"):
        added = delta(Lora(a, b, Scale(what.rank, what.alpha, what.rslora)))
        want = (weight.astype(np.float64) + added).astype(weight.dtype)
    return saved.dtype == want.dtype and _close(saved, want, _STEPS.get(want.dtype.name, 0.0))


def _is_base(base: BaseWeights, key: str, tensor: Array) -> bool:
    """Whether a tensor is the base's own."""
    found = base.find(key)
    return (
        found is not None
        and (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        and digest(found) == digest(tensor)
    )


def _close(one: Array, other: Array, tolerance: float) -> bool:
    """Whether two arrays have the same numbers, to a tolerance relative to the greatest."""
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype and digest(one) == digest(other):
        return True
    first, second = one.astype(np.float64), other.astype(np.float64)
    with np.errstate(all="ignore"):
        off = np.where((first == second) | (np.isnan(first) & np.isnan(second)), 0, first - second)
        most = np.abs(first[np.isfinite(first)]).max(initial=0.0)
        return bool(np.abs(off).max(initial=0.0) <= tolerance * most)


def keep_changed(
    images: Iterable[Images], factors: Factors, tensors: Mapping[str, Array], kept: Kept
) -> int:
    """Keep aside factors that their image alone does not give back bit for bit; how many cannot be kept.

    They were rounded to another scale, or joined with factors of another dtype.
    """
    loras = (lora for image in images for lora in image.loras if lora is not None)
    changed = [source for lora in loras for source in lora.changed]
    if not changed:
        return 0
    names = {id(tensor): name for name, tensor in tensors.items()}
    lost = 0
    for source in changed:
        found = [names.get(id(x)) for x in (factors.a[source], factors.b[source])]
        lost += None in found
        kept.tensors.update((name, tensors[name]) for name in found if name is not None)
    return lost


def put_back(blob: Blob, source: Opened) -> None:
    """On a way back: factors that were kept aside because they had changed, where nothing was changed since.

    They mean what they did only under the config that they had: with another alpha or packing the same numbers are
    another delta.
    """
    remembered, sidecar = read_remembered(source.metadata), source.sidecar
    if not remembered.kept.changed or remembered.config_before(source.config) != blob.config:
        return
    if digest_all(source.tensors) != remembered.kept.changed:
        return
    for name, tensor in sidecar.items():
        # Rescaling rounded them, or they were joined with factors of another dtype; nothing else ever happened to them.
        if name in blob.tensors and _close(blob.tensors[name], tensor, _ROUNDED):
            blob.tensors[name] = tensor
