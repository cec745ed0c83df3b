"""What a PEFT adapter adds to its base, read from its files by PEFT's own formulas.

`read_deltas` is the one door: base tensors by key, and any part of what is added to one of them, in the shape that the
base stores it in. Nothing here knows the converter's geometry or how it packs experts.

Source: PEFT 0.18.1 and 0.21.2, ``get_delta_weight`` of ``Linear``, ``Embedding`` and ``ParamWrapper`` in
``peft/tuners/lora/layer.py``, and ``inject_adapter`` in ``peft/tuners/tuners_utils.py`` for nested parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from regraft.adapters.base_weights import BaseWeights
from regraft.adapters.convert import Identity, move_rest, read
from regraft.adapters.detect import Known
from regraft.adapters.families.base import NoImageError
from regraft.adapters.form import Array, Saved
from regraft.arrays.pieces import Take, Wide, multiply, take_along, take_part
from regraft.dialects.peft.config import LoraConfig, targets_parameter
from regraft.dialects.peft.fitting import check_fit
from regraft.dialects.peft.packing import BEFORE
from regraft.dialects.peft.scan import Scan
from regraft.dialects.peft.source import Source
from regraft.errors import BadInputError, Finding
from regraft.names.keys import group_names
from regraft.rules.kinds import BATCH, IN, KINDS, OUT
from regraft.storage.safetensors import TensorFile


def read_deltas(source: Source, known: Known, layout: str, packing: str | None = None) -> Deltas:
    """What an adapter adds to base tensors, in its own layout; ``packing`` where it was told.

    Raises ``BadInputError`` and its kin where PEFT would not read the files as they are meant.
    """
    return Deltas(source, known, layout, packing)


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


class Deltas:
    """What one adapter adds to its base, by base tensor, in its own layout."""

    def __init__(
        self, source: Source, known: Known, layout: str, packing: str | None = None
    ) -> None:
        self.source, self.known, self.layout = source, known, layout
        self.family = source.family
        self.scan = source.scan()
        self.stored = source.tensors
        self.source = source = _outlined(source, self.scan)
        self.base = BaseWeights.of(known, layout)
        identity = Identity(known, layout, packing, ())
        self.side = identity.side()
        reading = read(source, identity, self.base)
        self.tuned, self.tuner = reading.adapter.modules, reading.adapter.family
        self._factors: list[_Factors] = []
        self.headers = reading.adapter.headers
        checked = reading.adapter.factors or reading.adapter.modules
        assert checked is not None
        self.ids: dict[str, int] = {}
        self._kinds: dict[int, str] = {}
        for keys, kind in checked.kinds:
            ids = keys.ids.tolist()
            self.ids.update(zip(keys.names(), ids, strict=True))
            self._kinds.update(dict.fromkeys(ids, kind))
        if self.family is None:
            config = source.config if source.plain else {"r": 1, "lora_alpha": 1}
            self._factors = list(self._read_lora(config, reading.packing))
        check_fit(self.scan, source, known, self.base)
        self._last: tuple[int, Wide] | None = None
        self._unpacked: dict[int, tuple[Array, Array]] = {}

    def _read_lora(self, config: Mapping[str, Any], packing: str | None) -> Iterator[_Factors]:
        """The factors of every base tensor, found by PEFT's names, with PEFT's scale."""
        names, lora = list(self.source.tensors), LoraConfig(config)
        found: dict[str, dict[int, tuple[str, str]]] = {}
        for pairs in self.scan.pairs:
            rows = zip(pairs.modules.names(), pairs.a.tolist(), pairs.b.tolist(), strict=True)
            for path, a, b in rows:
                found.setdefault(path, {})[pairs.depth] = names[a], names[b]
        nested: dict[str, list[str]] = {}
        for key in self.ids:
            path, _, parameter = key.rpartition(".")
            nested.setdefault(path, []).append(parameter)
        varies = bool(lora.ranks) or bool(lora.alphas)
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
            scale = lora.scale(self._called(key, config)).value if varies else common
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

    def kind(self, number: int) -> str:
        """The kind of a base tensor: which of its dims are experts, out and in."""
        return self._kinds[number]

    def shape(self, number: int) -> tuple[int, ...]:
        """The shape of a base tensor."""
        if self._factors:
            return self._factors[number].shape()
        return self._dense(number).shape

    def part(self, number: int, takes: Sequence[Take]) -> Wide:
        """Part of what is added to a base tensor, dim by dim, in float64."""
        if not self._factors:
            return take_part(self._dense(number), takes)
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

    def _dense(self, number: int) -> Wide:
        """What a family adds to a base tensor, as a whole, in the shape that the tensor is stored in."""
        if self._last is None or self._last[0] != number:
            assert self.tuned is not None
            assert self.tuner is not None
            part = self.tuned.parts[number]
            name = self.headers.name(number)
            try:
                made = self.tuner.delta(part, lambda: self._weight(name, part.kind))
                dense = self._stored(number, np.asarray(made, dtype=np.float64))
            except (KeyError, ValueError) as error:
                # Nothing has looked at an adapter that stays in its layout as closely as its family does.
                raise BadInputError(
                    Finding(
                        "shape",
                        "the tensors of this module make no delta of the family that the config names: "
                        "one is missing, or its shape does not fit",
                        key=name,
                        fix="use the config that was saved with these weights",
                    )
                ) from error
            self._last = number, dense
        return self._last[1]

    def _stored(self, number: int, matrix: Wide) -> Wide:
        """A matrix (out, in) in the shape that its base tensor is stored in."""
        roles = KINDS[self._kinds[number]].roles or (OUT, IN)
        if BATCH not in roles and roles.index(IN) < roles.index(OUT):
            matrix = matrix.T
        shape = self.headers.shapes[number]
        return matrix.reshape(shape) if len(shape) > 2 else matrix

    def _weight(self, name: str, kind: str) -> Wide:
        found = self.base.matrix(name, kind)
        if found is None:
            raise NoImageError("the base's weights are needed", needs_base=True)
        return found

    def biases(self) -> dict[str, Array]:
        """The biases of modules whose family changes them, as they are to be."""
        tuned, family = self.tuned, self.tuner
        if tuned is None or family is None or not family.changes_bias:
            return {}
        made = {}
        for number, part in enumerate(tuned.parts):
            name = tuned.headers.name(number).removesuffix("weight") + "bias"
            bias = self.base.find(name)
            if bias is not None:
                made[name] = family.bias(part, bias.astype(np.float64)).astype(bias.dtype)
        return made

    def bare_biases(self) -> Iterator[str]:
        """The names of biases that a family makes for modules that have none in the base.

        Without the base's weights any module may have one, and there are none.
        """
        tuned, family = self.tuned, self.tuner
        if tuned is None or family is None or not family.changes_bias or self.base.weights is None:
            return
        for number, part in enumerate(tuned.parts):
            name = tuned.headers.name(number).removesuffix("weight") + "bias"
            if self.base.find(name) is None and family.bias(part, np.zeros(part.out)).any():
                yield name

    @property
    def changes_bias(self) -> bool:
        """Whether the family changes biases as well."""
        return self.tuner is not None and self.tuner.changes_bias

    def bias_shape(self, number: int) -> tuple[int, ...]:
        """The shape of a base tensor, also where its delta cannot be told."""
        if self.tuned is None:
            return self.shape(number)
        part = self.tuned.parts[number]
        return self._stored(number, np.broadcast_to(np.zeros(1), (part.out, part.into))).shape

    def bias_part(self, number: int, takes: Sequence[Take]) -> Wide:
        """What a module's bias of zeros becomes, laid out like its weight: the same along in."""
        if self.tuned is None or self.tuner is None or not self.tuner.changes_bias:
            return take_part(np.broadcast_to(np.zeros(1), self.bias_shape(number)), takes)
        part = self.tuned.parts[number]
        made = np.asarray(self.tuner.bias(part, np.zeros(part.out)), dtype=np.float64)
        whole = np.broadcast_to(made[:, None], (part.out, part.into))
        return take_part(self._stored(number, whole), takes)

    def others(self) -> dict[str, Array]:
        """Tensors that are no part of a delta, by the base tensors that they stand for."""
        tensors = list(self.source.tensors.values())
        found = dict(self.source.unbound())
        for group in self.source.saved():
            ids = group.keys.ids.tolist()
            names = group.keys.names()
            found.update((name, tensors[i]) for name, i in zip(names, ids, strict=True))
        return found

    def moved_others(self, target: str) -> list[Saved]:
        """The same in a layout."""
        identity = Identity(self.known, self.layout, None, ())
        return move_rest(self.source, identity, None if target == self.layout else target)


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


__all__ = ["Deltas", "read_deltas"]
