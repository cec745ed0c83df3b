"""What a PEFT adapter adds to its base, read from its files by PEFT's own formulas.

Nothing here knows the converter's geometry or how it packs experts.

Source: PEFT 0.18.1 and 0.21.2, ``get_delta_weight`` of ``Linear``, ``Embedding`` and ``ParamWrapper`` in
``peft/tuners/lora/layer.py``, and ``inject_adapter`` in ``peft/tuners/tuners_utils.py`` for nested parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from regraft.adapters.deltas import Deltas
from regraft.adapters.detect import Known
from regraft.adapters.form import Array
from regraft.adapters.protocol import Reading
from regraft.arrays.pieces import Take, Wide, multiply, take_along, take_part
from regraft.dialects.peft.config import LoraConfig, targets_parameter
from regraft.dialects.peft.packing import BEFORE
from regraft.dialects.peft.scan import Scan
from regraft.dialects.peft.source import Source
from regraft.names.keys import group_names
from regraft.storage.safetensors import TensorFile


@dataclass(frozen=True, slots=True, eq=False)
class _Factors:
    """The factors of one base tensor as they are in the file, and how PEFT multiplies them."""

    a: Array
    b: Array
    """Shapes and dtypes; what they hold may stand only in the file."""
    names: tuple[str, str]
    scale: float
    experts: int = 0
    """How many experts the factors are packed for; 0 where the tensor is one matrix."""
    crossed: bool = False
    """Whether the product is turned before it is added: the tensor is stored (in, out)."""

    def shape(self) -> tuple[int, ...]:
        """The shape of the base tensor."""
        if not self.experts:
            first, rest = self.b.shape[0], self.a.shape[1:]
            return (*rest, first) if self.crossed else (first, *rest)
        sizes = self.b.shape[0], self.a.shape[1]
        return (self.experts, *(sizes[::-1] if self.crossed else sizes))


class PeftDeltas(Deltas):
    """What one adapter adds to its base, by base tensor, in its own layout."""

    def __init__(
        self, source: Source, known: Known, layout: str, packing: str | None = None
    ) -> None:
        self.scan = source.scan()
        self.stored = source.tensors
        self._factors: list[_Factors] = []
        self._unpacked: dict[int, tuple[Array, Array]] = {}
        super().__init__(_outlined(source, self.scan), known, layout, packing)

    def _take_factors(self, reading: Reading) -> None:
        """Find them by PEFT's names, with PEFT's scales."""
        if self.family is None:
            config = self.source.config if self.source.plain else {"r": 1, "lora_alpha": 1}
            self._factors = list(self._read_lora(config, reading.packing))

    def _read_lora(self, config: Mapping[str, Any], packing: str | None) -> Iterator[_Factors]:
        """The factors of every base tensor, found by PEFT's names, with PEFT's scale."""
        names, lora = list(self.source.tensors), LoraConfig(config)
        found: dict[str, dict[int, tuple[str, str]]] = {}
        attentions: dict[str, tuple[str, int]] = {}
        for pairs in self.scan.pairs:
            rows = zip(pairs.modules.names(), pairs.a.tolist(), pairs.b.tolist(), strict=True)
            for path, a, b in rows:
                found.setdefault(path, {})[pairs.depth] = names[a], names[b]
            if pairs.attention:
                # PEFT has one rank and alpha for both projections, and adds that of out_proj twice.
                times = 2 if pairs.attention == "out" else 1
                for path, owner in zip(pairs.modules.names(), pairs.owners(), strict=True):
                    attentions[f"{path}.{pairs.parameter}"] = owner, times
        nested: dict[str, list[str]] = {}
        for key in self.ids:
            path, _, parameter = key.rpartition(".")
            nested.setdefault(path, []).append(parameter)
        varies = not lora.is_uniform
        common = lora.scale("").value
        for key in sorted(self.ids, key=self.ids.__getitem__):
            number = self.ids[key]
            path, _, parameter = key.rpartition(".")
            pair = found[path].get(0)
            if len(found[path]) > 1:
                # PEFT wraps a module's parameters one after the other, so the first ends up innermost.
                listed = self.side.parameters(group_names([path])[0]) or nested[path]
                order = [name for name in listed if name in nested[path]]
                pair = found[path].get(len(order) - 1 - order.index(parameter))
            assert pair is not None
            named, times = attentions.get(key) or (self._called(key, config), 1)
            scale = times * (lora.scale(named).value if varies else common)
            kind, shape = self._kinds[number], self.headers.shapes[number]
            a, b = (self.source.tensors[name] for name in pair)
            yield _factors(_Factors(a, b, pair, scale), kind, shape, packing)

    def _values(self, factors: _Factors) -> tuple[Array, Array]:
        a, b = (self.stored[name] for name in factors.names)
        return a, b

    def _called(self, key: str, config: Mapping[str, Any]) -> str:
        """What PEFT matches ``rank_pattern`` and ``alpha_pattern`` against: a module, or a parameter of one."""
        path, _, parameter = key.rpartition(".")
        if parameter != "weight" or targets_parameter(config.get("target_parameters"), key):
            return key
        return path

    def shape(self, number: int) -> tuple[int, ...]:
        """The shape of a base tensor."""
        if self._factors:
            return self._factors[number].shape()
        return self._whole(number).shape

    def part(self, number: int, takes: Sequence[Take]) -> Wide:
        """Part of what is added to a base tensor, dim by dim, in float64."""
        if not self._factors:
            return take_part(self._whole(number), takes)
        factors = self._factors[number]
        if factors.experts:
            return self._part_of_stack(number, factors, takes)
        a, b = self._values(factors)
        rest = a.shape[1:]
        along = [*takes, *[None] * (1 + len(rest) - len(takes))]
        if factors.crossed:
            along = [along[-1], *along[:-1]]
        b = take_along(b.reshape(len(b), -1), along[0], 0)
        for dim, take in enumerate(along[1:], 1):
            a = take_along(a, take, dim)
        made = _product(b, a.reshape(len(a), -1), factors.scale)
        return made.T if factors.crossed else made.reshape(len(b), *a.shape[1:])

    def _part_of_stack(self, number: int, factors: _Factors, takes: Sequence[Take]) -> Wide:
        experts, first, second = (*takes, None, None, None)[:3]
        if number not in self._unpacked:
            a, b = self._values(factors)
            count = factors.experts
            if len(self._unpacked) >= _KEPT:
                self._unpacked.clear()
            self._unpacked[number] = (
                a.reshape(count, -1, a.shape[1]),
                np.ascontiguousarray(b.reshape(len(b), -1, count).transpose(2, 0, 1)),
            )
        a, b = (take_along(x, experts, 0) for x in self._unpacked[number])
        one, other = (second, first) if factors.crossed else (first, second)
        made = _product(take_along(b, one, 1), take_along(a, other, 2), factors.scale)
        return made.swapaxes(1, 2) if factors.crossed else made


_KEPT = 3
"""Stacks of factors that stay unpacked."""


def _outlined(source: Source, scan: Scan) -> Source:
    """A source of a file: its factors are shapes and dtypes, for what looks at them all at once."""
    stored = source.tensors
    if not isinstance(stored, TensorFile):
        return source
    names = list(stored)
    factors = {names[i] for p in scan.pairs for i in (*p.a.tolist(), *p.b.tolist())}
    tensors = {n: stored.outline(n) if n in factors else stored[n] for n in names}
    return replace(source, tensors=tensors)


def _product(b: Array, a: Array, scale: float) -> Wide:
    with np.errstate(all="ignore"):
        return multiply(b.astype(np.float64) * scale, a.astype(np.float64))


def _factors(pair: _Factors, kind: str, shape: Sequence[int], packing: str | None) -> _Factors:
    """The factors of a tensor of some kind and shape, as ``ParamWrapper`` reads them for stacked experts."""
    if not kind.startswith("experts"):
        return replace(pair, crossed=kind in ("embedding", "conv1d"))
    if shape[0] == 1:
        return replace(pair, experts=1)
    # Dim 1 is in and dim 2 is out for PEFT 0.18, whatever they are. Since 0.19 it exchanges the two, except on
    # modules that say that they store (in, out).
    crossed = packing == BEFORE or kind == "experts-transposed"
    made = replace(pair, experts=shape[0], crossed=crossed)
    other = replace(made, crossed=not made.crossed)
    return other if made.shape() != tuple(shape) == other.shape() else made


__all__ = ["PeftDeltas"]
