"""What an adapter adds to its base, by base tensor: any part of it, in float64, as the base stores the tensor.

`Opened.deltas` is the one door. The factors of plain LoRAs are multiplied as their dialect reads them; PEFT's are
read by PEFT's own formulas. Nothing here knows the converter's geometry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from regraft.adapters.base_weights import BaseWeights
from regraft.adapters.complete import check_whole
from regraft.adapters.convert import Identity, move_rest, read
from regraft.adapters.detect import Known
from regraft.adapters.families.base import NoImageError
from regraft.adapters.form import Array, Saved
from regraft.adapters.protocol import Opened, Reading
from regraft.arrays.pieces import Take, Wide, multiply, take_part
from regraft.errors import BadInputError, Finding
from regraft.rules.kinds import BATCH, IN, KINDS, OUT


class Deltas:
    """What one adapter adds to its base, by base tensor, in its own layout.

    Raises ``BadInputError`` and its kin where its files cannot be read as they are meant.
    """

    source: Any
    """The opened adapter."""

    def __init__(
        self, source: Opened, known: Known, layout: str, packing: str | None = None
    ) -> None:
        self.source, self.known, self.layout = source, known, layout
        self.family = source.family
        self.base = BaseWeights.of(known, layout)
        identity = Identity(known, layout, packing, ())
        self.side = identity.side
        self.reading = reading = read(source, identity, self.base)
        check_whole(source, reading, self.side)
        self.tuned, self.tuner = reading.adapter.modules, reading.adapter.family
        self.headers = reading.adapter.headers
        self.ids: dict[str, int] = {}
        """The base tensors by key."""
        self._kinds: dict[int, str] = {}
        adapted = reading.adapter.factors or reading.adapter.modules
        assert adapted is not None
        for keys, kind in adapted.kinds:
            ids = keys.ids.tolist()
            self.ids.update(zip(keys.names(), ids, strict=True))
            self._kinds.update(dict.fromkeys(ids, kind))
        self._last: tuple[int, Wide] | None = None
        self._take_factors(reading)

    def _take_factors(self, reading: Reading) -> None:
        """Keep the factors of a plain LoRA."""
        self._lora = reading.adapter.factors

    def kind(self, number: int) -> str:
        """The kind of a base tensor: which of its dims are experts, out and in."""
        return self._kinds[number]

    def shape(self, number: int) -> tuple[int, ...]:
        """The shape of a base tensor."""
        return self._whole(number).shape

    def part(self, number: int, takes: Sequence[Take]) -> Wide:
        """Part of what is added to a base tensor, dim by dim, in float64."""
        return take_part(self._whole(number), takes)

    def _whole(self, number: int) -> Wide:
        """What is added to a base tensor, as a whole, in the shape that the tensor is stored in."""
        if self._last is None or self._last[0] != number:
            made = self._of_family(number) if self.tuned is not None else self._of_lora(number)
            self._last = number, made
        return self._last[1]

    def _of_lora(self, number: int) -> Wide:
        factors = self._lora
        assert factors is not None
        a, b, scale = factors.a[number], factors.b[number], factors.scales[number].value
        usual = (OUT, IN) if a.ndim < 3 or b.ndim != 3 else (BATCH, OUT, IN)
        roles = KINDS[self._kinds[number]].roles or usual
        with np.errstate(all="ignore"):
            wide = b.astype(np.float64) * scale, a.astype(np.float64)
            if BATCH in roles:
                made = wide[0] @ wide[1]
                return made if roles.index(OUT) < roles.index(IN) else made.swapaxes(-1, -2)
            flat = multiply(wide[0].reshape(len(b), -1), wide[1].reshape(len(a), -1))
        return self._stored(number, flat)

    def _of_family(self, number: int) -> Wide:
        assert self.tuned is not None
        assert self.tuner is not None
        part = self.tuned.parts[number]
        name = self.headers.name(number)
        try:
            made = self.tuner.delta(part, lambda: self._weight(name, part.kind))
            return self._stored(number, np.asarray(made, dtype=np.float64))
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
        found = dict(self.reading.unbound)
        for group in self.reading.saved:
            ids = group.keys.ids.tolist()
            names = group.keys.names()
            found.update((name, tensors[i]) for name, i in zip(names, ids, strict=True))
        return found

    def moved_others(self, target: str) -> list[Saved]:
        """The same in a layout."""
        identity = Identity(self.known, self.layout, None, ())
        return move_rest(
            self.source, self.reading, identity, None if target == self.layout else target
        )


__all__ = ["Deltas"]
