"""The defects of loaders by what they look like, in plain words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from regraft.checking.verdict import Row

_ERRORS: tuple[tuple[str, str], ...] = (
    (
        r"without also targeting",
        "PEFT fuses gate and up of the experts only where both are adapted; here one of them is not",
    ),
    (
        r"ParamWrapper does not work with lora_dropout",
        "the experts are one parameter now, and PEFT adapts parameters without lora_dropout only",
    ),
    (
        r"ParamWrapper does not work with",
        "the experts are one parameter now, and PEFT adapts parameters with plain LoRA only",
    ),
    (
        r"stack expects each tensor to be equal size|expected a non-empty list|Sizes of tensors must match",
        "PEFT stacks the experts' factors as they are: every part of every expert must be adapted, with one rank",
    ),
    (
        r"size mismatch",
        "PEFT makes its layers by the config, and finds other sizes in the file: patterns for ranks keep old "
        "names, or the packing of the experts is another",
    ),
    (
        r"^NoMatchingPeftModuleError|not found in the base model|No layers types compatible",
        "the config names modules that this model has not: PEFT does not translate it for this model type, or not "
        "this way of naming",
    ),
    (
        r"Target module .* is not supported",
        "what the config names is no Linear any more, and PEFT adapts it as a parameter only",
    ),
    (
        r"^KeyError: .*(weight|bias)'?$",
        "PEFT does not rename saved modules: the file has them under their old names",
    ),
    (
        r"base_model_prefix",
        "PEFT asks the holder of the model for something that only the model has",
    ),
)


def causes_of_error(error: str) -> list[str]:
    """What makes PEFT raise this, where that is known.

    >>> causes_of_error("ValueError: Cannot convert PEFT target(s) w1 without also targeting w3")[0][:10]
    'PEFT fuses'
    """
    return [words for pattern, words in _ERRORS if re.search(pattern, error)][:1]


def causes_of_rows(
    rows: Iterable[Row], config: Mapping[str, Any], reclaimed: Sequence[str], *, moved: bool
) -> list[str]:
    """Why tensors do not land, by what became of them.

    ``reclaimed`` are the leaf names that PEFT claims for the experts, ``moved`` tells that the adapter is in another
    layout than the model.
    """
    found: dict[str, None] = {}
    for row in rows:
        words = _cause(row, config, reclaimed, moved=moved)
        if words:
            found[words] = None
    return list(found)


def _cause(
    row: Row, config: Mapping[str, Any], reclaimed: Sequence[str], *, moved: bool
) -> str | None:
    if "NaN" in row.detail:
        return "the file holds values that are no finite numbers"
    if row.outcome == "scaled":
        if config.get("use_rslora"):
            return (
                "PEFT doubles rank and alpha where it fuses two LoRAs; with rsLoRA alpha is divided by the root of "
                "the rank, so the scale comes out wrong"
            )
        return "PEFT does not translate alpha_pattern to the new names, so another alpha is used"
    if row.outcome == "dropped":
        leaf = row.pattern.removesuffix(".weight").rpartition(".")[2]
        if leaf in reclaimed and not re.search(r"\.experts\.", row.pattern):
            return (
                f"PEFT takes {leaf} for a name of the experts and moves it out of target_modules, so modules of that "
                "name are not adapted"
            )
        if row.detail.startswith("PEFT makes"):
            return "PEFT makes the layer, but looks for its tensors under another name than they have or get"
        if moved:
            return (
                "the file and its config have old names here, which PEFT does not translate; tensors without a "
                "place are left out without an error"
            )
        return "the config does not name it in a way that PEFT understands"
    if row.outcome == "differs":
        return (
            "PEFT's own conversion gives other values here"
            if moved
            else "PEFT computes something else here"
        )
    if row.outcome == "extra":
        return "PEFT adapts more than the adapter did: filters by layer and name do not hold for parameters"
    if row.outcome in ("uncalled", "fails"):
        return row.detail
    return None
