"""FourierFT.

Source: PEFT 0.21.2, ``peft/tuners/fourierft/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from regraft.adapters.families.base import (
    LORA,
    Family,
    Pair,
    Part,
    Sizes,
    Weight,
    as_wide,
    cells,
    narrowed,
)
from regraft.adapters.families.seeded import (
    random_order,
)
from regraft.adapters.form import Array


class FourierFt(Family):
    """The real part of a sparse spectrum, at places that a seed and the weight's shape tell."""

    types = ("FOURIERFT",)
    title = "FourierFT"
    prefix = "fourierft_"
    fields = {"n_frequency": "n_frequency_pattern"}
    formula = "W + scaling · Re(ifft2(spectrum))"
    anchored = True
    rank = "2 n"
    fixed = "its frequencies are those of the whole weight"
    table = cells(rest=LORA)

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        self.check_field("n_frequency", tensors["fourierft_spectrum"].size, settings)
        return None, None

    def lora(self, part: Part, weight: Weight) -> Pair:
        (spectrum,) = as_wide(part["fourierft_spectrum"])
        count = spectrum.shape[-1]
        seed = int(self.config.get("random_loc_seed") or 777)
        places = random_order(part.out * part.into, seed)[:count]
        p, q = np.divmod(places, part.into)
        rows = 2 * np.pi * np.outer(np.arange(part.out), p) / part.out
        columns = 2 * np.pi * np.outer(q, np.arange(part.into)) / part.into
        each = spectrum[..., :, None] * (float(self.config["scaling"]) / (part.out * part.into))
        a = np.concatenate([each * np.cos(columns), each * np.sin(columns)], axis=-2)
        b = np.concatenate([np.cos(rows), -np.sin(rows)], axis=-1)
        made = np.broadcast_to(b, (*spectrum.shape[:-1], *b.shape))
        like = part["fourierft_spectrum"]
        return narrowed(np.asarray(a), like), narrowed(np.asarray(made), like)
