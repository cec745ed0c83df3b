"""Building a plan from headers and rule books; every key is accounted for, all errors come together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from regraft.equation.notation import (
    REST,
    Affine,
    Axis,
    Equation,
    Expr,
    Term,
    axes_of,
)
from regraft.equation.sizes import SizeError, UnknownSizeError, evaluate, solve_sizes
from regraft.errors import BadInputError, Finding, RefusedError, RegraftError, UnmatchedKeysError
from regraft.layouts.graph import Edge
from regraft.names.keys import Group, Ints
from regraft.planning.families import Claim, Family, Part, Sources, Told, of_loop
from regraft.planning.model import Scope
from regraft.planning.plan import Carried, Dropped, Entry, Headers, Plan
from regraft.planning.rows import distinct_rows
from regraft.rules.book import Carry, Rule
from regraft.rules.indices import Givens, reading_of
from regraft.rules.templates import Match, Specificity, match_group
from regraft.rules.terms import RuleTerm

_ANY = (Axis(REST),)
"""The dims of a term that fits any tensor."""

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


class _Kept(Struct, frozen=True, eq=False):
    """Keys that a carry-over speaks of."""

    part: Part
    group: Group
    carry: Carry
    match: Match

    @property
    def place(self) -> str:
        """The line of the book that says so."""
        return f"{self.part.edge.book.name} ({self.carry.where})"


class _Builder:
    """Builds a plan in passes: what names say, what the equations say of sizes, and the entries of both."""

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
        self.headers, self.edges, self.where = headers, edges, where
        self.parts = tuple(Part(edge, scopes.get(edge.book.name, Scope())) for edge in edges)
        self.sources = Sources(headers, partial=partial, all_seen=all_seen, where=where)
        self.unmatched: list[Finding] = []
        self.refused: list[Finding] = []
        self.owner = np.full(len(headers.shapes), -1, dtype=np.int64)
        """For every id the number of the claim that has it."""
        self.kept: list[_Kept] = []
        self.carried: list[Carried] = []
        self.dropped: list[Dropped] = []
        self.left: list[Group] = []
        """What nothing speaks of."""
        self.mixed = False
        self.lasts: dict[tuple[Rule, str, tuple[str, ...]], int] = {}
        self.known: dict[Rule, Told] = {}

    def build(self) -> Plan:
        # What the names say ...
        claims = self.owned(self.claims())
        self.carry()
        families = self.families(claims)
        # ... what the equations say of sizes ...
        for family in families:
            family.solve()
        for kept in self.kept:
            self.check_kept(kept)
        # ... and what both are together.
        entries = [entry for family in families for entry in family.entries()]
        for group in self.left:
            self.report_unmatched(group)
        self.check_doubles(entries)
        if self.sources.findings or self.unmatched:
            kind: type[RegraftError] = (
                BadInputError if self.sources.findings else UnmatchedKeysError
            )
            raise kind([*self.sources.findings, *self.unmatched, *self.refused])
        if self.refused:
            raise RefusedError(self.refused)
        carried, dropped = tuple(self.carried), tuple(self.dropped)
        return Plan(self.edges, self.headers, tuple(entries), carried, dropped)

    def claims(self) -> list[Claim]:
        """The tensors that each term of a rule speaks of, the most closely described first."""
        found: list[Claim] = []
        for part in self.parts:
            direction = part.edge.direction
            admitted = [g for g in self.headers.groups if part.scope.admits(g.template)]
            terms = part.edge.book.terms(direction.read)
            matches = [
                (t, group, match) for group in admitted for t, match in terms.matching(group)
            ]
            matches.sort(key=lambda each: each[0].place)
            read = []
            for term, group, match in matches:
                way = term.rule.ways[direction]
                givens = self.givens(part, term, group, match) if way.rule.equation.givens else {}
                if givens is not None:
                    indices, fits = match.indices(term.reading, givens)
                    read.append((Claim(part, way, term, group, match, indices, givens), fits))
            found += filter(None, (self.fitting(claim, fits) for claim, fits in read))
        found.sort(key=lambda claim: claim.term.specificity, reverse=True)
        return found

    def told(self, part: Part, rule: Rule) -> Told:
        """What the config says of what a rule asks for."""
        told = self.known.get(rule)
        if told is None:
            told = self.known[rule] = part.told(rule.equation)
        return told

    def fitting(self, claim: Claim, fits: npt.NDArray[np.bool_]) -> Claim | None:
        """The keys of a claim whose numbers say something, where the rule holds, and of the term's number of dims."""
        term, equation = claim.term.term, claim.term.rule.equation
        if not fits.all():
            if not fits.any():
                return None
            claim = claim.keep(fits)
        for begin in equation.begins:
            first = evaluate(begin, self.told(claim.part, claim.term.rule).get)
            if first is None:
                self.sources.report(
                    "unknown-size",
                    f"nothing says from which index on a rule holds ({begin})",
                    key=claim.group.name(int(claim.match.rows[0])),
                    rule=str(claim.term.rule),
                    fix="give the base model with --model, with a config that says it",
                )
                return None
            fits = of_loop(equation, begin.axis, claim.indices.loops) >= first
            if not fits.any():
                return None
            claim = claim if fits.all() else claim.keep(fits)
        fixed = len(term.dims) - term.ends_open
        dims = self.sources.dims[self.sources.shape_code[claim.ids]]
        fits = dims >= fixed if term.ends_open else dims == fixed
        if fits.all():
            return claim
        return claim.keep(fits) if fits.any() else None

    def owned(self, claims: list[Claim]) -> list[Claim]:
        """What is left of each claim, where a tensor belongs to the first that speaks of it.

        Two that describe it as closely are reported.
        """
        ranks: dict[Specificity, int] = {}
        rank = np.full(len(self.owner), -1)
        kept: list[Claim] = []
        for claim in claims:
            here = ranks.setdefault(claim.term.specificity, len(ranks))
            ids = claim.ids
            rivals = self.owner[ids]
            free = rivals < 0
            if not free.all():
                clash = ~free & (rank[ids] == here)
                if clash.any():
                    first = int(np.flatnonzero(clash)[0])
                    other = kept[int(rivals[first])].term.rule
                    self.sources.report(
                        "two-rules",
                        f"two rules claim it, the other one is {other}",
                        key=self.headers.name(int(ids[first])),
                        rule=str(claim.term.rule),
                        fix="make one of them spell out what tells them apart",
                    )
                if not free.any():
                    continue
                claim = claim.keep(free)
                ids = ids[free]
            self.owner[ids] = len(kept)
            rank[ids] = here
            kept.append(claim)
        return kept

    def families(self, claims: list[Claim]) -> list[Family]:
        """The claims of one rule that share what ``{*p}`` holds, in the order of the rules in their books."""
        found: dict[Rule, dict[tuple[str, ...], list[Claim]]] = {}
        for claim in claims:
            same = found.setdefault(claim.term.rule, {})
            same.setdefault(claim.match.rests, []).append(claim)
        rules = dict.fromkeys(rule for part in self.parts for rule in part.edge.book.rules)
        return [
            Family(self.sources, same, self.told(same[0].part, rule))
            for rule in rules
            if rule in found
            for same in found[rule].values()
        ]

    def givens(self, part: Part, term: RuleTerm, group: Group, match: Match) -> Givens | None:
        """The values of a rule's indices that have one value each; ``None`` where one is not known."""
        found: dict[str, int] = {}
        for name, clause in term.rule.equation.givens.items():
            value = evaluate(clause, self.told(part, term.rule).get)
            if value is None and clause.or_last:
                if self.sources.partial:
                    shaped = self.shaped_as_last(part.edge, term, name, group, match)
                    if shaped is not None and not shaped:
                        return None  # the last layer is not among them
                    value = next(iter(shaped)) if shaped is not None and len(shaped) == 1 else None
                else:
                    value = self.last(part, term.rule, name, match.rests)
            if value is None:
                self.sources.report(
                    "unknown-size",
                    f"nothing says which index {name} is ({clause})",
                    key=group.name(int(match.rows[0])),
                    rule=str(term.rule),
                    fix="give the base model with --model, with a config that says it",
                )
                return None
            found[name] = value
        return found

    def last(self, part: Part, rule: Rule, name: str, rests: tuple[str, ...]) -> int | None:
        """The greatest index that keys of the file have in the place of a name, where ``{*p}`` holds the same."""
        known = self.lasts.get((rule, name, rests))
        if known is not None:
            return known
        found: list[int] = []
        for term in part.edge.sides(rule)[0]:
            assert term.key is not None
            for at, hole in enumerate(term.key.holes):
                if tuple(axes_of(hole)) != (name,):
                    continue
                for group in self.headers.groups:
                    match = match_group(term.key, group)
                    if (
                        match is None
                        or match.rests != rests
                        or not part.scope.admits(group.template)
                    ):
                        continue
                    found.append(int(_layers(hole, match.holes[:, at]).max()))
        if found:
            self.lasts[rule, name, rests] = max(found)
        return max(found, default=None)

    def shaped_as_last(
        self, edge: Edge, of: RuleTerm, name: str, group: Group, match: Match
    ) -> set[int] | None:
        """The layers whose tensors have the shape that a rule for the last layer asks for, where only some are there.

        ``None`` where a shape does not tell, since another rule for the same key would take it, too.
        """
        rule, term = of.rule, of.term
        rivals = [
            (other, each)
            for other in edge.book.rules
            for each in edge.sides(other)[0]
            if other is not rule and each.key is not None and len(each.dims) == len(term.dims)
            if match_group(each.key, group) is not None
        ]
        at = next(n for n, hole in enumerate(term.holes) if tuple(axes_of(hole)) == (name,))
        layers = _layers(term.holes[at], match.holes[:, at])
        found: set[int] = set()
        for row, layer in zip(match.rows.tolist(), layers.tolist(), strict=True):
            shape = self.headers.shapes[int(group.ids[row])]
            if not _fits(rule, term, shape):
                continue
            if any(_fits(other, each, shape) for other, each in rivals):
                return None
            found.add(layer)
        return found

    def carry(self) -> None:
        """Sort the keys that no rule has: those that stay, those that are dropped, and those that are left."""
        for group in self.headers.groups:
            free = self.owner[group.ids] < 0
            if not free.any():
                continue
            left: Group | None = group if free.all() else group.take(free)
            for part in self.parts:
                if left is not None and part.scope.admits(left.template):
                    left = self.keep(part, left)
            if self.mixed and left is not None:
                left = self.carry_settled(left)
            if left is not None:
                left = self.drop(left)
            if left is not None:
                self.left.append(left)

    def keep(self, part: Part, group: Group) -> Group | None:
        """Note down the keys that a book carries over; what is left."""
        left: Group | None = group
        while left is not None:
            words = part.edge.book.words.matching(left)
            found = next(((word.carry, match) for word, match in words if word.carry), None)
            if found is None:
                break
            carry, match = found
            self.kept.append(_Kept(part, left, carry, match))
            stays, left = _split(left, match)
            self.carried.append(Carried(stays, carry))
        return left

    def carry_settled(self, group: Group) -> Group | None:
        """Keys that are in the target's layout already, where parts are of several; what is left."""
        left: Group | None = group
        for part in self.parts:
            edge = part.edge
            for rule in edge.book.rules:
                terms, kinds = edge.sides(rule)[1], rule.kinds(edge.direction)[1]
                for term, kind in zip(terms, kinds, strict=True):
                    if left is None:
                        return None
                    if term.key is None or not part.scope.admits(left.template):
                        continue
                    match = match_group(term.key, left)
                    if match is None:
                        continue
                    equation = Equation(str(term), (term,), (term,), ())
                    why = f"it is in {edge.target} already"
                    stays, left = _split(left, match)
                    self.carried.append(
                        Carried(stays, Carry(term, equation, why, kind, rule.where))
                    )
        return left

    def drop(self, group: Group) -> Group | None:
        """Note down what the target layout has no use for; what is left."""
        left: Group | None = group
        for edge in self.edges:
            for drop in edge.book.drops:
                if left is None:
                    return None
                match = match_group(drop.key, left) if edge.reads in drop.sides else None
                if match is not None:
                    gone, left = _split(left, match)
                    self.dropped.append(Dropped(gone, drop))
        return left

    def check_kept(self, kept: _Kept) -> None:
        """Note keys that stay and have an index or a size that the base model has not."""
        term, equation = kept.carry.term, kept.carry.equation
        if term.dims == _ANY and not (equation.asked or equation.bounds):
            return
        told = kept.part.told(equation)
        ids = kept.group.ids[kept.match.rows]
        if equation.bounds and term.key is not None:
            indices, _ = reading_of(equation, term.key).read(kept.match.holes, {})
            for bound in equation.bounds:
                limit = evaluate(bound, told.get)
                index = of_loop(equation, bound.axis, indices.loops)
                if limit is not None and (index >= limit).any():
                    self.sources.report_beyond(bound, limit, ids[index >= limit], kept.place)
        codes, first = np.unique(self.sources.shape_code[ids], return_index=True)
        for code, row in zip(codes.tolist(), first.tolist(), strict=True):
            shape = self.sources.shape_list[code]
            try:
                solve_sizes(equation, [(term, shape)], lookup=told.get)
            except UnknownSizeError:
                continue
            except SizeError as error:
                self.sources.report(
                    "wrong-base",
                    f"its shape is {list(shape)}, which does not fit the base model: {error}",
                    key=kept.group.name(int(kept.match.rows[row])),
                    rule=kept.place,
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
        for book in (edge.book for edge in self.edges):
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
        books = ", ".join(edge.book.name for edge in self.edges) or "none"
        self.unmatched.append(
            Finding(
                "unmatched",
                f"no rule matches this key{_others(group)} (rule books: {books})",
                where=self.where,
                key=group.name(0),
                fix=self.unmatched_fix(),
            )
        )

    def check_doubles(self, entries: Sequence[Entry]) -> None:
        """Note keys of the target that two rules write."""
        by_template: dict[str, list[tuple[Group, str]]] = defaultdict(list)
        for entry in entries:
            for group in entry.targets:
                by_template[group.template].append((group, str(entry.rule)))
        for item in self.carried:
            by_template[item.group.template].append((item.group, f"carry-over {item.carry.where}"))
        for groups in by_template.values():
            if len(groups) < 2:
                continue
            rows = np.concatenate([group.numbers for group, _ in groups])
            if len(distinct_rows(rows)[0]) == len(rows):
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


def _split(group: Group, match: Match) -> tuple[Group, Group | None]:
    """The keys of a group that match, and the others where there are any."""
    if len(match.rows) == len(group.ids):
        return group, None
    rest = np.ones(len(group.ids), dtype=bool)
    rest[match.rows] = False
    return group.take(match.rows), group.take(rest)


def _others(group: Group) -> str:
    return f" (and {len(group) - 1} more)" if len(group) > 1 else ""


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


__all__ = ["build_plan"]
