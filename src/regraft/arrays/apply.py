"""The arrays reader: carry out a plan on tensors, numpy's or torch's, or such as are not read yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np

from regraft.arrays.lazy import Lazy, apply_lazily
from regraft.arrays.move import as_words, move, view_of
from regraft.equation.lower import Nest, Padding, strides_of
from regraft.equation.notation import Term
from regraft.errors import BadInputError, Finding, RefusedError
from regraft.planning.plan import Entry, Plan
from regraft.planning.rows import index_grid
from regraft.planning.steps import Demands, Output, Step, demands_of, output_of


def apply_plan(plan: Plan, tensors: Sequence[Any]) -> dict[str, Any]:
    """The result of a plan: names to tensors of the kind that came in; what only changes its name is not copied.

    ``tensors[i]`` has the id ``i`` of the plan's headers. Bits are moved, values are never read, so any dtype goes.

    Raises ``RefusedError`` where tensors of different dtypes would become one; ``BadInputError`` where copies differ or
    padding would be cut off that is none.
    """
    if tensors and isinstance(tensors[0], Lazy):
        return apply_lazily(plan, tensors)
    result: dict[str, Any] = {}
    findings: list[Finding] = []
    for entry in plan.demands:
        demands = demands_of(entry)
        for loop in range(len(entry)):
            _check_reads(entry, demands, loop, plan, tensors, findings)
    for output in [output_of(entry) for entry in plan.entries]:
        _apply_entry(output, plan, tensors, result, findings)
    for carried in plan.carried:
        names = carried.group.names()
        result.update(zip(names, (tensors[i] for i in carried.group.ids.tolist()), strict=True))
    if findings:
        sound = all(finding.code == "mixed-dtypes" for finding in findings)
        raise (RefusedError if sound else BadInputError)(findings)
    return result


def _apply_entry(
    output: Output,
    plan: Plan,
    tensors: Sequence[Any],
    result: dict[str, Any],
    findings: list[Finding],
) -> None:
    entry = output.entry
    if entry.renames:
        ids = entry.sources[0].reshape(-1).tolist()
        result.update(zip(output.names[0], (tensors[i] for i in ids), strict=True))
        return
    demands = demands_of(entry)
    for loop in range(len(entry)):
        if demands and not _check_reads(entry, demands, loop, plan, tensors, findings):
            continue
        made = _apply_loop(entry, loop, plan, tensors, output.steps, output.shapes, findings)
        if made is None:
            continue
        for names, arrays in zip(output.names, made, strict=True):
            count = len(arrays)
            result.update(zip(names[loop * count : (loop + 1) * count], arrays, strict=True))


def apply_loop(
    entry: Entry, loop: int, plan: Plan, tensors: Sequence[Any], steps: Sequence[Step]
) -> list[list[Any]]:
    """What one loop value of an entry makes: for every term that is written, its tensors in order.

    Raises as `apply_plan` does.
    """
    if entry.renames:
        return [[tensors[i] for i in entry.sources[0][loop].reshape(-1).tolist()]]
    findings: list[Finding] = []
    demands = demands_of(entry)
    made = None
    if not demands or _check_reads(entry, demands, loop, plan, tensors, findings):
        shapes = [entry.shape(term) for term in entry.written]
        made = _apply_loop(entry, loop, plan, tensors, steps, shapes, findings)
    if made is None:
        mixed = all(finding.code == "mixed-dtypes" for finding in findings)
        raise (RefusedError if mixed else BadInputError)(findings)
    return made


def _apply_loop(
    entry: Entry,
    loop: int,
    plan: Plan,
    tensors: Sequence[Any],
    steps: Sequence[Step],
    shapes: Sequence[tuple[int, ...]],
    findings: list[Finding],
) -> list[list[Any]] | None:
    """The same, of tensors that are as the entry demands; ``None`` and a finding where their dtypes differ."""
    used = [ids[loop].reshape(-1).tolist() for ids in entry.sources]
    dtypes = {str(tensors[i].dtype): i for ids in used for i in ids}
    if len(dtypes) > 1:
        findings.append(
            Finding(
                "mixed-dtypes",
                f"tensors of {', '.join(dtypes)} would become one tensor",
                key=plan.headers.name(next(iter(dtypes.values()))),
                rule=str(entry.rule),
                fix="cast them to one dtype first",
            )
        )
        return None
    like = tensors[used[0][0]]
    made = [
        [_empty(shape, like) for _ in range(prod(entry.stack(term)))]
        for term, shape in zip(entry.written, shapes, strict=True)
    ]
    for padding in entry.paddings(written=True):
        pad(entry, padding, made[padding.term])
    for step in steps:
        for source, target, source_at, target_at in step.places:
            _move(
                step.nest,
                tensors[used[step.source][source]],
                made[step.target][target],
                source_at,
                target_at,
            )
    return made


def _check_reads(
    entry: Entry,
    demands: Demands,
    loop: int,
    plan: Plan,
    tensors: Sequence[Any],
    findings: list[Finding],
) -> bool:
    """Whether what one loop value of an entry reads is as it demands; a finding where it is not."""
    used = [ids[loop].reshape(-1).tolist() for ids in entry.sources]
    wrong = check_read(entry, demands, [[tensors[i] for i in ids] for ids in used])
    if wrong is None:
        return True
    code, message, term, slot = wrong
    key = plan.headers.name(used[term][slot])
    findings.append(Finding(code, message, key=key, rule=str(entry.rule), fix=FIXES[code]))
    return False


FIXES = {
    "copies-differ": "make them equal, or give them to a layout that has each of them",
    "padding": "correct the tensor, or the sizes in the rule: what is cut off must be padding",
}

Wrong = tuple[str, str, int, int]
"""A code, a message, and the term and the slot of the tensor that is wrong."""


def check_read(entry: Entry, demands: Demands, tensors: Sequence[Sequence[Any]]) -> Wrong | None:
    """What is wrong with the tensors of one loop value: copies that differ, padding that is something else.

    ``tensors`` are those of every term of the side that is read, numpy's or torch's.
    """
    for step in demands.compared:
        nest = step.nest
        for slot, other_slot, at, other_at in step.places:
            one, other = tensors[step.source][slot], tensors[step.target][other_slot]
            offsets = nest.source_offset + at, nest.target_offset + other_at
            if one is other and offsets[0] == offsets[1]:
                continue
            views = (
                _view(one, nest.sizes, nest.source_strides, offsets[0]),
                _view(other, nest.sizes, nest.target_strides, offsets[1]),
            )
            if one.dtype != other.dtype or not bool((views[0] == views[1]).all()):
                message = "it is not equal to the others that become one tensor"
                return "copies-differ", message, step.target, other_slot
    for padding in demands.cut:
        for slot, view in padded(entry, entry.read, padding, tensors[padding.term]):
            if not bool((view == _value_bits(padding.value, tensors[padding.term][slot])).all()):
                message = (
                    f"what would be cut off is not padding: not all of it is {padding.value:g}"
                )
                return "padding", message, padding.term, slot
    return None


def pad(entry: Entry, padding: Padding, tensors: Sequence[Any]) -> None:
    """Put the value of padding where it belongs in tensors that are made."""
    for slot, view in padded(entry, entry.written, padding, tensors):
        view[...] = _value_bits(padding.value, tensors[slot])


def padded(
    entry: Entry, terms: Sequence[Term], padding: Padding, tensors: Sequence[Any]
) -> Iterator[tuple[int, Any]]:
    """Every block of padding: the slot of its tensor, and a view."""
    term = terms[padding.term]
    shape = entry.shapes[term]
    strides = strides_of(shape)
    stack = entry.stack(term)
    keyed = [(size, place) for size, place in padding.axes if place.in_key]
    inner = [(size, place) for size, place in padding.axes if not place.in_key]
    start = sum(a * b for a, b in zip(padding.start, strides, strict=True))
    for point in index_grid([size for size, _ in keyed]).T.tolist():
        holes = list(padding.key_start)
        for index, (_, place) in zip(point, keyed, strict=True):
            holes[place.index] += index * place.step
        slot = 0
        for hole, size in zip(holes, stack, strict=True):
            slot = slot * size + hole
        sizes = tuple(size for size, _ in inner)
        steps = tuple(place.step * strides[place.index] for _, place in inner)
        yield slot, _view(tensors[slot], sizes, steps, start)


def _view(tensor: Any, sizes: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Any:
    """Some elements of a contiguous tensor, as bits where it is numpy's."""
    if isinstance(tensor, np.ndarray):
        return view_of(tensor, sizes, strides, offset)
    tensor = tensor.contiguous()
    return tensor.as_strided(sizes, strides, tensor.storage_offset() + offset)


def _value_bits(value: float, like: Any) -> Any:
    """A value as an element of a tensor; its bits where it is numpy's."""
    if not isinstance(like, np.ndarray):
        return value
    return as_words(np.array([value]).astype(like.dtype))[0]


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
