"""What the header of a file says of scales, checked where the file is opened.

diffusers writes each component's PEFT config there, as JSON with prefixed keys; sd-scripts and others one alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite, nan
from typing import Any

from regraft.dialects.peft.config_check import check_fields
from regraft.errors import BadInputError, Finding
from regraft.storage.json_files import parse_json

ADAPTER_METADATA = "lora_adapter_metadata"
"""diffusers' entry of the header: the PEFT config of each component, as JSON with prefixed keys."""

READ = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
"""The fields of a component's config that say how its factors are scaled."""
_UNSAID = ("", "none")
USUAL: Mapping[str, Any] = {"r": 8, "lora_alpha": 8}
"""What PEFT takes where a config has one of its fields and not these: diffusers hands the header's config to it."""


def settings_of(metadata: Mapping[str, str], where: str) -> dict[str, dict[str, Any]]:
    """The PEFT config of each component that a header has, with PEFT's own rank and alpha where it says none.

    Raises ``BadInputError`` with every field that has a wrong value: scales are computed from them.
    """
    text = metadata.get(ADAPTER_METADATA)
    if text is None:
        return {}
    parts: dict[str, dict[str, Any]] = {}
    for name, value in parse_json(text, where, ADAPTER_METADATA).items():
        component, _, setting = name.partition(".")
        parts.setdefault(component, {})[setting] = value
    findings = []
    for component, settings in parts.items():
        read = {name: settings[name] for name in READ if name in settings}
        if not read:
            continue
        parts[component] = {**USUAL, **settings}
        findings += [
            replace(finding, key=f"{ADAPTER_METADATA}: {component}.{finding.key}", fix=_AGAIN)
            for finding in check_fields({"peft_type": "LORA", **USUAL, **read}, where)
        ]
    if findings:
        raise BadInputError(findings)
    return parts


_AGAIN = "save the file again with the tool that made it"


def plain_alpha(metadata: Mapping[str, str], name: str, where: str) -> float | None:
    """An entry with one alpha for all modules; ``None`` where it says that there is none.

    Raises ``BadInputError`` where it is no finite number.
    """
    text = metadata[name].strip()
    if text.lower() in _UNSAID:
        return None
    try:
        value = float(text)
    except ValueError:
        value = nan
    if isfinite(value):
        return value
    raise BadInputError(
        Finding(
            "config",
            f"expected a finite number, found {text[:80]!r}",
            where=where,
            key=name,
            fix="correct the header: no tensor says alpha, so it is taken from there",
        )
    )
