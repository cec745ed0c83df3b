"""Building a plan from headers and rule books; every key is accounted for, all errors come together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from regraft.equation.lower import lower, stacked_holes
from regraft.equation.notation import (
    Axis,
    ConfigPath,
    Equation,
    Expr,
    Key,
    ShapeOf,
    Term,
    axes_of,
    loops_of,
)
from regraft.equation.sizes import (
    SizeError,
    UnknownSizeError,
    extent,
    limit_of,
    shape_of,
    solve_sizes,
)
from regraft.errors import BadInputError, Finding, RegraftError, UnmatchedKeysError
from regraft.names.keys import MARK, Group, Ints
from regraft.plan.model import Scope
from regraft.plan.plan import Carried, Entry, Headers, Plan, keys_of
from regraft.rules.book import Book, Carry, Rule
from regraft.rules.templates import (
    Match,
    Specificity,
    hole_axes,
    match_group,
    specificity,
    write_group,
)

Guess = Callable[[Rule, str, int], int | None]
"""How many values a stacked index has where nothing else says so: rule, axis, and how many were seen."""


@dataclass(frozen=True, slots=True, eq=False)
class _Claim:
    rule: Rule
    term: int
    read: Term
    group: Group
    match: Match

    def ids(self) -> Ints:
        return self.group.ids[self.match.rows]

    @property
    def key(self) -> Key:
        key = self.read.key
        assert key is not None
        return key

    def keep(self, rows: npt.NDArray[np.bool_]) -> _Claim:
        m = self.match
        kept = Match(m.rows[rows], m.rests, m.rest_numbers[rows], m.holes[rows])
        return _Claim(self.rule, self.term, self.read, self.group, kept)


def build_plan(
    headers: Headers,
    books: Sequence[Book],
    *,
    target_layout: str,
    scopes: dict[str, Scope] | None = None,
    partial: bool = False,
    guess: Guess | None = None,
    where: str | None = None,
    unmatched_fix: str = "check the prefix and the model, or add the key to a rule book",
) -> Plan:
    """Plan the conversion of some tensors to a layout.

    ``scopes`` gives each book's config; ``partial`` allows tensors to be absent (an adapter need not adapt
    everything), then ``guess`` is asked for sizes that only the absent ones would tell; ``where`` names the file
    in messages, ``unmatched_fix`` what to do about keys that nothing explains.

    Raises ``UnmatchedKeysError`` where only unexplained keys are wrong, otherwise ``BadInputError``.
    """
    builder = _Builder(
        headers, books, target_layout, scopes or {}, partial, guess, where, unmatched_fix
    )
    return builder.build()


class _Builder:
    def __init__(
        self,
        headers: Headers,
        books: Sequence[Book],
        target_layout: str,
        scopes: dict[str, Scope],
        partial: bool,
        guess: Guess | None,
        where: str | None,
        unmatched_fix: str,
    ) -> None:
        self.unmatched_fix = unmatched_fix
        self.headers, self.books, self.target = headers, tuple(books), target_layout
        self.scopes, self.partial, self.guess, self.where = scopes, partial, guess, where
        self.findings: list[Finding] = []
        self.unmatched: list[Finding] = []
        count = 1 + max((int(g.ids.max()) for g in headers.groups if len(g)), default=-1)
        self.owner = np.full(count, -1, dtype=np.int64)
        codes = {shape: code for code, shape in enumerate(dict.fromkeys(headers.shapes))}
        self.shape_code = np.array([codes[shape] for shape in headers.shapes], dtype=np.int64)
        self.shape_list = list(codes)
        self.dims = np.array([len(shape) for shape in codes], dtype=np.int64)

    def build(self) -> Plan:
        entries: list[Entry] = []
        for rule, claims in self.claims().items():
            entries.extend(self.entries(rule, claims))
        carried = self.carry()
        self.check_doubles(entries, carried)
        if self.findings or self.unmatched:
            kind: type[RegraftError] = BadInputError if self.findings else UnmatchedKeysError
            raise kind([*self.findings, *self.unmatched])
        source = next(
            (b.left if b.right == self.target else b.right for b in self.books), self.target
        )
        return Plan(source, self.target, self.books, self.headers, tuple(entries), tuple(carried))

    def report(self, code: str, message: str, **place: str | None) -> None:
        self.findings.append(Finding(code, message, where=self.where, **place))

    def reverse(self, book: Book) -> bool:
        return book.left == self.target

    def claims(self) -> dict[Rule, list[_Claim]]:
        found: list[tuple[Specificity, _Claim]] = []
        for book in self.books:
            scope = self.scopes.get(book.name, Scope())
            for rule in book.rules:
                for number, term in enumerate(rule.equation.sides(self.reverse(book))[0]):
                    for group in self.headers.groups:
                        claim = self.claim(rule, number, term, group, scope)
                        if claim is not None:
                            found.append((specificity(term), claim))
        found.sort(key=lambda pair: pair[0], reverse=True)
        ranks = {rank: place for place, (rank, _) in enumerate(found)}
        digits = np.full(len(self.owner), -1)
        claims: dict[Rule, list[_Claim]] = {r: [] for book in self.books for r in book.rules}
        taken: list[_Claim] = []
        for spelled, claim in found:
            ids = claim.ids()
            rivals = self.owner[ids]
            if (rivals >= 0).any():
                clash = (rivals >= 0) & (digits[ids] == ranks[spelled])
                if clash.any():
                    first = int(np.flatnonzero(clash)[0])
                    other = taken[int(rivals[first])].rule
                    self.report(
                        "two-rules",
                        f"two rules claim it, the other one is {other}",
                        key=self.headers.name(int(ids[first])),
                        rule=str(claim.rule),
                        fix="make one of them spell out what tells them apart",
                    )
                free = rivals < 0
                if not free.any():
                    continue
                claim = claim.keep(free)
                ids = claim.ids()
            book = next(b for b in self.books if claim.rule in b.rules)
            scope = self.scopes.get(book.name, Scope())
            self.check_bounds(
                claim.rule.equation,
                claim.key,
                scope,
                claim.group.take(claim.match.rows),
                claim.match.holes,
                str(claim.rule),
            )
            self.owner[ids] = len(taken)
            digits[ids] = ranks[spelled]
            taken.append(claim)
            claims[claim.rule].append(claim)
        return claims

    def claim(
        self, rule: Rule, number: int, term: Term, group: Group, scope: Scope
    ) -> _Claim | None:
        """The keys of a group that a term speaks of: by name, by number of dims, and inside its scope."""
        assert term.key is not None
        match = match_group(term.key, group)
        if match is None or not scope.admits(group.template):
            return None
        claim = _Claim(rule, number, term, group, match)
        fixed = len(term.dims) - term.ends_open
        dims = self.dims[self.shape_code[claim.ids()]]
        fits = dims >= fixed if term.ends_open else dims == fixed
        if fits.all():
            return claim
        return claim.keep(fits) if fits.any() else None

    def entries(self, rule: Rule, claims: list[_Claim]) -> Iterable[Entry]:
        by_rests: dict[tuple[str, ...], list[_Claim]] = defaultdict(list)
        for claim in claims:
            by_rests[claim.match.rests].append(claim)
        for rests, same in by_rests.items():
            yield from _Family(self, rule, rests, same).entries()

    def carry(self) -> list[Carried]:
        carried: list[Carried] = []
        for group in self.headers.groups:
            free = self.owner[group.ids] < 0
            if not free.any():
                continue
            left = group if free.all() else group.take(free)
            for book in self.books:
                scope = self.scopes.get(book.name, Scope())
                for carry in book.carries:
                    if not len(left) or carry.term.key is None:
                        continue
                    match = match_group(carry.term.key, left)
                    if match is None or not scope.admits(left.template):
                        continue
                    taken = left.take(match.rows)
                    self.check_carried(book, taken, carry, match)
                    carried.append(Carried(taken, carry))
                    rest = np.ones(len(left), dtype=bool)
                    rest[match.rows] = False
                    left = left.take(rest)
            if len(left):
                self.report_unmatched(left)
        return carried

    def check_bounds(
        self, equation: Equation, key: Key, scope: Scope, group: Group, holes: Ints, where: str
    ) -> None:
        for bound in equation.bounds:
            limit = limit_of(
                bound, lambda v: scope.look_up(v) if isinstance(v, ConfigPath) else None
            )
            if limit is None:
                continue
            over = holes[:, hole_axes(key).index(bound.axis)] >= limit
            if over.any():
                self.report(
                    "wrong-base",
                    f"the base model has {limit} ({bound.axis} = 0 to {limit - 1}: {bound}); "
                    f"{over.sum()} keys are beyond",
                    key=group.name(int(np.flatnonzero(over)[0])),
                    rule=where,
                    fix="give the base model that it was trained on",
                )

    def check_carried(self, book: Book, group: Group, carry: Carry, match: Match) -> None:
        scope = self.scopes.get(book.name, Scope())
        place = f"{book.name} ({carry.where})"
        assert carry.term.key is not None
        self.check_bounds(carry.equation, carry.term.key, scope, group, match.holes, place)
        codes, first = np.unique(self.shape_code[group.ids], return_index=True)
        for code, row in zip(codes.tolist(), first.tolist(), strict=True):
            shape = self.shape_list[code]
            try:
                solve_sizes(
                    carry.equation,
                    [(carry.term, shape)],
                    lookup=lambda v: scope.look_up(v) if isinstance(v, ConfigPath) else None,
                )
            except UnknownSizeError:
                continue
            except SizeError as error:
                self.report(
                    "wrong-base",
                    f"its shape is {list(shape)}, which does not fit the base model: {error}",
                    key=group.name(int(row)),
                    rule=place,
                    fix="give the base model that it was trained on",
                )

    def report_unmatched(self, group: Group) -> None:
        for book in self.books:
            for rule in book.rules:
                for term in rule.equation.sides(self.reverse(book))[1]:
                    if term.key is not None and match_group(term.key, group) is not None:
                        self.report(
                            "mixed-layouts",
                            f"this key is already in the layout {self.target}, beside keys that are not"
                            f"{_others(group)}",
                            key=group.name(0),
                            rule=str(rule),
                            fix="keep one of the two and remove the other",
                        )
                        return
        books = ", ".join(book.name for book in self.books) or "none"
        self.unmatched.append(
            Finding(
                "unmatched",
                f"no rule and no carry-over explains this key{_others(group)} (rule books: {books})",
                where=self.where,
                key=group.name(0),
                fix=self.unmatched_fix,
            )
        )

    def check_doubles(self, entries: Sequence[Entry], carried: Sequence[Carried]) -> None:
        by_template: dict[str, list[tuple[Group, str]]] = defaultdict(list)
        for entry in entries:
            for term in entry.written:
                group = entry.keys(term)
                by_template[group.template].append((group, str(entry.rule)))
        for item in carried:
            by_template[item.group.template].append((item.group, f"carry-over {item.carry.where}"))
        for groups in by_template.values():
            if len(groups) < 2:
                continue
            seen: dict[tuple[int, ...], str] = {}
            for group, rule in groups:
                for row, numbers in enumerate(map(tuple, group.numbers.tolist())):
                    if numbers in seen:
                        self.report(
                            "doubled-target",
                            f"two rules produce it, the other one is {seen[numbers]}",
                            key=group.name(row),
                            rule=rule,
                        )
                        break
                    seen[numbers] = rule


class _Family:
    """The claims of one rule that share what ``{*p}`` holds."""

    def __init__(
        self, builder: _Builder, rule: Rule, rests: tuple[str, ...], claims: list[_Claim]
    ) -> None:
        self.builder, self.rule, self.rests = builder, rule, rests
        book = next(b for b in builder.books if rule in b.rules)
        self.reverse = builder.reverse(book)
        self.scope = builder.scopes.get(book.name, Scope())
        self.read, self.written = rule.equation.sides(self.reverse)
        self.loop_names = loops_of(rule.equation)
        self.holes = tuple(stacked_holes(rule.equation, term) for term in self.read)
        rows: list[list[tuple[Ints, Ints, Ints]]] = [[] for _ in self.read]
        for claim in claims:
            columns = {
                name: i
                for i, name in enumerate(hole_axes(claim.key))
                if name is not None and name in self.loop_names
            }
            loop_columns = [columns[name] for name in self.loop_names]
            stack_columns = [i for i in range(len(claim.key.holes)) if i not in columns.values()]
            holes = claim.match.holes
            loops = np.concatenate([claim.match.rest_numbers, holes[:, loop_columns]], axis=1)
            rows[claim.term].append((loops, holes[:, stack_columns], claim.ids()))
        self.rows = [_join(parts) for parts in rows]

    def entries(self) -> Iterable[Entry]:
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
            shape[at[::-1]] = self.builder.shape_code[ids[::-1]]
            odd = self.builder.shape_code[ids] != shape[at]
            if odd.any():
                self.report_odd_shape(ids, at, shape, odd)
            signature.append(shape)
            for column in range(len(holes)):
                most = np.zeros(count, dtype=np.int64)
                np.maximum.at(most, at, stack[:, column] + 1)
                signature.append(most)
        signature += self.target_sizes(loops)
        _, first, kind = np.unique(
            np.stack(signature, axis=1), axis=0, return_index=True, return_inverse=True
        )
        kind = kind.reshape(-1)
        for number, example in enumerate(first.tolist()):
            entry = self.entry(np.flatnonzero(kind == number), loops, placed, signature, example)
            if entry is not None:
                yield entry

    def target_sizes(self, loops: Ints) -> list[Ints]:
        """What each ``shape(KEY, dim)`` is for every loop value, -1 where the target has no such tensor."""
        values = [
            value
            for clause in self.rule.equation.where
            for _, value in clause.values
            if isinstance(value, ShapeOf)
        ]
        columns = []
        for value in values:
            sizes = [self.look_up(value, loop) for loop in loops]
            columns.append(np.array([-1 if s is None else s for s in sizes], dtype=np.int64))
        return columns

    def look_up(self, value: ConfigPath | ShapeOf, loop: Ints) -> int | None:
        """A size that the config or the target says."""
        if isinstance(value, ConfigPath):
            return self.scope.look_up(value)
        marks = sum(text.count(MARK) for text in self.rests)
        columns = {name: marks + i for i, name in enumerate(self.loop_names)}
        holes = [columns[h.name] for h in value.key.holes if isinstance(h, Axis)]
        key = write_group(value.key, self.rests, loop[None, :marks], loop[None, holes]).name(0)
        shape = self.scope.shapes.get(key)
        return None if shape is None else shape[value.dim]

    def entry(
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
                shapes.append((term, self.builder.shape_list[code]))
            seen.append([int(s[example]) for s in signature[column + 1 : column + 1 + len(holes)]])
            column += 1 + len(holes)
        try:
            sizes, rest = self.solve(shapes, seen, loops[example])
        except SizeError as error:
            self.report_size(error, loops[example], placed, example)
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
                    self.report_extra(ids[outside], number, stack)
                    whole = False
                    rows, index, ids = rows[~outside], index[~outside], ids[~outside]
                filled[(rows, *index.T)] = ids
            if not self.builder.partial and (filled < 0).any():
                self.report_missing(filled, number, stack, loops[members])
                whole = False
            sources.append(filled)
        if not whole:
            return None
        copies = lower(self.rule.equation, sizes, self.reverse)
        return Entry(
            self.rule,
            self.reverse,
            self.rests,
            loops[members],
            sizes,
            rest,
            tuple(sources),
            copies,
        )

    def solve(
        self, shapes: list[tuple[Term, tuple[int, ...]]], seen: list[list[int]], loop: Ints
    ) -> tuple[dict[str, int], tuple[int, ...]]:
        def look_up(value: ConfigPath | ShapeOf) -> int | None:
            return self.look_up(value, loop)

        equation = self.rule.equation
        try:
            return solve_sizes(equation, shapes, lookup=look_up)
        except UnknownSizeError as error:
            counts: list[tuple[Expr, int]] = []
            unknown = set(error.axes)
            for holes, most in zip(self.holes, seen, strict=True):
                for hole, found in zip(holes, most, strict=True):
                    if found and unknown & set(axes_of(hole)):
                        number: int | None = found
                        if self.builder.partial:
                            name = next(axes_of(hole))
                            guess = self.builder.guess
                            number = guess(self.rule, name, found) if guess else None
                        if number is not None:
                            counts.append((hole, number))
            most_of: dict[Expr, int] = {}
            for hole, number in counts:
                most_of[hole] = max(most_of.get(hole, 0), number)
            return solve_sizes(equation, shapes, most_of.items(), lookup=look_up)

    def report_odd_shape(
        self, ids: Ints, at: Ints, shape: Ints, odd: npt.NDArray[np.bool_]
    ) -> None:
        builder = self.builder
        row = int(np.flatnonzero(odd)[0])
        expected = builder.shape_list[int(shape[at[row]])]
        got = builder.shape_list[int(builder.shape_code[ids[row]])]
        builder.report(
            "shape",
            f"its shape is {list(got)}, its siblings' {list(expected)}",
            key=builder.headers.name(int(ids[row])),
            rule=str(self.rule),
        )

    def report_size(
        self,
        error: SizeError,
        loop: Ints,
        placed: list[tuple[Ints, Ints, Ints] | None],
        example: int,
    ) -> None:
        ids = next(part[2][part[0] == example] for part in placed if part is not None)
        missing = isinstance(error, UnknownSizeError)
        self.builder.report(
            "unknown-size" if missing else "wrong-base",
            str(error),
            key=self.builder.headers.name(int(ids[0])) if len(ids) else None,
            rule=str(self.rule),
            fix=(
                "give the base model with --model: its config says it"
                if missing
                else "give the base model that it belongs to"
            ),
        )

    def report_extra(self, ids: Ints, term: int, stack: tuple[int, ...]) -> None:
        builder = self.builder
        count = f" (and {len(ids) - 1} more keys like it)" if len(ids) > 1 else ""
        builder.report(
            "extra",
            f"the base model has {' x '.join(map(str, stack))} of these, numbered from 0{count}",
            key=builder.headers.name(int(ids[0])),
            rule=str(self.rule),
            fix="give the base model that it belongs to",
        )

    def report_missing(self, filled: Ints, term: int, stack: tuple[int, ...], loops: Ints) -> None:
        keys = keys_of(self.read[term], self.rule, self.rests, loops, stack)
        rows = np.flatnonzero(filled.reshape(-1) < 0)
        shown = ", ".join(keys.name(int(row)) for row in rows[:3])
        self.builder.report(
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
    if not rows.shape[1]:
        return np.zeros(len(rows), dtype=np.int64), rows[:1]
    limits = rows.max(axis=0) + 1
    if np.prod(limits.astype(float)) < 2**62:
        flat = np.ravel_multi_index(tuple(rows.T), tuple(limits.tolist()))
        _, first, codes = np.unique(flat, return_index=True, return_inverse=True)
    else:
        _, first, codes = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return codes.reshape(-1).astype(np.int64), rows[first]


def _others(group: Group) -> str:
    return f" (and {len(group) - 1} more like it)" if len(group) > 1 else ""


__all__ = ["Guess", "build_plan", "shape_of"]
