"""Laying the tensors that one rule claims into entries: by loop values that have the same sizes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from regraft.equation.lower import lower
from regraft.equation.notation import (
    Affine,
    Axis,
    ConfigPath,
    Expr,
    Key,
    ShapeOf,
    Term,
    axes_of,
)
from regraft.equation.sizes import SizeError, UnknownSizeError, extent, solve_sizes
from regraft.errors import Finding
from regraft.names.keys import MARK, Group, Ints, distinct_rows
from regraft.planning.model import Scope
from regraft.planning.plan import Entry, Headers, entry_of, keys_of
from regraft.rules.book import Rule
from regraft.rules.direction import Direction
from regraft.rules.indices import Givens, Indices, reading_of
from regraft.rules.templates import Match, match_group, write_group
from regraft.values import replace


class Claim(Struct, frozen=True, eq=False):
    """The tensors of a group that one term of a rule speaks of."""

    rule: Rule
    term: int
    read: Term
    group: Group
    match: Match
    indices: Indices
    givens: Givens

    def ids(self) -> Ints:
        """The ids of the tensors."""
        return self.group.ids[self.match.rows]

    @property
    def key(self) -> Key:
        """The term's key."""
        key = self.read.key
        assert key is not None
        return key

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
        codes = {shape: code for code, shape in enumerate(dict.fromkeys(headers.shapes))}
        self.shape_code = np.array([codes[shape] for shape in headers.shapes], dtype=np.int64)
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


