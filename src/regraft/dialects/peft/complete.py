"""Whether an adapter has what its config promises, and how many experts there are where no base says it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from regraft.dialects.peft.config import targets_module
from regraft.dialects.peft.scan import PREFIX
from regraft.errors import Finding
from regraft.names.keys import Group
from regraft.planning.gaps import gaps_in
from regraft.planning.side import Side


def named_everywhere(config: Mapping[str, Any]) -> list[str] | None:
    """``target_modules`` where every module with a listed name was adapted; ``None`` where something filters them."""
    entries = config.get("target_modules")
    filtered = config.get("layers_to_transform") is not None or config.get("exclude_modules")
    return entries if isinstance(entries, list) and not filtered else None


def names_all(config: Mapping[str, Any]) -> bool:
    """Whether the last expert that was seen is the last: a config of leaf names adapts every one that there is."""
    entries = named_everywhere(config)
    return entries is not None and not any(
        part.isdigit() for entry in entries for part in entry.split(".")
    )


def find_lost(
    groups: Iterable[Group], side: Side, config: Mapping[str, Any], where: str
) -> Iterator[Finding]:
    """Where a listed name adapts every expert, an expert that is not in the file was lost.

    That is the file's fault, whatever is made of it; experts that no listed name speaks of are not adapted, and
    are zeros where a layout stacks them.
    """
    entries = named_everywhere(config)
    if entries is None:
        return
    for gap in gaps_in(groups, side, all_seen=names_all(config)):
        modules = [name.removesuffix(".weight") for name in gap.names()]
        lost = [module for module in modules if targets_module(entries, module)]
        if lost:
            more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
            yield Finding(
                "missing",
                f"target_modules names it and the base model has it, but the file has no factors for it{more}",
                where=where,
                key=PREFIX + lost[0],
                fix="check that --model is the base it was trained on, otherwise save it again; if it was left out "
                "on purpose, name the modules that are there one by one in target_modules",
            )
