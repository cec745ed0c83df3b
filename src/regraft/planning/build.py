"""Building a plan from headers and rule books; every key is accounted for, all errors come together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from regraft.equation.notation import (
    Affine,
    Equation,
    Expr,
    Term,
    axes_of,
)
from regraft.equation.sizes import (
    SizeError,
    UnknownSizeError,
    evaluate,
    limit_of,
    solve_sizes,
)
from regraft.errors import BadInputError, Finding, RefusedError, RegraftError, UnmatchedKeysError
from regraft.layouts.graph import Edge
from regraft.names.keys import Group, Ints, distinct_rows
from regraft.planning.families import Claim, Family, Sources
from regraft.planning.model import Scope
from regraft.planning.plan import Carried, Dropped, Entry, Headers, Plan
from regraft.rules.book import Book, Carry, Rule
from regraft.rules.indices import Givens, Indices, reading_of
from regraft.rules.templates import (
    Match,
    Specificity,
    match_group,
)
from regraft.rules.terms import RuleTerm

Advice = Callable[[], str]
"""What to do about something, asked for where it is."""


def unmatched_advice() -> str:
    """What to do about keys that nothing explains."""
    return "check the prefix and the model, or add the key to a rule book"


def build_plan(
    headers: Headers,
    edges: Sequence[Edge],
    *,
    scopes: Mapping[str, Scope] | None = None,
    partial: bool = False,
    mixed: bool = False,
    all_seen: bool = False,
    where: str | None = None,
    unmatched_fix: Advice = unmatched_advice,
) -> Plan:
    """Plan the conversion of some tensors along some edges, which all lead to one layout.

    ``scopes`` gives each book's config; ``partial`` allows tensors to be absent (an adapter need not adapt
    everything), and ``all_seen`` says that of every stack whose size nothing tells the last one is there; ``where``
    names the file in messages, ``unmatched_fix`` what to do about keys that nothing explains.

    Raises ``UnmatchedKeysError`` where only unexplained keys are wrong, ``RefusedError`` where all is well but for
    keys that the target has no place for, otherwise ``BadInputError``.
    """
    builder = _Builder(
        headers,
        tuple(edges),
        scopes or {},
        partial=partial,
        all_seen=all_seen,
        where=where,
        unmatched_fix=unmatched_fix,
    )
    builder.mixed = mixed
    return builder.build()


class _Builder:
    def __init__(
        self,
        headers: Headers,
        edges: tuple[Edge, ...],
        scopes: Mapping[str, Scope],
        *,
        partial: bool,
        all_seen: bool,
        where: str | None,
        unmatched_fix: Advice,
    ) -> None:
        self.unmatched_fix = unmatched_fix
        self.headers, self.edges = headers, edges
        self.books = tuple(edge.book for edge in edges)
        self.scopes, self.where = scopes, where
        self.sources = Sources(headers, partial=partial, all_seen=all_seen, where=where)
        self.unmatched: list[Finding] = []
        self.refused: list[Finding] = []
        self.owner = np.full(len(headers.shapes), -1, dtype=np.int64)
        """For every id the number of the claim that has it."""
        self.dropped: list[Dropped] = []
        self.mixed = False
        self.lasts: dict[tuple[Rule, str, tuple[str, ...]], int] = {}

    def build(self) -> Plan:
        entries: list[Entry] = []
        for rule, claims in self.claims().items():
            entries.extend(self.entries(rule, claims))
        carried = self.carry()
        self.check_doubles(entries, carried)
        if self.sources.findings or self.unmatched:
            kind: type[RegraftError] = (
                BadInputError if self.sources.findings else UnmatchedKeysError
            )
            raise kind([*self.sources.findings, *self.unmatched, *self.refused])
        if self.refused:
            raise RefusedError(self.refused)
        return Plan(self.edges, self.headers, tuple(entries), tuple(carried), tuple(self.dropped))

    def claims(self) -> dict[Rule, list[Claim]]:
        found: list[tuple[Specificity, Claim]] = []
        for edge in self.edges:
            scope = self.scopes.get(edge.book.name, Scope())
            admitted = [g for g in self.headers.groups if scope.admits(g.template)]
            terms = edge.book.terms(edge.reads)
            matches = [
                (term, group, match) for group in admitted for term, match in terms.matching(group)
            ]
            for term, group, match in sorted(matches, key=lambda each: each[0].place):
                claim = self.claim(term, group, match, scope)
                if claim is not None:
                    found.append((term.specificity, claim))
        found.sort(key=lambda pair: pair[0], reverse=True)
        ranks = {rank: place for place, (rank, _) in enumerate(found)}
        digits = np.full(len(self.owner), -1)
        claims: dict[Rule, list[Claim]] = {r: [] for book in self.books for r in book.rules}
        taken: list[Claim] = []
        for spelled, claim in found:
            ids = claim.ids()
            rivals = self.owner[ids]
            if (rivals >= 0).any():
                clash = (rivals >= 0) & (digits[ids] == ranks[spelled])
                if clash.any():
                    first = int(np.flatnonzero(clash)[0])
                    other = taken[int(rivals[first])].rule
                    self.sources.report(
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
                claim.rule.equation, scope, claim.group, claim.match, claim.indices, claim.rule
            )
            self.owner[ids] = len(taken)
            digits[ids] = ranks[spelled]
            taken.append(claim)
            claims[claim.rule].append(claim)
        return claims

    def claim(self, of: RuleTerm, group: Group, match: Match, scope: Scope) -> Claim | None:
        """The keys of a group that a term speaks of: by name, and by number of dims."""
        rule, term = of.rule, of.term
        givens = self.givens(rule, term, group, match, scope)
        if givens is None:
            return None
        indices, fits = match.indices(of.reading, givens)
        claim = Claim(rule, of.number, term, group, match, indices, givens)
        if not fits.all():
            if not fits.any():
                return None
            claim = claim.keep(fits)
        for begin in rule.equation.begins:
            first = limit_of(begin, scope.look_up)
            if first is None:
                self.sources.report(
                    "unknown-size",
                    f"nothing says from which index on a rule holds ({begin})",
                    key=group.name(int(match.rows[0])),
                    rule=str(rule),
                    fix="give the base model with --model, with a config that says it",
                )
                return None
            fits = claim.indices.of_loop(rule.equation, begin.axis) >= first
            if not fits.any():
                return None
            claim = claim if fits.all() else claim.keep(fits)
        fixed = len(term.dims) - term.ends_open
        dims = self.sources.dims[self.sources.shape_code[claim.ids()]]
        fits = dims >= fixed if term.ends_open else dims == fixed
        if fits.all():
            return claim
        return claim.keep(fits) if fits.any() else None

    def givens(
        self, rule: Rule, term: Term, group: Group, match: Match, scope: Scope
    ) -> Givens | None:
        """The values of a rule's indices that have one value each; ``None`` where one is not known."""
        found: dict[str, int] = {}
        for name, clause in rule.equation.givens.items():
            value = evaluate(clause, scope.look_up)
            if value is None and clause.or_last:
                if self.sources.partial:
                    shaped = self.shaped_as_last(rule, name, term, group, match)
                    if shaped is not None and not shaped:
                        return None  # the last layer is not among them
                    value = next(iter(shaped)) if shaped is not None and len(shaped) == 1 else None
                else:
                    value = self.last(rule, name, match.rests, scope)
            if value is None:
                self.sources.report(
                    "unknown-size",
                    f"nothing says which index {name} is ({clause})",
                    key=group.name(int(match.rows[0])),
                    rule=str(rule),
                    fix="give the base model with --model, with a config that says it",
                )
                return None
            found[name] = value
        return found

    def last(self, rule: Rule, name: str, rests: tuple[str, ...], scope: Scope) -> int | None:
        """The greatest index that keys of the file have in the place of a name, where ``{*p}`` holds the same."""
        known = self.lasts.get((rule, name, rests))
        if known is not None:
            return known
        edge = next(e for e in self.edges if rule in e.book.rules)
        found: list[int] = []
        for term in edge.sides(rule)[0]:
            assert term.key is not None
            for at, hole in enumerate(term.key.holes):
                if tuple(axes_of(hole)) != (name,):
                    continue
                for group in self.headers.groups:
                    match = match_group(term.key, group)
                    if match is None or match.rests != rests or not scope.admits(group.template):
                        continue
                    found.append(int(_layers(hole, match.holes[:, at]).max()))
        if found:
            self.lasts[rule, name, rests] = max(found)
        return max(found, default=None)

    def shaped_as_last(
        self, rule: Rule, name: str, term: Term, group: Group, match: Match
    ) -> set[int] | None:
        """The layers whose tensors have the shape that a rule for the last layer asks for, where only some are there.

        ``None`` where a shape does not tell, since another rule for the same key would take it, too.
        """
        assert term.key is not None
        edge = next(e for e in self.edges if rule in e.book.rules)
        rivals = [
            (other, each)
            for other in edge.book.rules
            for each in edge.sides(other)[0]
            if other is not rule and each.key is not None and len(each.dims) == len(term.dims)
            if match_group(each.key, group) is not None
        ]
        at = next(n for n, hole in enumerate(term.key.holes) if tuple(axes_of(hole)) == (name,))
        layers = _layers(term.key.holes[at], match.holes[:, at])
        found: set[int] = set()
        for row, layer in zip(match.rows.tolist(), layers.tolist(), strict=True):
            shape = self.headers.shapes[int(group.ids[row])]
            if not _fits(rule, term, shape):
                continue
            if any(_fits(other, each, shape) for other, each in rivals):
                return None
            found.add(layer)
        return found

    def entries(self, rule: Rule, claims: list[Claim]) -> Iterable[Entry]:
        by_rests: dict[tuple[str, ...], list[Claim]] = defaultdict(list)
        for claim in claims:
            by_rests[claim.match.rests].append(claim)
        edge = next(e for e in self.edges if rule in e.book.rules)
        scope = self.scopes.get(edge.book.name, Scope())
        for rests, same in by_rests.items():
            yield from Family(self.sources, rule, edge.direction, scope, rests, same).entries()

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
                    self.check_carried(book, left, carry, match)
                    carried.append(Carried(left.take(match.rows), carry))
                    rest = np.ones(len(left), dtype=bool)
                    rest[match.rows] = False
                    left = left.take(rest)
            if self.mixed:
                left = self.carry_settled(left, carried)
            left = self.drop(left) if len(left) else left
            if len(left):
                self.report_unmatched(left)
        return carried

    def carry_settled(self, group: Group, carried: list[Carried]) -> Group:
        """Keys that are in the target's layout already, where parts are of several; what is left."""
        for edge in self.edges:
            scope = self.scopes.get(edge.book.name, Scope())
            for rule in edge.book.rules:
                terms, kinds = edge.sides(rule)[1], rule.kinds(edge.direction)[1]
                for term, kind in zip(terms, kinds, strict=True):
                    if not len(group) or term.key is None or not scope.admits(group.template):
                        continue
                    match = match_group(term.key, group)
                    if match is None:
                        continue
                    equation = Equation(str(term), (term,), (term,), ())
                    why = f"it is in {edge.target} already"
                    carry = Carry(term, equation, why, kind, rule.where)
                    carried.append(Carried(group.take(match.rows), carry))
                    rest = np.ones(len(group), dtype=bool)
                    rest[match.rows] = False
                    group = group.take(rest)
        return group

    def drop(self, group: Group) -> Group:
        """Note down what the target layout has no use for; what is left."""
        for edge in self.edges:
            for drop in edge.book.drops:
                if edge.reads not in drop.sides or not len(group):
                    continue
                match = match_group(drop.key, group)
                if match is None:
                    continue
                self.dropped.append(Dropped(group.take(match.rows), drop))
                rest = np.ones(len(group), dtype=bool)
                rest[match.rows] = False
                group = group.take(rest)
        return group

    def check_bounds(
        self,
        equation: Equation,
        scope: Scope,
        group: Group,
        match: Match,
        indices: Indices,
        where: Rule | str,
    ) -> None:
        """Note a key of those that match whose index the base model has not."""
        for bound in equation.bounds:
            index = indices.of_loop(equation, bound.axis)
            limit = limit_of(bound, scope.look_up)
            if limit is None:
                continue
            over = index >= limit
            if over.any():
                self.sources.report(
                    "wrong-base",
                    f"the base model has {limit} ({bound.axis} = 0 to {limit - 1}: {bound}); "
                    f"{over.sum()} keys are beyond",
                    key=group.name(int(match.rows[over][0])),
                    rule=str(where),
                    fix="give the base model that it was trained on",
                )

    def check_carried(self, book: Book, group: Group, carry: Carry, match: Match) -> None:
        scope = self.scopes.get(book.name, Scope())
        place = f"{book.name} ({carry.where})"
        assert carry.term.key is not None
        found, _ = reading_of(carry.equation, carry.term.key).read(match.holes, {})
        self.check_bounds(carry.equation, scope, group, match, found, place)
        ids = group.ids[match.rows]
        codes, first = np.unique(self.sources.shape_code[ids], return_index=True)
        for code, row in zip(codes.tolist(), first.tolist(), strict=True):
            shape = self.sources.shape_list[code]
            try:
                solve_sizes(
                    carry.equation,
                    [(carry.term, shape)],
                    lookup=scope.look_up,
                )
            except UnknownSizeError:
                continue
            except SizeError as error:
                self.sources.report(
                    "wrong-base",
                    f"its shape is {list(shape)}, which does not fit the base model: {error}",
                    key=group.name(int(match.rows[row])),
                    rule=place,
                    fix="give the base model that it was trained on",
                )

    def report_unmatched(self, group: Group) -> None:
        for edge in self.edges:
            for rule in edge.book.rules:
                for term in edge.sides(rule)[1]:
                    if term.key is not None and match_group(term.key, group) is not None:
                        self.sources.report(
                            "mixed-layouts",
                            f"this key is already in the layout {edge.target}, beside keys that are not"
                            f"{_others(group)}",
                            key=group.name(0),
                            rule=str(rule),
                            fix="keep one of the two and remove the other",
                        )
                        return
        for edge in self.edges:
            for absent in edge.book.absents:
                if edge.reads in absent.sides and match_group(absent.key, group) is not None:
                    self.refused.append(
                        Finding(
                            "no-image",
                            f"{edge.target} has no place for it{_others(group)}: {absent.why}",
                            where=self.where,
                            key=group.name(0),
                            rule=f"{edge.book.name} ({absent.where})",
                            fix="merge the adapter into its base and convert the base"
                            if self.sources.partial
                            else "convert this checkpoint with the tool itself",
                        )
                    )
                    return
        for book in self.books:
            for gap in book.gaps:
                if match_group(gap.key, group) is not None:
                    self.unmatched.append(
                        Finding(
                            "no-rule",
                            f"the registry's way to this key{_others(group)} could not be imported: {gap.why}",
                            where=self.where,
                            key=group.name(0),
                            rule=book.name,
                            fix="write a rule book for this model, or convert it with the library itself",
                        )
                    )
                    return
        books = ", ".join(book.name for book in self.books) or "none"
        self.unmatched.append(
            Finding(
                "unmatched",
                f"no rule matches this key{_others(group)} (rule books: {books})",
                where=self.where,
                key=group.name(0),
                fix=self.unmatched_fix(),
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
            if len(groups) < 2 or _all_differ([group.numbers for group, _ in groups]):
                continue
            seen: dict[tuple[int, ...], str] = {}
            for group, rule in groups:
                for row, numbers in enumerate(map(tuple, group.numbers.tolist())):
                    if numbers in seen:
                        self.sources.report(
                            "doubled-target",
                            f"two rules produce it, the other one is {seen[numbers]}",
                            key=group.name(row),
                            rule=rule,
                        )
                        break
                    seen[numbers] = rule


def _all_differ(numbers: Sequence[Ints]) -> bool:
    """Whether no row of numbers is there twice."""
    rows = np.concatenate(numbers)
    return len(distinct_rows(rows)[0]) == len(rows)


def _others(group: Group) -> str:
    return f" (and {len(group) - 1} more)" if len(group) > 1 else ""


__all__ = ["build_plan"]


def _layers(hole: Expr, numbers: Ints) -> Ints:
    """The values of the one index in a hole, from the numbers in keys."""
    if not isinstance(hole, Affine):
        return numbers
    ((factor, _),), constant = hole.terms, hole.constant
    return (numbers - constant) // factor


def _fits(rule: Rule, term: Term, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a shape can be what a term of a rule speaks of."""
    try:
        solve_sizes(rule.equation, [(term, shape)], lookup=lambda value: None)
    except UnknownSizeError:
        return True
    except SizeError:
        return False
    return True
