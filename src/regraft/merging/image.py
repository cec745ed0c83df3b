"""LoRAs of image and video models as what they add to a base: part by part, in whatever form the file has them.

A delta is computed in the layout of the file's names, from its own tensors, and only its numbers follow the rule book
to the base's names; so nothing is refused that has no equivalent as an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np

from regraft.adapters.families.base import NoImageError
from regraft.arrays.pieces import (
    Ask,
    Piece,
    Take,
    Wide,
    carry_pieces,
    multiply,
    same_pieces,
    take_along,
    take_part,
)
from regraft.checkpoints.pipelines import DIFFUSERS
from regraft.dialects.image.convert import OpenedImage
from regraft.dialects.image.delta import LORA, NOTHING, SET, Delta, full_delta, take_rows
from regraft.dialects.image.dialect import ImageFile
from regraft.dialects.image.read import Home, ImageAdapter, candidates, model_config, read_adapter
from regraft.dialects.image.weights import ImageBase, as_matrix
from regraft.dialects.opening import Opening
from regraft.errors import BadInputError, Finding
from regraft.layouts.graph import Edge
from regraft.merging.addends import Addend
from regraft.merging.base import Base, BasePart, headers_of
from regraft.planning.build import build_plan
from regraft.planning.model import Scope

TEXT = "text_encoder"


def image_addends(
    opening: Opening, base: Base, weight: float, clip_weight: float | None
) -> list[Addend]:
    """A file of LoRAs as what it adds to each part of a base; ``clip_weight`` counts for text encoders.

    Raises what opening and reading it raise, ``BadInputError`` where the base is another family or lacks a part.
    """
    opened = opening.one()
    if not isinstance(opened, ImageFile) or opened.image is None:
        raise BadInputError(
            Finding(
                "wrong-base",
                "this is not a LoRA of an image or video model, and the base is one",
                where=opened.where,
                fix="give the base that it was trained on",
            )
        )
    image = opened.image
    adapter = _read(image, base)
    components: dict[str, dict[Home, Delta]] = {}
    for home, delta in adapter.deltas.items():
        if _weight_of(home.component, weight, clip_weight):
            components.setdefault(home.component, {})[home] = delta
    lacking = [name for name in components if name not in base.parts]
    if lacking:
        raise BadInputError(
            Finding(
                "wrong-base",
                f"the LoRA adapts the {name.replace('_', ' ')}, and the base has none",
                where=image.where,
                key=next(iter(components[name])).key,
                fix="give a base with this part, or give it the weight 0 (--clip-weight 0)"
                if name.startswith(TEXT)
                else "give the base that it was trained on",
            )
            for name in lacking
        )
    made: list[Addend] = []
    for name, deltas in components.items():
        own = _weight_of(name, weight, clip_weight)
        addend = _addend(image, base, base.parts[name], deltas, own)
        addend.name, addend.tensors = str(opening.src), len(image.tensors)
        addend.evidence, addend.layout = adapter.evidence, image.dialect
        addend.notes = list(adapter.notes) if not made else []
        made.append(addend)
    return made


def _weight_of(component: str, weight: float, clip_weight: float | None) -> float:
    """The weight of a component."""
    text = component.startswith(TEXT) and clip_weight is not None
    return clip_weight if text and clip_weight is not None else weight


def _read(image: OpenedImage, base: Base) -> ImageAdapter:
    """A file as an adapter of the base's family."""
    family = base.family
    assert family is not None
    fits, why = candidates(image.grouped, image.metadata, image.where)
    fit = next((fit for fit in fits if fit.family.name == family.name), None)
    if fit is None:
        names = " or ".join(fit.family.title for fit in fits)
        raise BadInputError(
            Finding(
                "wrong-base",
                f"it is a LoRA for {names} ({why}), and the base is {family.title}",
                where=image.where,
                fix=f"give a base of {names}",
            )
        )
    return read_adapter(fit, image.grouped, image.metadata, image.where, why)


@dataclass(frozen=True, slots=True, eq=False)
class _Target:
    """One tensor that a part's LoRAs add to, under its name in their layout."""

    key: str
    kind: str
    shape: tuple[int, ...]
    home: Home
    delta: Delta
    bias: bool = False


