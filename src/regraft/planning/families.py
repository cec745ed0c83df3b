"""Laying the tensors that one rule claims into entries: by loop values that have the same sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from regraft.equation.lower import Copy, flat_shapes, lower
from regraft.equation.notation import (
    Affine,
    Axis,
    Bound,
    ConfigPath,
    Equation,
    Expr,
    ShapeOf,
    Term,
    axes_of,
)
from regraft.equation.sizes import SizeError, UnknownSizeError, evaluate, extent, solve_sizes
from regraft.errors import Finding
from regraft.layouts.graph import Edge
from regraft.names.keys import MARK, Group, Ints
from regraft.planning.model import Scope
from regraft.planning.plan import Entry, Headers, entry_of, keys_of
from regraft.planning.rows import distinct_rows
from regraft.rules.book import Way
from regraft.rules.indices import Givens, Indices, reading_of
from regraft.rules.templates import Match, match_group, write_group
from regraft.rules.terms import RuleTerm
from regraft.values import replace

Told = Mapping[ConfigPath | ShapeOf, int | None]
"""What is known of what an equation asks for."""


class Part(Struct, frozen=True, eq=False):
    """A rule book's way to the target, and the part of the model that it speaks of."""

    edge: Edge
    scope: Scope

    def told(self, equation: Equation) -> dict[ConfigPath | ShapeOf, int | None]:
        """What the model's config says of all that an equation asks for."""
        return {value: self.scope.look_up(value) for value in equation.asked}


class Claim(Struct, frozen=True, eq=False):
    """The tensors of a group that one term of a rule speaks of."""

    part: Part
    way: Way
    """The term's rule, in the direction in which it is read."""
    term: RuleTerm
    group: Group
    match: Match
    indices: Indices
    givens: Givens

    @property
    def ids(self) -> Ints:
        """The ids of the tensors."""
        return self.group.ids[self.match.rows]

    def keep(self, rows: npt.NDArray[np.bool_]) -> Claim:
        """Some of the tensors."""
        n = self.indices
        return replace(
            self,
            match=self.match.take(rows),
            indices=Indices(n.loops[rows], n.stacked[rows]),
        )


class Sources:
    """The tensors that a plan reads, their shapes as codes, and what is wrong with them."""

    def __init__(
        self, headers: Headers, *, partial: bool, all_seen: bool, where: str | None
    ) -> None:
        self.headers, self.partial, self.all_seen, self.where = headers, partial, all_seen, where
        self.findings: list[Finding] = []
        codes: defaultdict[tuple[int, ...], int] = defaultdict()
        codes.default_factory = codes.__len__
        shapes = headers.shapes
        self.shape_code = np.fromiter(map(codes.__getitem__, shapes), np.int64, count=len(shapes))
        self.shape_list = list(codes)
        self.dims = np.array([len(shape) for shape in codes], dtype=np.int64)

    def report(
        self,
        code: str,
        message: str,
        *,
        key: str | None = None,
        rule: str | None = None,
        fix: str | None = None,
    ) -> None:
        """Note a problem; all of them are raised together."""
        self.findings.append(Finding(code, message, self.where, key, rule, fix))

    def report_beyond(self, bound: Bound, limit: int, ids: Ints, rule: str) -> None:
        """Note keys whose index the base model has not."""
        self.report(
            "wrong-base",
            f"the base model has {limit} ({bound.axis} = 0 to {limit - 1}: {bound}); "
            f"{len(ids)} keys are beyond",
            key=self.headers.name(int(ids[0])),
            rule=rule,
            fix="give the base model that it was trained on",
        )


class _Kind(Struct, eq=False):
    """Loop values of a family whose tensors have the same shapes and counts."""

    members: Ints
    """Their rows among the family's loop values."""
    example: int
    """The first of them."""
    shapes: list[tuple[Term, tuple[int, ...]]]
    """Of every term that is there its tensors' shape."""
    counts: list[tuple[Expr, int]]
    """How many values each index of a stack has."""
    told: Told


