"""The plan: pure data that says where every element of every tensor goes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from msgspec import Struct

from regraft.equation.lower import (
    Copy,
    CopyAxis,
    Padding,
    flat_shapes,
    paddings,
    repeats,
)
from regraft.equation.notation import Term, axes_of
from regraft.equation.sizes import extent
from regraft.layouts.graph import Edge
from regraft.names.keys import MARK, Group, Ints
from regraft.planning.rows import index_grid
from regraft.rules.book import Book, Carry, Drop, Rule, Way
from regraft.rules.indices import reading_of
from regraft.rules.templates import write_group
from regraft.values import replace


class Headers(Struct, eq=False):
    """Names, shapes and dtypes of tensors. ``shapes[i]`` and ``dtypes[i]`` belong to the id ``i``."""

    groups: Sequence[Group]
    shapes: Sequence[tuple[int, ...]]
    dtypes: Sequence[str]
    _rows: Ints | None = None
    _starts: Ints | None = None

    def find(self, number: int) -> tuple[Group, int]:
        """The group and the row of the tensor with an id."""
        if self._rows is None or self._starts is None:
            sizes = [len(group.ids) for group in self.groups]
            self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
            ids = np.concatenate([g.ids for g in self.groups]) if sizes else np.zeros(0, np.int64)
            self._rows = np.empty(ids.max(initial=-1) + 1, dtype=np.int64)
            self._rows[ids] = np.arange(len(ids))
        row = int(self._rows[number])
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.groups[group], row - int(self._starts[group])

    def name(self, number: int) -> str:
        """The name of the tensor with an id."""
        group, row = self.find(number)
        return group.name(row)

    def names(self) -> list[str]:
        """All names by id, for who asks for many."""
        names = [""] * len(self.shapes)
        for group in self.groups:
            for number, name in zip(group.ids.tolist(), group.names(), strict=True):
                names[number] = name
        return names

    def __len__(self) -> int:
        return sum(map(len, self.groups))


class Entry(Struct, frozen=True, eq=False, dict=True):
    """One rule at work: all values of its loops that have the same sizes.

    ``sources[t]`` holds the ids of the tensors of term ``t`` of the side that is read, shaped (loop values,
    stacked indices...); -1 where a tensor is absent, which only a partial plan (an adapter's) has.
    """

    way: Way
    """The rule, in the direction in which it is read."""
    rule: Rule
    read: tuple[Term, ...]
    """The terms of the side that is read."""
    read_kinds: tuple[str, ...]
    written: tuple[Term, ...]
    """The terms of the side that is written."""
    written_kinds: tuple[str, ...]
    rests: tuple[str, ...]
    loops: Ints
    """(loop values, numbers in ``{*p}`` and loops)."""
    sizes: dict[str, int]
    """Of every axis its size, and of every index that has one value that."""
    shapes: Mapping[Term, tuple[int, ...]]
    """Of every term the shape of its tensors, with ``...`` as one dim."""
    rest: tuple[int, ...]
    """What ``...`` stands for."""
    sources: tuple[Ints, ...]
    copies: tuple[Copy, ...]
    padded: tuple[Padding, ...] = ()
    """Padding that the rule does not say: that of other rules on the way over several layouts."""

    def __len__(self) -> int:
        return len(self.loops)

    @property
    def repeats(self) -> tuple[Copy, ...]:
        """What must be equal among the tensors that are read: both ends of each copy are on that side."""
        equation = self.rule.equation
        if not equation.copies:
            return ()
        return repeats(equation, self.sizes, reverse=self.way.direction.backward)

    def paddings(self, *, written: bool) -> tuple[Padding, ...]:
        """The padding of the tensors that are written, or of those that are read."""
        own: tuple[Padding, ...] = ()
        equation = self.rule.equation
        if equation.fills:
            own = paddings(
                equation, self.sizes, written=written, reverse=self.way.direction.backward
            )
        return (*own, *self.padded) if written else own

    @property
    def cut(self) -> dict[str, int]:
        """Padding that is read as whatever it holds and left: how much of it by the names of its tensors."""
        return {
            name: self.sizes[fill.axis]
            for fill in self.rule.equation.fills
            if fill.any and self.sizes[fill.axis]
            for term in self.read
            if any(fill.axis in axes_of(dim) for dim in term.dims)
            for name in self.keys(term).names()
        }

    @property
    def renames(self) -> bool:
        """Whether every tensor that is written is one that is read, byte by byte."""
        return self.way.renames

    def shape(self, term: Term) -> tuple[int, ...]:
        """The shape of a term's tensors."""
        shape = self.shapes[term]
        return (*shape[:-1], *self.rest) if term.ends_open else shape

    def resized(self, sizes: dict[str, int], **changes: Any) -> Entry:
        """The entry where its axes have other sizes, with other values in some fields."""
        shapes = flat_shapes(self.shapes, sizes)
        return replace(self, sizes=sizes, shapes=shapes, **changes)

    def stack(self, term: Term) -> tuple[int, ...]:
        """How many values each stacked index of a term's key has."""
        return tuple(extent(hole, self.sizes) for hole in self.way.stacks[term])

    def keys(self, term: Term) -> Group:
        """The keys of a term, loop values first, then stacked indices, row major."""
        return keys_of(term, self.rule, self.rests, self.loops, self.stack(term), self.sizes)

    @cached_property
    def targets(self) -> tuple[Group, ...]:
        """The keys of each term that is written."""
        return tuple(self.keys(term) for term in self.written)

    @property
    def moves_nothing(self) -> bool:
        """Whether every tensor stays whole: one source, one target, the same bytes and the same kind."""
        way = self.way
        return way.renames and way.read_kinds == way.written_kinds and not way.stacks[way.read[0]]


def entry_of(
    way: Way,
    rests: tuple[str, ...],
    loops: Ints,
    sizes: dict[str, int],
    shapes: Mapping[Term, tuple[int, ...]],
    rest: tuple[int, ...],
    sources: tuple[Ints, ...],
    copies: tuple[Copy, ...],
    padded: tuple[Padding, ...] = (),
) -> Entry:
    """One rule at work, in one direction."""
    terms = way.read, way.read_kinds, way.written, way.written_kinds
    return Entry(way, way.rule, *terms, rests, loops, sizes, shapes, rest, sources, copies, padded)


def walk(
    entry: Entry, copy: Copy, axes: Sequence[CopyAxis], terms: Sequence[Term], *, target: bool
) -> tuple[Ints, Ints]:
    """Where each point of some axes of a copy stands at one end, which is among ``terms``.

    Returns the stacked slot of the key at each point, and how far each dim moves there from the block's start
    (dims, points).
    """
    term = terms[copy.target if target else copy.source]
    starts = copy.target_key_start if target else copy.source_key_start
    grid = index_grid([axis.size for axis in axes])
    stack = entry.stack(term)
    holes = np.zeros((len(stack), grid.shape[1]), dtype=np.int64)
    holes += np.array(starts, dtype=np.int64).reshape(-1, 1)
    dims = np.zeros((len(term.dims), grid.shape[1]), dtype=np.int64)
    for row, axis in zip(grid, axes, strict=True):
        place = axis.target if target else axis.source
        if place.step:
            (holes if place.in_key else dims)[place.index] += row * place.step
    slots = np.zeros(grid.shape[1], dtype=np.int64)
    for hole, size in zip(holes, stack, strict=True):
        slots = slots * size + hole
    return slots, dims


def keys_of(
    term: Term,
    rule: Rule,
    rests: Sequence[str],
    loops: Ints,
    stack: Sequence[int],
    givens: Mapping[str, int],
) -> Group:
    """The keys of a term for some loop values; see ``Entry.keys``. ``givens`` has the indices of one value."""
    assert term.key is not None
    marks = sum(text.count(MARK) for text in rests)
    per_loop = prod(stack)
    holes = reading_of(rule.equation, term.key).write(
        np.repeat(loops[:, marks:], per_loop, axis=0),
        np.tile(index_grid(stack), len(loops)).T,
        givens,
    )
    rest_numbers = np.repeat(loops[:, :marks], per_loop, axis=0)
    return write_group(term.key, rests, rest_numbers, holes)


class Carried(Struct, frozen=True, eq=False):
    """Keys that stay what they are, and the line of the book that says so."""

    group: Group
    carry: Carry


class Dropped(Struct, frozen=True, eq=False):
    """Keys that the other layout has no use for, and the line of the book that says so."""

    group: Group
    drop: Drop


class Plan(Struct, frozen=True, eq=False):
    """Where everything goes. Frozen, printable, and splittable: entries do not depend on each other."""

    edges: tuple[Edge, ...]
    """The books that were read, each with its direction."""
    headers: Headers
    entries: tuple[Entry, ...]
    carried: tuple[Carried, ...]
    dropped: tuple[Dropped, ...] = ()
    demands: tuple[Entry, ...] = ()
    """Entries of the first of several steps that demand something of what they read: equal copies, padding."""

    @property
    def source_layout(self) -> str:
        """The layout that is read; empty where no book speaks of anything."""
        return self.edges[0].source if self.edges else ""

    @property
    def target_layout(self) -> str:
        """The layout that is written; empty where no book speaks of anything."""
        return self.edges[-1].target if self.edges else ""

    @property
    def is_composed(self) -> bool:
        """Whether it leads over other layouts, which are never made."""
        return len({(edge.source, edge.target) for edge in self.edges}) > 1

    @property
    def books(self) -> tuple[Book, ...]:
        """The books that were read."""
        return tuple(edge.book for edge in self.edges)

    def lacking(self) -> list[Drop]:
        """What the layout that is written has besides, and the one that is read has not."""
        return [
            drop for edge in self.edges for drop in edge.book.drops if edge.writes in drop.sides
        ]

    def fired(self) -> dict[str, int]:
        """How often every rule of the books fired; 0 where it did not."""
        counts = {str(rule): 0 for book in self.books for rule in book.rules}
        for entry in self.entries:
            counts[str(entry.rule)] = counts.get(str(entry.rule), 0) + len(entry)
        return counts

    def demanding(self) -> list[Entry]:
        """The entries that demand something of the tensors that they read: equal copies, padding."""
        return [
            entry
            for entry in (*self.entries, *self.demands)
            if entry.repeats or entry.paddings(written=False)
        ]

    def targets(self) -> Iterator[Group]:
        """The keys of the result."""
        for entry in self.entries:
            yield from entry.targets
        for carried in self.carried:
            yield carried.group

    def result_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the result, by name."""
        found: dict[str, tuple[int, ...]] = {}
        for entry in self.entries:
            for term, keys in zip(entry.written, entry.targets, strict=True):
                found.update(dict.fromkeys(keys.names(), entry.shape(term)))
        for carried in self.carried:
            shapes = (tuple(self.headers.shapes[i]) for i in carried.group.ids.tolist())
            found.update(zip(carried.group.names(), shapes, strict=True))
        return found

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, entry by entry."""
        return {
            "source_layout": self.source_layout,
            "target_layout": self.target_layout,
            "books": [book.name for book in self.books],
            "rules": self.fired(),
            "entries": [
                {
                    "rule": str(entry.rule),
                    "times": len(entry),
                    "sizes": entry.sizes,
                    "sources": [
                        {
                            "keys": entry.keys(t).names(),
                            "absent": int((ids < 0).sum()),
                            "shape": entry.shape(t),
                        }
                        for t, ids in zip(entry.read, entry.sources, strict=True)
                    ],
                    "targets": [
                        {"keys": entry.keys(t).names(), "shape": entry.shape(t)}
                        for t in entry.written
                    ],
                }
                for entry in self.entries
            ],
            "carried": [
                {"keys": c.group.names(), "why": c.carry.why, "where": c.carry.where}
                for c in self.carried
            ],
            "dropped": [
                {"keys": d.group.names(), "why": d.drop.why, "where": d.drop.where}
                for d in self.dropped
            ],
            "lacking": [{"keys": str(d.key), "why": d.why} for d in self.lacking()],
        }

    def to_json(self) -> str:
        """The plan as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        lines = [f"{self.source_layout} -> {self.target_layout}"]
        for entry in self.entries:
            lines.append(f"  {entry.rule.name}, {len(entry)} times [{entry.rule.where}]")
            for sign, terms in (("-", entry.read), ("+", entry.written)):
                for term in terms:
                    lines.append(f"    {sign} {term.key}  {list(entry.shape(term))}")
        for carried in self.carried:
            shown = carried.group.template.replace(MARK, "*")
            lines.append(f"  unchanged: {shown} ({len(carried.group)}): {carried.carry.why}")
        for dropped in self.dropped:
            shown = dropped.group.template.replace(MARK, "*")
            lines.append(f"  dropped: {shown} ({len(dropped.group)}): {dropped.drop.why}")
        lines += [f"  not there: {drop.key}: {drop.why}" for drop in self.lacking()]
        return "\n".join(lines)
