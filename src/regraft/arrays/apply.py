"""The arrays reader: carry out a plan on tensors in memory, numpy's or torch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from regraft.arrays.move import move
from regraft.equation.lower import Copy, Nest, nest_of, strides_of
from regraft.errors import BadInputError, Finding
from regraft.planning.plan import Entry, Plan, walk


def apply_plan(plan: Plan, tensors: Sequence[Any]) -> dict[str, Any]:
    """The result of a plan: names to tensors of the kind that came in; what only changes its name is not copied.

    ``tensors[i]`` has the id ``i`` of the plan's headers. Bits are moved, values are never read, so any dtype goes.

    Raises ``BadInputError`` where tensors of different dtypes would become one.
    """
    result: dict[str, Any] = {}
    findings: list[Finding] = []
    for entry in plan.entries:
        _apply_entry(entry, plan, tensors, result, findings)
    for carried in plan.carried:
        names = carried.group.names()
        result.update(zip(names, (tensors[i] for i in carried.group.ids.tolist()), strict=True))
    if findings:
        raise BadInputError(findings)
    return result


def _apply_entry(
    entry: Entry,
    plan: Plan,
    tensors: Sequence[Any],
    result: dict[str, Any],
    findings: list[Finding],
) -> None:
    keys = [entry.keys(term).names() for term in entry.written]
    slots = [len(names) // len(entry) for names in keys]
    if len(entry.read) == len(entry.written) == 1 and entry.read[0].dims == entry.written[0].dims:
        ids = entry.sources[0].reshape(-1).tolist()
        result.update(zip(keys[0], (tensors[i] for i in ids), strict=True))
        return
    work = [
        (copy.source, copy.target, nest_of(copy, *_shapes(entry, copy)), *_steps(entry, copy))
        for copy in entry.copies
    ]
    for loop in range(len(entry)):
        used = [ids[loop].reshape(-1).tolist() for ids in entry.sources]
        dtypes = {str(tensors[i].dtype): i for ids in used for i in ids}
        if len(dtypes) > 1:
            findings.append(
                Finding(
                    "dtype",
                    f"tensors of {', '.join(dtypes)} would become one tensor",
                    key=plan.headers.name(next(iter(dtypes.values()))),
                    rule=str(entry.rule),
                    fix="cast them to one dtype first",
                )
            )
            continue
        like = tensors[used[0][0]]
        made = [
            [_empty(entry.shape(term), like) for _ in range(slots[number])]
            for number, term in enumerate(entry.written)
        ]
        for source, target, nest, from_slots, to_slots, from_at, to_at in work:
            for i in range(len(from_slots)):
                _move(
                    nest,
                    tensors[used[source][from_slots[i]]],
                    made[target][to_slots[i]],
                    from_at[i],
                    to_at[i],
                )
        for number, names in enumerate(keys):
            first = loop * slots[number]
            result.update(zip(names[first : first + slots[number]], made[number], strict=True))


def _shapes(entry: Entry, copy: Copy) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (
        entry.flat_shape(entry.read[copy.source]),
        entry.flat_shape(entry.written[copy.target]),
    )


def _steps(entry: Entry, copy: Copy) -> tuple[list[int], list[int], list[int], list[int]]:
    """For every value of the axes that stand in a key: source slot, target slot, and the offsets there."""
    axes = [axis for axis in copy.axes if axis.source.in_key or axis.target.in_key]
    slots, offsets = [], []
    for target, shape in enumerate(_shapes(entry, copy)):
        slot, dims = walk(entry, copy, axes, bool(target))
        slots.append(slot.tolist())
        offsets.append((np.array(strides_of(shape), dtype=np.int64) @ dims).tolist())
    return slots[0], slots[1], offsets[0], offsets[1]


def _empty(shape: tuple[int, ...], like: Any) -> Any:
    if isinstance(like, np.ndarray):
        return np.empty(shape, like.dtype)
    return like.new_empty(shape)


def _move(nest: Nest, source: Any, target: Any, source_offset: int, target_offset: int) -> None:
    if isinstance(source, np.ndarray):
        move(nest, source, target, source_offset, target_offset)
        return
    source = source.contiguous()
    target.as_strided(
        nest.sizes,
        nest.target_strides,
        target.storage_offset() + nest.target_offset + target_offset,
    ).copy_(
        source.as_strided(
            nest.sizes,
            nest.source_strides,
            source.storage_offset() + nest.source_offset + source_offset,
        )
    )
