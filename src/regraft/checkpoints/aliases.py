"""Names that stand for other tensors: tied weights, as safetensors' ``save_model`` notes them in the metadata.

Such a name has no bytes. The plan treats it as a tensor; afterwards it is a name again, unless what
it stood for is no longer a tensor by itself.
Source: ``save_model`` and ``load_model`` of safetensors 0.6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from regraft.checkpoints.moves import Moves
from regraft.checkpoints.source import Source, Tensors
from regraft.names.keys import Group, Ints
from regraft.planning.plan import Entry, Plan
from regraft.values import replace


def find_aliases(source: Source) -> dict[str, int]:
    """The names, and the rows of the tensors that they stand for."""
    texts = {key: value for file in source.files for key, value in file.metadata.items()}
    if not any("." in key for key in texts):
        return {}
    rows = {name: row for row, name in enumerate(source.tensors.names)}
    return {
        key: rows[value]
        for key, value in texts.items()
        if "." in key and value in rows and key not in rows
    }


def use_owners(plan: Plan, owners: Mapping[int, int]) -> Plan:
    """The plan in which equations read the tensors that names stand for."""
    if not owners:
        return plan
    highest = max(owners)
    table = np.arange(highest + 1, dtype=np.int64)
    table[list(owners)] = list(owners.values())

    def resolve(ids: Ints) -> Ints:
        return np.where(ids < 0, ids, table[np.maximum(ids, 0)])

    def resolved(entries: Sequence[Entry]) -> tuple[Entry, ...]:
        return tuple(
            entry if entry.renames else replace(entry, sources=tuple(map(resolve, entry.sources)))
            for entry in entries
        )

    return replace(plan, entries=resolved(plan.entries), demands=resolved(plan.demands))


def add_aliases(moves: Moves, plan: Plan, owners: Mapping[int, int], tensors: Tensors) -> list[str]:
    """Add the new names to what is moved; the old ones that are tensors of their own from now on.

    ``plan`` is the one in which they are sources.
    """
    names = {row: plan.headers.name(row) for row in owners}
    moves.aliases.update(dict.fromkeys(names.values()))
    stays: set[int] = set()
    renamed: dict[int, str] = {}

    def note(keys: Group, ids: Ints) -> None:
        stays.update(ids.tolist())
        for at in np.flatnonzero(np.isin(ids, list(owners))).tolist():
            renamed[int(ids[at])] = keys.name(at)

    for entry in plan.entries:
        if entry.renames:
            note(entry.keys(entry.written[0]), entry.sources[0].reshape(-1))
    for carried in plan.carried:
        note(carried.group, carried.group.ids)
    for row, name in renamed.items():
        if owners[row] in stays:
            moves.aliases[names[row]] = name
        else:
            moves.add_whole([name], np.array([owners[row]], dtype=np.int64), tensors)
    return [old for old, new in moves.aliases.items() if new is None]
