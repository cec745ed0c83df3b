"""Stacks that are not whole: some experts are there and others are not, by the rule books for a layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import compress

import numpy as np
from msgspec import Struct

from regraft.equation.notation import axes_of
from regraft.equation.sizes import evaluate
from regraft.names.keys import Group, Ints
from regraft.planning.model import Scope
from regraft.planning.plan import keys_of
from regraft.planning.rows import distinct_rows
from regraft.planning.side import Side
from regraft.rules.book import Rule
from regraft.rules.terms import RuleTerm


def gaps_in(groups: Iterable[Group], side: Side, *, all_seen: bool) -> Iterator[Group]:
    """The keys that are not there of stacks that are there in part, by kind; their ``ids`` mean nothing.

    Whatever the keys are converted to, and if to nothing at all: a list of experts has a gap or it has none.
    Where the base's config does not say how many there are, it is told where ``all_seen``: the last one is there.

    Example: of ``layers.0.experts.{0,2}.w1`` and ``layers.1.experts.{0..2}.w1`` the gap is ``layers.0.experts.1.w1``.
    """
    stacks = [each for group in groups for each in _stacks(group, side)]
    seen: dict[tuple[Rule, str], int] = {}
    for each in stacks:
        for axis, most in zip(each.axes, each.stacked.max(axis=0).tolist(), strict=True):
            at = each.term.rule, axis
            seen[at] = max(seen.get(at, 0), most + 1)
    for each in stacks:
        rule = each.term.rule
        sizes = [
            _told_size(rule, axis, each.scope) or (seen[rule, axis] if all_seen else None)
            for axis in each.axes
        ]
        known = [size for size in sizes if size is not None]
        if len(known) == len(sizes):
            yield from _gaps(each, known)


class _Stacks(Struct, frozen=True, eq=False):
    """The keys of one template that a rule stacks."""

    term: RuleTerm
    scope: Scope
    rests: tuple[str, ...]
    axes: tuple[str, ...]
    """What counts the tensors of a stack."""
    loops: Ints
    """(keys, numbers in ``{*p}`` and loops): those of one stack have one row in common."""
    stacked: Ints
    """(keys, axes)."""


def _stacks(group: Group, side: Side) -> Iterator[_Stacks]:
    """The keys of a group as stacks, where a rule makes such of them."""
    closest = side.closest(group)
    if closest is None:
        return
    term, match = closest
    axes = [tuple(axes_of(hole)) for hole in compress(term.reading.holes, term.reading.stacked)]
    if not axes or any(len(names) != 1 for names in axes):
        return
    scope = side.scope_of(term.rule.book)
    if not scope.admits(group.template):
        return
    found, fits = match.indices(term.reading, {})
    if fits.all():
        counted = tuple(name for (name,) in axes)
        yield _Stacks(term, scope, match.rests, counted, found.loops, found.stacked)


def _gaps(stacks: _Stacks, sizes: list[int]) -> Iterator[Group]:
    """The gap in stacks that are all of one size."""
    inside = (stacks.stacked < np.array(sizes)).all(axis=1)
    loops = stacks.loops[inside]
    first, which = distinct_rows(loops)
    rows = loops[first]
    there = np.zeros((len(rows), *sizes), dtype=bool)
    there[(which, *stacks.stacked[inside].T)] = True
    if not there.all():
        term = stacks.term
        every = keys_of(term.term, term.rule, stacks.rests, rows, sizes, {})
        yield every.take(~there.reshape(-1))


def _told_size(rule: Rule, axis: str, scope: Scope) -> int | None:
    """How many tensors a stack has by the base's config; ``None`` where it does not say it."""
    told = (
        evaluate(clause, scope.look_up)
        for clause in rule.equation.where
        if clause.axis == axis and not clause.axes
    )
    return next((size for size in told if size is not None), None)


__all__ = ["gaps_in"]
