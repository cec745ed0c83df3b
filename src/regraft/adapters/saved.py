"""Saved tensors: weights, biases and rows that take the place of the base's own.

They are base tensors and go through the plan as such. What belongs to a family that has no rule is left unchanged
where the weight that it stands on is the same in both layouts, and refused otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from regraft.adapters.detect import Known
from regraft.adapters.form import Array, Saved, SavedGroup
from regraft.arrays.apply import apply_plan
from regraft.equation.notation import parse_key
from regraft.errors import BadInputError, Finding, RefusedError
from regraft.layouts.graph import route_between
from regraft.names.keys import Group
from regraft.planning.compose import plan_along
from regraft.planning.plan import Headers, Plan
from regraft.planning.side import Side
from regraft.rules.book import Rule
from regraft.rules.templates import match_group


def move_saved(
    groups: Sequence[SavedGroup],
    tensors: Sequence[Array],
    known: Known,
    side: Side,
    target: str | None,
    kind: str,
    where: str,
) -> list[Saved]:
    """Move everything that is not a delta to a layout; names stay as they are where ``target`` is ``None``.

    ``kind`` is the tuner's name, for messages.

    Raises ``RefusedError`` for what has no exact equivalent, ``UnmatchedKeysError`` for keys that no rule matches.
    """
    if target is None:
        return [
            Saved(name, name, tensors[i], group.rows, group.style)
            for group in groups
            for name, i in zip(group.keys.names(), group.keys.ids.tolist(), strict=True)
        ]
    rows = [group for group in groups if group.rows]
    copies = [group for group in groups if group.copy_of is not None]
    whole = [group for group in groups if not group.rows and group.copy_of is None]
    _refuse_changed(whole, known, side, target, kind, where)
    moved = _move_rows(rows, tensors, known, side, target, where) if rows else []
    if copies:
        moved += _move_copies(copies, tensors, known, side, target, where)
    return moved + (_move_whole(whole, tensors, known, side, target, where) if whole else [])


def _move_copies(
    groups: Sequence[SavedGroup],
    tensors: Sequence[Array],
    known: Known,
    side: Side,
    target: str,
    where: str,
) -> list[Saved]:
    """Further copies of base tensors go where those go, each as a whole."""
    moved = []
    for group in groups:
        assert group.copy_of is not None
        why = "the weight that it is a copy of is stored differently there, and PEFT has no place for it"
        place = _places([group.copy_of], tensors, known, side, target, where, why)
        for name, i in zip(group.keys.names(), group.keys.ids.tolist(), strict=True):
            module, _, leaf = place[i].rpartition(".")
            new = f"{module}.{name.split('.')[-2]}.{leaf}"
            moved.append(Saved(name, new, tensors[i], style=group.style))
    return moved


def _move_rows(
    groups: Sequence[SavedGroup],
    tensors: Sequence[Array],
    known: Known,
    side: Side,
    target: str,
    where: str,
) -> list[Saved]:
    """Rows of an embedding go where the embedding goes, whole."""
    style = {i: group.style for group in groups for i in group.keys.ids.tolist()}
    why = "the embedding is stored differently there, so its rows are not rows any more"
    keys = [group.keys for group in groups]
    place = _places(keys, tensors, known, side, target, where, why)
    old = {
        i: name for each in keys for name, i in zip(each.names(), each.ids.tolist(), strict=True)
    }
    return [Saved(old[i], name, tensors[i], rows=True, style=style[i]) for i, name in place.items()]


def _places(
    keys: Sequence[Group],
    tensors: Sequence[Array],
    known: Known,
    side: Side,
    target: str,
    where: str,
    why: str,
) -> dict[int, str]:
    """The names that base tensors have in a layout, by their ids.

    Raises ``RefusedError`` with ``why`` where one is more than renamed.
    """
    headers = Headers(keys, [t.shape for t in tensors], [t.dtype.name for t in tensors])
    plan = _plan(headers, known, side, target, where)
    place: dict[int, str] = {}
    for entry in plan.entries:
        ids = [int(i) for found in entry.sources for i in found.flat if i >= 0]
        if not entry.moves_nothing:
            raise RefusedError(
                Finding(
                    "no-image",
                    why,
                    where=where,
                    key=plan.headers.name(ids[0]),
                    rule=str(entry.rule),
                    fix="merge the adapter into its base and convert the base",
                )
            )
        place.update(zip(ids, entry.keys(entry.written[0]).names(), strict=True))
    for carried in plan.carried:
        place.update(zip(carried.group.ids.tolist(), carried.group.names(), strict=True))
    return place


def _move_whole(
    groups: Sequence[SavedGroup],
    tensors: Sequence[Array],
    known: Known,
    side: Side,
    target: str,
    where: str,
) -> list[Saved]:
    order = [i for group in groups for i in group.keys.ids.tolist()]
    styles = [group.style for group in groups for _ in range(len(group.keys))]
    place = {i: at for at, i in enumerate(order)}
    renumbered = [
        Group(
            group.keys.template,
            np.array([place[i] for i in group.keys.ids.tolist()]),
            group.keys.numbers,
        )
        for group in groups
    ]
    mine = [tensors[i] for i in order]
    headers = Headers(renumbered, [t.shape for t in mine], [t.dtype.name for t in mine])
    plan = _plan(headers, known, side, target, where)
    origin: dict[str, int] = {}
    for entry in plan.entries:
        for term in entry.written:
            keys = entry.keys(term)
            per_loop = len(keys) // len(entry)
            for row in range(len(keys)):
                first = entry.sources[0][row // per_loop].reshape(-1)[0]
                origin[keys.name(row)] = int(first)
    for carried in plan.carried:
        origin.update(zip(carried.group.names(), carried.group.ids.tolist(), strict=True))
    return [
        Saved(headers.name(origin[name]), name, tensor, rows=False, style=styles[origin[name]])
        for name, tensor in apply_plan(plan, mine).items()
    ]


def _plan(headers: Headers, known: Known, side: Side, target: str, where: str) -> Plan:
    try:
        return plan_along(
            headers,
            route_between(known.books, side.layout, target, where).steps,
            scopes=known.scopes,
            mixed=bool(side.also),
            where=where,
            unmatched_fix=known.unmatched_fix,
        )
    except BadInputError as error:
        if any(finding.code != "missing" for finding in error.findings):
            raise
        raise RefusedError(
            [
                replace(
                    finding,
                    code="partial-weights",
                    message="saved weights (modules_to_save) would be part of a bigger tensor, and "
                    + finding.message,
                    fix="merge the adapter into its base and convert the base",
                )
                for finding in error.findings
            ]
        ) from None


def _refuse_changed(
    groups: Iterable[SavedGroup], known: Known, side: Side, target: str, tuner: str, where: str
) -> None:
    """Refuse tensors of families that have no rule where the base weight they stand on changes on the way."""
    opaque = [other for other in groups if side.find(other.keys) is None]
    if not opaque:
        return
    route = route_between(known.books, side.layout, target, where)
    on_the_way = {edge.book.name for edge in route.edges}
    findings = []
    for told in side.terms:
        if told.rule.book not in on_the_way or changes_nothing(told.rule):
            continue
        below = parse_key(str(told.key).removesuffix(".weight") + ".{*adapter_tensor}")
        for other in opaque:
            match = match_group(below, other.keys)
            if match is None or not match.rests[-1]:
                continue
            kind = "this variant of LORA" if tuner == "LORA" else tuner
            more = f" (and {len(match.rows) - 1} more)" if len(match.rows) > 1 else ""
            findings.append(
                Finding(
                    "no-image",
                    "the weight that this tensor stands on is stored differently there, and there is no rule "
                    f"that carries {kind} along{more}",
                    where=where,
                    key=other.keys.name(int(match.rows[0])),
                    rule=str(told.rule),
                    fix="merge the adapter into its base and convert the base",
                )
            )
    if findings:
        raise RefusedError(findings)


def changes_nothing(rule: Rule) -> bool:
    """Whether a rule leaves name, shape and kind as they are."""
    left, right = rule.equation.left, rule.equation.right
    return (
        len(left) == len(right) == 1
        and left[0].key == right[0].key
        and left[0].dims == right[0].dims
        and rule.left_kinds == rule.right_kinds
    )
