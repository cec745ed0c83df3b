"""Which modules a config adapts, field by field, as PEFT decides it.

Source: PEFT 0.18.1 and 0.21.2, ``check_target_module_exists`` and ``_maybe_include_all_linear_layers`` in
``peft/tuners/tuners_utils.py``. ``target_parameters`` are matched without any of the fields that leave modules out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from regraft.dialects.peft.config import ALL_LINEAR, targets_module
from regraft.errors import Finding
from regraft.storage.expressions import Expression, expression

LEAVE_OUT = ("exclude_modules", "modules_to_save", "layers_to_transform")
"""Fields that keep PEFT from adapting modules that ``target_modules`` names."""

_FIRST_NUMBER_SINCE = (0, 20)
"""The release since which the layer is the first number in a path; before, it was the last (an expert's, say)."""

_HEADS = frozenset(
    {
        "cls.predictions.decoder",
        "embed_out",
        "generator_lm_head",
        "lm_head",
        "lm_head.decoder",
        "output_projection",
    }
)
"""What PEFT's ``all-linear`` leaves out: the output embeddings, by the names that ``get_output_embeddings`` of
transformers' models gives."""
_CLASSIFIERS = frozenset({"classifier", "score"})
"""What it leaves out of a model for sequence classification (``SEQ_CLS_HEAD_NAMES``)."""


class Targeting:
    """What ``adapter_config.json`` says of modules."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.entries = config.get("target_modules")
        self._excluded = config.get("exclude_modules") or []
        self._saved = [
            expression(rf"(^|.*\.){name}($|\..*)", "modules_to_save")
            for name in config.get("modules_to_save") or []
        ]
        self._layers = _layers(config.get("layers_to_transform"))
        self._layer_of = _layer_expressions(config)

    @property
    def leaves_out(self) -> bool:
        """Whether some module that ``target_modules`` names might not be adapted."""
        named = isinstance(self.entries, str) and self.entries.lower() == ALL_LINEAR
        return bool(self._excluded or self._saved or self._layers is not None or named)

    def left_out_by(self, path: str) -> str | None:
        """The field that keeps PEFT from adapting a module, ``None`` where none does.

        >>> Targeting({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}).left_out_by("l.0.q_proj")
        'exclude_modules'
        """
        if isinstance(self._excluded, str):
            if expression(self._excluded, "exclude_modules").fullmatch(path):
                return "exclude_modules"
        elif _ends(path, self._excluded):
            return "exclude_modules"
        if any(pattern.match(path) for pattern in self._saved):
            return "modules_to_save"
        if isinstance(self.entries, str):
            heads = _HEADS
            if self.config.get("task_type") == "SEQ_CLS":
                heads = heads | _CLASSIFIERS
            everything = self.entries.lower() == ALL_LINEAR
            return "target_modules" if everything and path in heads else None
        if self._layers is not None and path not in (self.entries or ()):
            layer = self._layer(path)
            if layer is None or layer not in self._layers:
                return "layers_to_transform"
        return None

    def targets(self, path: str) -> bool:
        """Whether PEFT adapts a module."""
        return targets_module(self.entries, path) and self.left_out_by(path) is None

    def _layer(self, path: str) -> int | None:
        for pattern in self._layer_of:
            found = pattern.match(path)
            if found is not None:
                return int(found["layer"])
        return None


def untargeted(paths: Iterable[str], targeting: Targeting, where: str, key: str) -> Finding | None:
    """The finding for modules whose tensors are there although a field leaves them out; ``key`` has a ``{}``."""
    found: dict[str, list[str]] = {}
    for path in paths:
        field = targeting.left_out_by(path)
        if field is not None:
            found.setdefault(field, []).append(path)
    for field, modules in found.items():
        more = f" (and {len(modules) - 1} more)" if len(modules) > 1 else ""
        return Finding(
            "not-targeted",
            f"{field} = {targeting.config.get(field)!r} of adapter_config.json leaves this module out, so PEFT would "
            f"ignore its tensors{more}",
            where=where,
            key=key.format(modules[0]),
            fix=f"use the config that was saved with these weights, or mend its {field}",
        )
    return None


def _ends(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith("." + name) for name in names)


def _layers(value: Any) -> frozenset[int] | None:
    """The layers that are adapted; an empty list stands for all."""
    if value is None or value == []:
        return None
    return frozenset(value if isinstance(value, list) else [value])


def _layer_expressions(config: Mapping[str, Any]) -> list[Expression]:
    """How PEFT finds a layer's number in a path, by the release that wrote the config."""
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    first = version is not None and (int(version[1]), int(version[2])) >= _FIRST_NUMBER_SINCE
    lead = ".*?" if first else ".*"
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not patterns:
        return [expression(rf"{lead}\.[^.]*\.(?P<layer>\d+)\.", "layers_to_transform")]
    start = r"(?:^|.*?\.)" if first else r".*\."
    return [
        expression(rf"{start}{pattern}\.(?P<layer>\d+)\.", "layers_pattern") for pattern in patterns
    ]