class Family:
    """The claims of one rule that share what ``{*p}`` holds."""

    def __init__(
        self,
        sources: Sources,
        rule: Rule,
        direction: Direction,
        scope: Scope,
        rests: tuple[str, ...],
        claims: list[Claim],
    ) -> None:
        self.sources, self.rule, self.rests = sources, rule, rests
        self.way, self.scope = rule.ways[direction], scope
        self.givens = claims[0].givens
        self.read, self.written = self.way.read, self.way.written
        self.loop_names = rule.equation.loops
        self.holes = tuple(self.way.stacks[term] for term in self.read)
        rows: list[list[tuple[Ints, Ints, Ints]]] = [[] for _ in self.read]
        for claim in claims:
            found = claim.indices
            rows[claim.term].append((found.loops, found.stacked, claim.ids()))
        self.rows = [_join(parts) for parts in rows]
        self.ids = claims[0].ids()
        asked = rule.equation.asked
        self.told: dict[ConfigPath | ShapeOf, int | None] = {
            value: scope.look_up(value) for value in asked if isinstance(value, ConfigPath)
        }
        """What the config says of sizes, the same for all loop values."""
        self.shapes_asked = [value for value in asked if isinstance(value, ShapeOf)]
        self.most: dict[Expr, int] = {}
        """The most values that an index has for any loop values."""

    def entries(self) -> Iterable[Entry]:
        """One entry for all loop values that have the same shapes and counts."""
        codes, loops = _encode([part[0] for part in self.rows if part is not None])
        count = len(loops)
        signature: list[Ints] = []
        placed: list[tuple[Ints, Ints, Ints] | None] = []
        position = 0
        for part, holes in zip(self.rows, self.holes, strict=True):
            if part is None:
                placed.append(None)
                signature.append(np.full(count, -1))
                signature.extend(np.full(count, 0) for _ in holes)
                continue
            _, stack, ids = part
            at = codes[position : position + len(ids)]
            position += len(ids)
            placed.append((at, stack, ids))
            shape = np.full(count, -1, dtype=np.int64)
            shape[at[::-1]] = self.sources.shape_code[ids[::-1]]
            odd = self.sources.shape_code[ids] != shape[at]
            if odd.any():
                self._report_odd_shape(ids, at, shape, odd)
            signature.append(shape)
            for column in range(len(holes)):
                most = np.zeros(count, dtype=np.int64)
                np.maximum.at(most, at, stack[:, column] + 1)
                signature.append(most)
                hole = holes[column]
                self.most[hole] = max(self.most.get(hole, 0), int(most.max(initial=0)))
        signature += self._target_sizes(loops)
        first, kind = distinct_rows(np.stack(signature, axis=1))
        for number, example in enumerate(first.tolist()):
            entry = self._entry(np.flatnonzero(kind == number), loops, placed, signature, example)
            if entry is not None:
                yield entry

    def _target_sizes(self, loops: Ints) -> list[Ints]:
        """What each ``shape(KEY, dim)`` is for every loop value, -1 where the target has no such tensor."""
        columns = []
        for value in self.shapes_asked:
            sizes = [self._target_size(value, loop) for loop in loops]
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

    def _entry(
        self,
        members: Ints,
        loops: Ints,
        placed: list[tuple[Ints, Ints, Ints] | None],
        signature: list[Ints],
        example: int,
    ) -> Entry | None:
        shapes: list[tuple[Term, tuple[int, ...]]] = []
        seen: list[list[int]] = []
        column = 0
        for term, holes in zip(self.read, self.holes, strict=True):
            code = int(signature[column][example])
            if code >= 0:
                shapes.append((term, self.sources.shape_list[code]))
            seen.append([int(s[example]) for s in signature[column + 1 : column + 1 + len(holes)]])
            column += 1 + len(holes)
        try:
            sizes, rest = self._solve(shapes, seen, loops[example])
        except SizeError as error:
            self._report_size(error, loops[example], placed, example)
            return None
        back = np.full(len(loops), -1, dtype=np.int64)
        back[members] = np.arange(len(members))
        sources = []
        whole = True
        for number, (part, holes) in enumerate(zip(placed, self.holes, strict=True)):
            stack = tuple(extent(hole, sizes) for hole in holes)
            filled = np.full((len(members), *stack), -1, dtype=np.int64)
            if part is not None:
                at, index, ids = part
                mine = back[at] >= 0
                rows, index, ids = back[at[mine]], index[mine], ids[mine]
                outside = (index >= np.array(stack, dtype=np.int64)).any(axis=1)
                if outside.any():
                    self._report_extra(ids[outside], number, stack)
                    whole = False
                    rows, index, ids = rows[~outside], index[~outside], ids[~outside]
                filled[(rows, *index.T)] = ids
            if not self.sources.partial and (filled < 0).any():
                self._report_missing(filled, number, stack, loops[members])
                whole = False
            sources.append(filled)
        if not whole:
            return None
        sizes |= self.givens
        copies = lower(self.rule.equation, sizes, reverse=self.way.direction.backward)
        if not self._check_numbers(loops[members], sizes):
            return None
        return entry_of(
            self.way,
            self.rests,
            loops[members],
            sizes,
            rest,
            tuple(sources),
            copies,
        )

    def _solve(
        self, shapes: list[tuple[Term, tuple[int, ...]]], seen: list[list[int]], loop: Ints
    ) -> tuple[dict[str, int], tuple[int, ...]]:
        equation = self.rule.equation
        told = dict(self.told)
        told.update((value, self._target_size(value, loop)) for value in self.shapes_asked)
        try:
            return solve_sizes(equation, shapes, lookup=told.get)
        except UnknownSizeError as error:
            counts: list[tuple[Expr, int]] = []
            unknown = set(error.axes)
            for holes, counts_here in zip(self.holes, seen, strict=True):
                for hole, found in zip(holes, counts_here, strict=True):
                    if found and unknown & set(axes_of(hole)):
                        if not self.sources.partial:
                            counts.append((hole, found))
                        elif self.sources.all_seen:
                            counts.append((hole, self.most.get(hole, found)))
            most_of: dict[Expr, int] = {}
            for hole, number in counts:
                most_of[hole] = max(most_of.get(hole, 0), number)
            return solve_sizes(equation, shapes, most_of.items(), lookup=told.get)

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

    def _report_size(
        self,
        error: SizeError,
        loop: Ints,
        placed: list[tuple[Ints, Ints, Ints] | None],
        example: int,
    ) -> None:
        ids = next(part[2][part[0] == example] for part in placed if part is not None)
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
