"""WaveFT: a few coefficients of a wavelet transform, at places that a seed and the weight's shape tell.

Source: PEFT 0.21.2, ``peft/tuners/waveft/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    LORA,
    Family,
    NoImageError,
    Pair,
    Part,
    Sizes,
    Weight,
    Wide,
    as_wide,
    cells,
    narrowed,
)
from regraft.adapters.families.seeded import random_order
from regraft.adapters.form import Array
from regraft.names.keys import Ints

_HAAR = ("db1", "haar")


class WaveFt(Family):
    """One rank-one matrix for each coefficient: what it is along out times what it is along in."""

    types = ("WAVEFT",)
    title = "WaveFT"
    prefix = "waveft_"
    fields = {"n_frequency": "n_frequency_pattern"}
    formula = "W + scaling · idwt2(spectrum)"
    rank = "n"
    fixed = "its coefficients are those of the whole weight"
    table = cells(rest=LORA)

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        if not self.config.get("proportional_parameters"):  # else it goes by the weight's size
            self.check_field("n_frequency", tensors["waveft_spectrum"].size, settings)
        return None, None

    def lora(self, part: Part, weight: Weight) -> Pair:
        (spectrum,) = as_wide(part["waveft_spectrum"])
        count = spectrum.shape[-1]
        places = random_order(part.out * part.into, int(self.config["random_loc_seed"]))[:count]
        p, q = np.divmod(places, part.into)
        if self.config.get("use_idwt", True):
            family = self.config["wavelet_family"]
            if family not in _HAAR:
                raise NoImageError(
                    f"regraft knows the wavelet 'db1', and not {family!r}, which this adapter uses"
                )
            # What PEFT calls details along in are those along out, and the other way round.
            b = _waves(part.out, p, q >= _half(part.into))
            a = _waves(part.into, q, p >= _half(part.out))
        else:
            b, a = np.eye(part.out)[:, p], np.eye(part.into)[:, q]
        scaled = spectrum[..., :, None] * float(self.config["scaling"]) * a.T
        like = part["waveft_spectrum"]
        made = np.broadcast_to(b, (*spectrum.shape[:-1], *b.shape))
        return narrowed(scaled, like), narrowed(np.asarray(made), like)


def _half(size: int) -> int:
    """How many coefficients of either sort there are: the size is made even."""
    return (size + 1) // 2


def _waves(size: int, places: Ints, details: Array) -> Wide:
    """(size, n): what each coefficient is along one axis: two numbers of one size, of a detail the second negative."""
    made = np.zeros((2 * _half(size), len(places)))
    starts = 2 * (places % _half(size))
    each = np.arange(len(places))
    made[starts, each] = sqrt(0.5)
    made[starts + 1, each] = np.where(details, -sqrt(0.5), sqrt(0.5))
    return made[:size]
