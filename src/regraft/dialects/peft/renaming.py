"""An adapter's modules under other paths: its tensors, and a config that says the same of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from regraft.adapters.form import Array
from regraft.dialects.peft.config import LoraConfig, targets_parameter
from regraft.dialects.peft.targeting import Targeting
from regraft.names.keys import in_order

if TYPE_CHECKING:
    from regraft.dialects.peft.source import Source

_LISTS = ("target_modules", "target_parameters", "modules_to_save", "exclude_modules")


class RenamedTensors(Mapping[str, Array]):
    """Tensors under other names, read when they are asked for; ``names`` has the old name of each."""

    def __init__(self, tensors: Mapping[str, Array], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Array:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def renamed_config(source: Source, rename: Callable[[str], str]) -> dict[str, Any]:
    """The config of an adapter whose modules get other paths.

    Lists keep their entries, whole paths in them are renamed. An expression becomes the paths that it names, and
    patterns of ranks and alphas that would not say the same become whole paths. What it says of the base's class goes.
    """
    old = source.config
    made = dict(old)
    paths = [path for pairs in source.scan().pairs for path in pairs.modules.names()]
    for name in _LISTS:
        entries = made.get(name)
        if isinstance(entries, list):
            made[name] = [rename(entry) for entry in entries]
    layers = made.get("layers_to_transform") is not None or isinstance(
        made.get("layers_pattern"), str
    )
    if (
        isinstance(old.get("target_modules"), str)
        or isinstance(old.get("exclude_modules"), str)
        or layers
    ):
        named = Targeting(old)
        made["target_modules"] = sorted(
            {rename(p) for p in paths if named.targets(p)}, key=in_order
        )
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            if name in made:
                made[name] = None
    if made.get("auto_mapping"):
        made["auto_mapping"] = None
    if old.get("rank_pattern") or old.get("alpha_pattern"):
        _rename_patterns(old, made, paths, rename)
    return made


def _rename_patterns(
    old: Mapping[str, Any], made: dict[str, Any], paths: list[str], rename: Callable[[str], str]
) -> None:
    before = LoraConfig(old)
    targets = list(paths)
    for path in paths:
        for entry in old.get("target_parameters") or ():
            name = f"{path}.{entry.rpartition('.')[2]}"
            if targets_parameter([entry], name):
                targets.append(name)
    after = LoraConfig(made)
    if all(before.scale(name) == after.scale(rename(name)) for name in targets):
        return
    ranks, alphas = {}, {}
    for name in targets:
        scale = before.scale(name)
        key = "^" + re.escape(rename(name))
        if scale.rank != old["r"]:
            ranks[key] = scale.rank
        if scale.alpha != old["lora_alpha"]:
            alphas[key] = scale.alpha
    made["rank_pattern"], made["alpha_pattern"] = ranks, alphas