class _Solved(Struct, frozen=True, eq=False):
    """The same, when the sizes are known."""

    members: Ints
    sizes: dict[str, int]
    shapes: dict[Term, tuple[int, ...]]
    """Of every term, with ``...`` as one dim."""
    rest: tuple[int, ...]
    stacks: list[tuple[int, ...]]
    """For every term that is read how many values each stacked index of its key has."""
    copies: tuple[Copy, ...]


class Family:
    """The claims of one rule that share what ``{*p}`` holds.

    Made in three passes, each of them for all families before the next: their tensors are laid out by loop values
    here, ``solve`` works out what the equation says of sizes, and ``entries`` puts both together.
    """

    def __init__(self, sources: Sources, claims: list[Claim], told: Told) -> None:
        first = claims[0]
        rule = first.term.rule
        self.sources, self.rule, self.rests = sources, rule, first.match.rests
        self.way, self.scope = first.way, first.part.scope
        self.givens, self.told = first.givens, told
        self.read, self.written = self.way.read, self.way.written
        self.loop_names = rule.equation.loops
        self.holes = tuple(self.way.stacks[term] for term in self.read)
        rows: list[list[tuple[Ints, Ints, Ints]]] = [[] for _ in self.read]
        for claim in claims:
            found = claim.indices
            rows[claim.term.number].append((found.loops, found.stacked, claim.ids))
        parts = [_join(each) for each in rows]
        self.ids = first.ids
        codes, self.loops = _encode([part[0] for part in parts if part is not None])
        self.shapes_asked = [value for value in rule.equation.asked if isinstance(value, ShapeOf)]
        self.most: dict[Expr, int] = {}
        """The most values that an index has for any loop values."""
        self.placed: list[tuple[Ints, Ints, Ints] | None] = []
        """For every term that is read its tensors: their loop values' rows, stacked indices and ids."""
        self.kinds = list(self._kinds(parts, codes))
        self.solved: list[_Solved] = []

    def _kinds(self, parts: list[tuple[Ints, Ints, Ints] | None], codes: Ints) -> Iterator[_Kind]:
        """The loop values by shapes and counts, which are all that sizes depend on."""
        count = len(self.loops)
        signature: list[Ints] = []
        position = 0
        for part, holes in zip(parts, self.holes, strict=True):
            if part is None:
                self.placed.append(None)
                signature.append(np.full(count, -1))
                signature.extend(np.full(count, 0) for _ in holes)
                continue
            _, stack, ids = part
            at = codes[position : position + len(ids)]
            position += len(ids)
            self.placed.append((at, stack, ids))
            here = self.sources.shape_code[ids]
            shape = np.full(count, -1, dtype=np.int64)
            shape[at[::-1]] = here[::-1]
            odd = here != shape[at]
            if odd.any():
                self._report_odd_shape(ids, at, shape, odd)
            signature.append(shape)
            for column, hole in enumerate(holes):
                most = np.zeros(count, dtype=np.int64)
                np.maximum.at(most, at, stack[:, column] + 1)
                signature.append(most)
                self.most[hole] = max(self.most.get(hole, 0), int(most.max(initial=0)))
        signature += self._target_sizes()
        first, kind = distinct_rows(np.stack(signature, axis=1))
        for number, example in enumerate(first.tolist()):
            values = [int(column[example]) for column in signature]
            yield self._kind(np.flatnonzero(kind == number), example, values)

    def _kind(self, members: Ints, example: int, values: list[int]) -> _Kind:
        """Some loop values, by what they have in common: a code of a shape and counts for every term, and sizes."""
        shapes: list[tuple[Term, tuple[int, ...]]] = []
        counts: list[tuple[Expr, int]] = []
        left = iter(values)
        for term, holes in zip(self.read, self.holes, strict=True):
            code = next(left)
            if code >= 0:
                shapes.append((term, self.sources.shape_list[code]))
            counts.extend((hole, next(left)) for hole in holes)
        told = dict(self.told)
        told.update(
            (value, None if size < 0 else size)
            for value, size in zip(self.shapes_asked, left, strict=True)
        )
        return _Kind(members, example, shapes, counts, told)

    def _target_sizes(self) -> list[Ints]:
        """What each ``shape(KEY, dim)`` is for every loop value, -1 where the target has no such tensor."""
        columns = []
        for value in self.shapes_asked:
            sizes = [self._target_size(value, loop) for loop in self.loops]
            columns.append(np.array([-1 if s is None else s for s in sizes], dtype=np.int64))
        return columns

    def _target_size(self, value: ShapeOf, loop: Ints) -> int | None:
        """A size that a tensor of the target says."""
        marks = sum(text.count(MARK) for text in self.rests)
        columns = {name: marks + i for i, name in enumerate(self.loop_names)}
        holes = [columns[h.name] for h in value.key.holes if isinstance(h, Axis)]
        key = write_group(value.key, self.rests, loop[None, :marks], loop[None, holes]).name(0)
        shape = self.scope.shapes.get(key)
        return None if shape is None else shape[value.dim]

    def solve(self) -> None:
        """Work out sizes and copies; what contradicts itself, or the base model, is reported."""
        for kind in self.kinds:
            try:
                sizes, rest = self._sizes(kind)
            except SizeError as error:
                self._report_size(error, kind.example)
                continue
            stacks = [tuple(extent(hole, sizes) for hole in holes) for holes in self.holes]
            sizes |= self.givens
            copies = lower(self.rule.equation, sizes, reverse=self.way.direction.backward)
            shapes = flat_shapes((*self.read, *self.written), sizes)
            self.solved.append(_Solved(kind.members, sizes, shapes, rest, stacks, copies))
        for bound in self.rule.equation.bounds:
            limit = evaluate(bound, self.told.get)
            if limit is not None:
                self._check_bound(bound, limit)

    def _check_bound(self, bound: Bound, limit: int) -> None:
        index = of_loop(self.rule.equation, bound.axis, self.loops)
        if index.max(initial=-1) < limit:
            return
        for part in self.placed:
            beyond = part[2][index[part[0]] >= limit] if part is not None else part
            if beyond is not None and len(beyond):
                self.sources.report_beyond(bound, limit, beyond, str(self.rule))

    def _sizes(self, kind: _Kind) -> tuple[dict[str, int], tuple[int, ...]]:
        equation, lookup = self.rule.equation, kind.told.get
        try:
            return solve_sizes(equation, kind.shapes, lookup=lookup)
        except UnknownSizeError as error:
            unknown = set(error.axes)
            counts: dict[Expr, int] = {}
            for hole, found in kind.counts:
                if found and unknown & set(axes_of(hole)):
                    if not self.sources.partial:
                        counts[hole] = max(counts.get(hole, 0), found)
                    elif self.sources.all_seen:
                        counts[hole] = self.most.get(hole, found)
            return solve_sizes(equation, kind.shapes, counts.items(), lookup=lookup)

    def entries(self) -> Iterator[Entry]:
        """One entry for all loop values that have the same shapes and counts."""
        for solved in self.solved:
            entry = self._entry(solved)
            if entry is not None:
                yield entry

    def _entry(self, solved: _Solved) -> Entry | None:
        members, count = solved.members, len(self.loops)
        loops = self.loops if len(members) == count else self.loops[members]
        back = np.full(count, -1, dtype=np.int64)
        back[members] = np.arange(len(members))
        sources = []
        whole = True
        for number, (part, stack) in enumerate(zip(self.placed, solved.stacks, strict=True)):
            filled = np.full((len(members), *stack), -1, dtype=np.int64)
            if part is not None:
                at, index, ids = part
                rows = back[at]
                if len(members) < count:
                    mine = rows >= 0
                    rows, index, ids = rows[mine], index[mine], ids[mine]
                outside = (index >= np.array(stack, dtype=np.int64)).any(axis=1)
                if outside.any():
                    self._report_extra(ids[outside], number, stack)
                    whole = False
                    rows, index, ids = rows[~outside], index[~outside], ids[~outside]
                filled[(rows, *index.T)] = ids
            if not self.sources.partial and (filled < 0).any():
                self._report_missing(filled, number, stack, loops)
                whole = False
            sources.append(filled)
        if not whole or not self._check_numbers(loops, solved.sizes):
            return None
        return entry_of(
            self.way,
            self.rests,
            loops,
            solved.sizes,
            solved.shapes,
            solved.rest,
            tuple(sources),
            solved.copies,
        )

    def _check_numbers(self, loops: Ints, sizes: dict[str, int]) -> bool:
        """Whether the keys that are written lead back to the indices that they were computed from."""
        for term in self.written:
            if term.key is None or not any(isinstance(h, Affine) for h in term.key.holes):
                continue
            stack = tuple(extent(h, sizes) for h in self.way.stacks[term])
            keys = keys_of(term, self.rule, self.rests, loops, stack, sizes)
            match = match_group(term.key, keys)
            marks = loops.shape[1] - len(self.loop_names)
            wanted = np.repeat(loops[:, marks:], len(keys) // len(loops), axis=0)
            if match is not None and len(match.rows) == len(keys):
                found, fits = reading_of(self.rule.equation, term.key).read(
                    match.holes, self.givens
                )
                if fits.all() and (found.loops == wanted).all():
                    continue
            self.sources.report(
                "extra",
                f"its indices have no place in {term.key}: from the number there they cannot be told",
                key=self.sources.headers.name(int(self.ids[0])),
                rule=str(self.rule),
                fix="correct the factors in the rule's key",
            )
            return False
        return True

    def _report_odd_shape(
        self, ids: Ints, at: Ints, shape: Ints, odd: npt.NDArray[np.bool_]
    ) -> None:
        sources = self.sources
        row = int(np.flatnonzero(odd)[0])
        expected = sources.shape_list[int(shape[at[row]])]
        got = sources.shape_list[int(sources.shape_code[ids[row]])]
        sources.report(
            "shape",
            f"its shape is {list(got)}, its siblings' is {list(expected)}",
            key=sources.headers.name(int(ids[row])),
            rule=str(self.rule),
            fix="save it again: tensors that become one tensor have one shape",
        )

    def _report_size(self, error: SizeError, example: int) -> None:
        ids = next(part[2][part[0] == example] for part in self.placed if part is not None)
        missing = isinstance(error, UnknownSizeError)
        message = str(error)
        if isinstance(error, UnknownSizeError):
            clauses = [str(c) for c in self.rule.equation.where if c.axis in error.axes]
            message += f" ({', '.join(clauses)})" if clauses else ""
        self.sources.report(
            "unknown-size" if missing else "wrong-base",
            message,
            key=self.sources.headers.name(int(ids[0])) if len(ids) else None,
            rule=str(self.rule),
            fix=(
                "give the base model with --model, with a config that says it"
                if missing
                else "give the base model that it belongs to"
            ),
        )

    def _report_extra(self, ids: Ints, term: int, stack: tuple[int, ...]) -> None:
        sources = self.sources
        count = f" (and {len(ids) - 1} more keys)" if len(ids) > 1 else ""
        sources.report(
            "extra",
            f"the base model has {' x '.join(map(str, stack))} of these, numbered from 0{count}",
            key=sources.headers.name(int(ids[0])),
            rule=str(self.rule),
            fix="give the base model that it belongs to",
        )

    def _report_missing(self, filled: Ints, term: int, stack: tuple[int, ...], loops: Ints) -> None:
        keys = keys_of(self.read[term], self.rule, self.rests, loops, stack, self.givens)
        rows = np.flatnonzero(filled.reshape(-1) < 0)
        shown = ", ".join(keys.name(int(row)) for row in rows[:3])
        self.sources.report(
            "missing",
            f"{len(rows)} of {filled.size} tensors that belong together are missing: {shown}"
            + (", …" if len(rows) > 3 else ""),
            rule=str(self.rule),
            fix="complete the checkpoint; nothing can be fused without its siblings",
        )


def of_loop(equation: Equation, axis: str, loops: Ints) -> Ints:
    """The values of one loop's index; in a row stand the numbers in rests first, then the loops."""
    return loops[:, equation.loops.index(axis) - len(equation.loops)]


def _join(parts: list[tuple[Ints, Ints, Ints]]) -> tuple[Ints, Ints, Ints] | None:
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0]
    loops, stacks, ids = (np.concatenate(column) for column in zip(*parts, strict=True))
    return loops, stacks, ids


def _encode(loops: list[Ints]) -> tuple[Ints, Ints]:
    """Number the distinct rows; the numbers in order of the input, and the distinct rows."""
    rows = np.concatenate(loops)
    first, codes = distinct_rows(rows)
    return codes, rows[first]
