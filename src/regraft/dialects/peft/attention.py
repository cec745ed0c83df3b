"""Writing a LoRA on torch's MultiheadAttention as PEFT has it: one layer around both of its projections.

The joined projection and ``out_proj`` have one rank and one alpha, and PEFT adds the delta of ``out_proj`` twice. Where
only one of them is adapted, factors of zeros stand for the other one.

Source: PEFT 0.18.1 and 0.21.2, ``MultiheadAttention`` in ``peft/tuners/lora/layer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from regraft.adapters.form import Images, Lora, Written, rescale, zeros_like
from regraft.dialects.peft.scan import IN_PROJ, OUT_PROJ, PREFIX

if TYPE_CHECKING:
    from regraft.dialects.peft.writing import Result

_A, _B = ".lora_A.weight", ".lora_B.weight"


def join_attentions(result: Result, images: Sequence[Images], has: Callable[[str], bool]) -> None:
    """Put the factors of the projections of one attention into the layer that PEFT has for both.

    ``has`` says whether the base has a tensor of a name that it has not in the source's layout; so an attention whose
    ``out_proj`` alone is adapted is told from other modules of this name, and from one that PEFT adapted alone. What is
    rounded is said of the ``images``.
    """
    found: dict[str, dict[str, Written]] = {}
    for item in result.written:
        if item.parameter == IN_PROJ:
            found.setdefault(item.module, {})[IN_PROJ] = item
    for item in result.written:
        if item.parameter is not None or not item.module.endswith(OUT_PROJ):
            continue
        module = item.module.removesuffix(OUT_PROJ)
        if module in found or has(f"{module}.{IN_PROJ}"):
            found.setdefault(module, {})[OUT_PROJ] = item
    keys = {item.key for pair in found.values() for item in pair.values()}
    loras = {
        key: lora
        for image in images
        if keys
        for key, lora in zip(image.keys.names(), image.loras, strict=True)
        if key in keys and lora is not None
    }
    for module, pair in found.items():
        _join(result, module, pair, loras)


def _join(
    result: Result, module: str, pair: Mapping[str, Written], loras: Mapping[str, Lora]
) -> None:
    inner, outer = pair.get(IN_PROJ), pair.get(OUT_PROJ)
    one = None if inner is None else _take(result, module, inner)
    two = None if outer is None else _take(result, module + OUT_PROJ, outer)
    if two is not None:
        # It is added twice, so it is written at half of its scale.
        two.b, _ = rescale(two.b, 0.5)
    size = one.a.shape[1] if one is not None else two.b.shape[0] if two is not None else 0
    like = one if one is not None else two
    assert like is not None
    one = one if one is not None else zeros_like(like, 3 * size, size)
    two = two if two is not None else zeros_like(like, size, size)
    rank = max(len(one.a), len(two.a))
    scale = like.scale.at_rank(rank)
    for lora, place in ((one, module), (two, f"{module}.base_layer{OUT_PROJ}")):
        b, exact = rescale(lora.b, lora.scale.ratio_to(scale.at_rank(len(lora.a))))
        for item in () if exact else pair.values():
            loras[item.key].exact = False
        more = rank - len(lora.a)
        result.tensors[PREFIX + place + _A] = np.pad(lora.a, ((0, more), (0, 0)))
        result.tensors[PREFIX + place + _B] = np.pad(b, ((0, 0), (0, more)))
    gone = [item for item in (inner, outer) if item is not None]
    result.written = [item for item in result.written if item not in gone]
    result.written.append(Written(f"{module}.{IN_PROJ}", module, None, scale))
    result.wrappers[module] = 1
    result.wrappers.pop(module + OUT_PROJ, None)


def _take(result: Result, place: str, item: Written) -> Lora:
    """The factors that were written for a projection, taken out."""
    a, b = (result.tensors.pop(PREFIX + place + end) for end in (_A, _B))
    return Lora(a, b, item.scale)
