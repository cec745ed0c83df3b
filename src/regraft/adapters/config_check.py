"""Checking the fields of ``adapter_config.json`` that a conversion reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

from regraft.adapters.peft_config import ALL_LINEAR
from regraft.errors import Finding

PEFT_TYPES = frozenset(
    [
        "ADALORA",
        "ADAMSS",
        "ADAPTION_PROMPT",
        "ARROW",
        "BEFT",
        "BOFT",
        "BONE",
        "C3A",
        "CARTRIDGE",
        "CPT",
        "DEFT",
        "DELORA",
        "FOURIERFT",
        "FROD",
        "GLORA",
        "GRALORA",
        "HIRA",
        "HRA",
        "IA3",
        "LILY",
        "LN_TUNING",
        "LOHA",
        "LOKR",
        "LORA",
        "MISS",
        "MULTITASK_PROMPT_TUNING",
        "OFT",
        "OSF",
        "PEANUT",
        "POLY",
        "PREFIX_TUNING",
        "PROMPT_TUNING",
        "PSOFT",
        "PVERA",
        "P_TUNING",
        "RANDLORA",
        "ROAD",
        "SHADOW",
        "SHIRA",
        "SUPERTUNING",
        "TINYLORA",
        "TRAINABLE_TOKENS",
        "UNILORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
        "XLORA",
    ]
)
"""The values of ``peft_type`` that PEFT up to 0.21.2 knows."""

_AGAIN = "use the adapter_config.json that was saved with the weights"


def check_fields(config: Mapping[str, Any], where: str) -> list[Finding]:
    """What is wrong with a config; ``where`` is the file."""
    peft_type = config.get("peft_type")
    findings = []
    if peft_type not in PEFT_TYPES:
        findings.append(
            Finding(
                "peft-type",
                f"unknown peft_type {peft_type!r}; PEFT knows LORA, IA3, LOHA, … ({len(PEFT_TYPES)} types)",
                where=where,
                key="peft_type",
                fix="check the spelling; a config without peft_type is not PEFT's",
            )
        )
    if peft_type == "LORA":
        for key, expected in _problems(config):
            message = f"{expected} was expected, this is {config.get(key)!r}"
            findings.append(Finding("config", message, where=where, key=key, fix=_AGAIN))
    return findings


def _problems(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each field that is wrong, and what was expected."""
    if not _is_rank(config.get("r")):
        yield "r", "a positive whole number"
    if not _is_number(config.get("lora_alpha")):
        yield "lora_alpha", "a number"
    for key, sound, what in (
        ("rank_pattern", _is_rank, "positive whole numbers"),
        ("alpha_pattern", _is_number, "numbers"),
    ):
        table = config.get(key)
        if table is not None and not (
            isinstance(table, dict)
            and all(_is_expression(name) and sound(value) for name, value in table.items())
        ):
            yield key, f"a table of regular expressions and {what}"
    modules = config.get("target_modules")
    if isinstance(modules, str):
        if modules.lower() != ALL_LINEAR and not _is_expression(modules):
            yield "target_modules", "a list of names, a regular expression or 'all-linear'"
    elif not _is_names(modules):
        yield "target_modules", "a list of names, a regular expression or 'all-linear'"
    for key in ("target_parameters", "modules_to_save"):
        if not _is_names(config.get(key)):
            yield key, "a list of names"


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _is_names(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(x, str) for x in value))


def _is_expression(value: object) -> bool:
    try:
        re.compile(str(value))
    except re.error:
        return False
    return isinstance(value, str)