class _Deltas:
    """The tensors that the LoRAs of one part add to, by number, computed by rows."""

    def __init__(self, targets: Sequence[_Target], weights: ImageBase) -> None:
        self.targets, self.weights = targets, weights
        self._last: tuple[int, Wide] | None = None

    def shape(self, number: int) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.targets[number].shape

    def kind(self, number: int) -> str:
        """The kind of a tensor."""
        return self.targets[number].kind

    def part(self, number: int, takes: Sequence[Take]) -> Wide:
        """Part of what is added to a tensor, dim by dim, in float64."""
        target = self.targets[number]
        if target.bias:
            made = target.delta.bias_delta
            assert made is not None
            return take_part(made.reshape(target.shape), takes)
        if _is_product(target.delta):
            return _part_of_product(target, takes)
        rows = takes[0]
        if rows is not None and len(rows) < target.shape[0] and self._last_is_not(number):
            try:
                some = take_rows(target.delta, np.asarray(rows, dtype=np.int64))
            except NoImageError:
                pass
            else:
                made = self._numbers(target, some, np.asarray(rows, dtype=np.int64))
                return take_part(made.reshape(len(rows), *target.shape[1:]), (None, *takes[1:]))
        return take_part(self._whole(number), takes)

    def _last_is_not(self, number: int) -> bool:
        return self._last is None or self._last[0] != number

    def _whole(self, number: int) -> Wide:
        if self._last is None or self._last[0] != number:
            target = self.targets[number]
            made = self._numbers(target, target.delta, None)
            self._last = number, made.reshape(target.shape)
        return self._last[1]

    def _numbers(self, target: _Target, delta: Delta, rows: Any) -> Wide:
        def weight() -> Wide:
            home = target.home
            found = self.weights.weight(home.component, home.layout, home.key, target.shape)
            return as_matrix(found if rows is None else found[rows])

        if delta.algebra == SET:
            there = weight()
            return np.asarray(delta.tensors["set"].astype(np.float64).reshape(there.shape) - there)
        return full_delta(delta, weight)


def _is_product(delta: Delta) -> bool:
    """Whether it is a plain LoRA, of which any part is a product of parts."""
    return delta.algebra == LORA and delta.magnitude is None and "mid" not in delta.tensors


def _part_of_product(target: _Target, takes: Sequence[Take]) -> Wide:
    up, down = target.delta.tensors["up"], target.delta.tensors["down"]
    down = down.reshape(len(down), *target.shape[1:])
    up = take_along(up.reshape(len(up), -1), takes[0], 0)
    for dim, take in enumerate(takes[1:], 1):
        down = take_along(down, take, dim)
    wide = up.astype(np.float64), down.reshape(len(down), -1).astype(np.float64)
    made = multiply(*wide) * target.delta.scale.value
    return np.asarray(made.reshape(len(up), *down.shape[1:]))


def _addend(
    image: OpenedImage, base: Base, part: BasePart, deltas: Mapping[Home, Delta], weight: float
) -> Addend:
    assert base.family is not None
    targets: list[_Target] = []
    weights = ImageBase(base.path, base.family)
    for home, delta in deltas.items():
        if delta.algebra != NOTHING:
            shape = _shape(home, delta, part, base, weights)
            targets.append(_Target(home.key, home.kind, shape, home, delta))
        if delta.bias is not None:
            key = f"{home.module}.bias"
            targets.append(_Target(key, "vector", (len(delta.bias),), home, delta, bias=True))
    by_layout: dict[str, list[_Target]] = {}
    for target in targets:
        by_layout.setdefault(target.home.layout, []).append(target)
    ways = [_pieces(some, part, base, weights, image.where) for some in by_layout.values()]

    def pieces(ask: Ask) -> Iterator[Piece]:
        for way in ways:
            yield from way(ask)

    ranks = {t.key: t.delta.rank for t in targets}
    return Addend("", image.where, weight, pieces, part.rows.get, ranks=ranks)


def _pieces(
    targets: Sequence[_Target], part: BasePart, base: Base, weights: ImageBase, where: str
) -> Any:
    """What gives the slices of some tensors under the base's names."""
    made = _Deltas(targets, weights)
    names = [target.key for target in targets]
    layout = targets[0].home.layout
    if targets[0].home.component.startswith(TEXT):
        layout = DIFFUSERS  # the names of transformers are the folder's
    if part.book is None or layout == part.layout:
        ids = {name: number for number, name in enumerate(names)}
        return partial(same_pieces, ids, made.part, made.shape, made.kind)
    assert base.family is not None
    scope = Scope(model_config(base.family, {t.home: t.delta for t in targets}))
    plan = build_plan(
        headers_of(names, [target.shape for target in targets]),
        (Edge.out_of(part.book, layout),),
        scopes={part.book.name: scope},
        partial=True,
        where=where,
    )
    return partial(carry_pieces, plan, made.part, made.shape, made.kind)


def _shape(
    home: Home, delta: Delta, part: BasePart, base: Base, weights: ImageBase
) -> tuple[int, ...]:
    """The shape of a weight: the base's own where it has it by this name, else as far as the LoRA shows it.

    What depends on the weight may not show it (an OFT knows one axis): then the base is asked in the LoRA's layout.
    """
    row = part.rows.get(home.key)
    unknown = 1 in (delta.out, delta.into)
    if row is None and unknown and delta.needs_weight:
        with suppress(NoImageError):
            return weights.weight(home.component, home.layout, home.key, delta.shape).shape
    if row is not None:
        shape = base.tensors.shapes[row]
        if shape and (unknown or (shape[0], prod(shape[1:])) == (delta.out, delta.into)):
            return shape
    if home.kind == "vector":
        return (delta.out,)
    if home.kind == "conv" and len(delta.shape) == 2:
        return (*delta.shape, 1, 1)
    return delta.shape
