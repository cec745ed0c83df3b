"""The way of one key: what stands around it, the rule that moves it, where it goes, and what it is made with.

For a key that goes nowhere: which rules almost match, where they part, and which names are spelled like it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from regraft.checkpoints.parts import is_parted
from regraft.checkpoints.source import is_checkpoint, open_checkpoint
from regraft.dialects.opening import find_source
from regraft.dialects.peft.scan import PREFIX
from regraft.dialects.registry import IMAGE
from regraft.equation.notation import Term
from regraft.errors import BadInputError, Finding, RegraftError
from regraft.explaining.explanation import End, Explanation, Near
from regraft.explaining.near import closest, part_ways
from regraft.explaining.subject import SHARED, Name, Subject, open_part, open_subject
from regraft.explaining.way import Claim, family_of, locate, unsized, values_of, with_entry
from regraft.layouts.graph import edges_to
from regraft.names.keys import Group, group_names
from regraft.planning.build import build_plan
from regraft.planning.model import Scope
from regraft.planning.plan import Headers, Plan
from regraft.report import logged
from regraft.rules.book import Book, Carry, Rules
from regraft.rules.templates import Match, match_group, specificity
from regraft.sources.resolve import resolved

_NEAR = 3
_TOO_FAR = 2.0


@logged
def explain(
    src: str | os.PathLike[str],
    key: str,
    *,
    to: str,
    model: str | os.PathLike[str] | None = None,
    source: str | None = None,
    architecture: str | None = None,
    rules: Rules = (),
) -> Explanation:
    """Explain what becomes of one tensor on the way to a layout.

    Args:
        src: what `regraft.convert` takes.
        key: a tensor's name in the file, the base tensor or the module that it is about, or a name of the result.
        to: the layout to explain the way to.
        model: the base model's folder or its ``config.json``.
        source: the layout or the dialect of ``src``, or the family of its model; found out where it is not given.
        architecture: the model's class, where its config names none that transformers has.
        rules: rule books to use in place of regraft's, as `regraft.convert` takes them.

    Raises ``BadInputError`` where ``src`` cannot be read, or a rule book does not lead to the layout.
    """
    with resolved(
        src, to=to, source=source, model=model, architecture=architecture, rules=rules
    ) as found:
        path, given, layout = found.path, found.given, found.to
        assert layout is not None
        if found.is_adapter:
            opening = find_source(path, given)
            if opening.dialect.name in IMAGE:
                from regraft.explaining.image import explain_image

                return explain_image(opening.one(), key, layout, given.family, found.model)
        elif is_parted(opened := open_checkpoint(path)):
            return _Search(open_part(opened, key, given.name), key, layout.name).explain()
        subject = open_subject(path, layout, found.model, given.layout, given)
        return _Search(subject, key, layout.name).explain()


class _Search:
    def __init__(self, subject: Subject, key: str, to: str) -> None:
        self.subject, self.key, self.to = subject, key, to
        books = [b for b in subject.books if to in b.layouts] or subject.books
        self.edges = () if subject.same else edges_to(books, to)
        found = _find(subject, key)
        self.name = found
        source = subject.layout
        if source is None and self.edges:
            source = self.edges[0].source
        self.explanation = Explanation(
            subject.where,
            key,
            subject.kind,
            "unknown",
            found.base if found else None,
            found.role if found else "",
            source,
            to,
            subject.evidence,
            tuple(self.steps(found)) if found else (),
        )

    def steps(self, name: Name) -> Iterator[str]:
        """What is taken off a name, and the scope of the books."""
        if name.name.startswith(PREFIX) and not name.base.startswith(PREFIX):
            yield f"{PREFIX} is what PEFT writes before every key"
        if " of " in name.role and name.base != name.name:
            yield f"it is {name.role}, which adapts {name.base}"
        elif name.role.startswith("lora"):
            yield f"{name.role} is one of two factors of what is added to {name.base}"
        elif name.role:
            yield (
                f"it is {name.role}"
                if name.role != "not understood"
                else "its name is none that PEFT writes"
            )
        for book in self.subject.books:
            scope = self.subject.scopes.get(book.name, Scope())
            if scope.below is not None:
                inside = "inside" if scope.admits(name.base) else "outside"
                yield f"the rule book {book.name} applies below {scope.below}: this key is {inside}"

    def explain(self) -> Explanation:
        if self.name is None:
            return self.backwards()
        base = self.name.base
        group = self.group(base)
        if self.explanation.source_layout == self.to:
            made = replace(self.explanation, fate="there")
            return replace(made, why=f"the file is in {self.to} already: nothing is moved")
        if self.subject.same:
            here = End((base,), 1, 0, self.shape(group), "any", base, mine=True)
            where, why = self.subject.where, self.subject.same
            same = replace(self.explanation, fate="carried", where=where, why=why)
            return replace(same, sources=(here,), targets=(here,))
        stays = self.subject.unstacked.carry_of(base)
        if stays is not None:
            return self.unchanged(stays, stays.where, {}, group, ())
        claims = self.claims(group)
        if claims:
            return self.moved(claims, group)
        for book in (edge.book for edge in self.edges):
            scope = self.subject.scopes.get(book.name, Scope())
            for carry in book.carries:
                if carry.term.key is not None and scope.admits(base):
                    match = match_group(carry.term.key, group)
                    if match is not None:
                        return self.carried(book, carry, match, group)
        shared = self.name.role.startswith(SHARED) and self.subject.plan is not None
        if shared or self.name.name in self.subject.made:
            return self.kept()
        return self.nowhere(base, group)

    def group(self, base: str) -> Group:
        """The row of the plan's headers that is the key; a row of its own where there is none."""
        for group in self.subject.headers.groups:
            names = group.names()
            if base in names:
                return group.take(np.array([names.index(base)]))
        return group_names([base])[0]

    def shape(self, group: Group) -> tuple[int, ...] | None:
        number = int(group.ids[0])
        if not self.subject.shapes_known or number >= len(self.subject.headers.shapes):
            return None
        return tuple(self.subject.headers.shapes[number])

    def claims(self, group: Group) -> list[Claim]:
        """The terms that match a key, the closest first."""
        shape = self.shape(group)
        found = []
        for edge in self.edges:
            scope = self.subject.scopes.get(edge.book.name, Scope())
            for rule in edge.book.rules:
                for term in edge.sides(rule)[0] if rule.reads in (None, edge.reads) else ():
                    match = match_group(term.key, group) if term.key is not None else None
                    if match is None or not scope.admits(group.template):
                        continue
                    if shape is None or _fits(term, len(shape)):
                        found.append(
                            Claim(edge, rule, term, match, specificity(term, rule.equation))
                        )
        return sorted(found, key=lambda claim: claim.rank, reverse=True)

    def moved(self, claims: list[Claim], group: Group) -> Explanation:
        best, *others = claims
        made = replace(
            self.explanation,
            fate="moved",
            rule=f"{best.rule.book}/{best.rule.name}",
            where=best.rule.where,
            equation=best.rule.equation.text.strip(),
            values=values_of(best.term, best.match),
            passed=tuple(f"{c.rule} ({c.term.key})" for c in others if c.rule != best.rule),
        )
        plan, problems = self.plan_of(best, group)
        found = locate(plan, self.explanation.base) if plan is not None else None
        if plan is None or found is None:
            return replace(
                made,
                problems=problems,
                sources=tuple(unsized(best, reading=True)),
                targets=tuple(unsized(best, reading=False)),
            )
        entry, row = found
        return with_entry(made, plan, entry, row, self.explanation.base)

    def plan_of(self, best: Claim, group: Group) -> tuple[Plan | None, tuple[Finding, ...]]:
        """A plan of the tensors that the rule takes together with this one."""
        subject = self.subject
        if subject.plan is not None or not subject.shapes_known:
            return subject.plan, subject.problems
        headers = subject.headers
        family = family_of(best, headers, best.edge.sides(best.rule)[0])
        part = Headers(family, headers.shapes, headers.dtypes)
        try:
            plan = build_plan(
                part,
                [best.edge],
                scopes=subject.scopes,
                where=subject.where,
            )
        except RegraftError as error:
            return None, error.findings
        return plan, ()

    def carried(self, book: Book, carry: Carry, match: Match, group: Group) -> Explanation:
        problems: tuple[Finding, ...] = ()
        if self.subject.shapes_known and self.subject.plan is None:
            try:
                headers = self.subject.headers
                build_plan(
                    Headers((group,), headers.shapes, headers.dtypes),
                    edges_to([book], self.to),
                    scopes=self.subject.scopes,
                    where=self.subject.where,
                )
            except RegraftError as error:
                problems = error.findings
        values = values_of(carry.term, match)
        return self.unchanged(carry, book.name, values, group, problems)

    def unchanged(
        self,
        carry: Carry,
        book: str,
        values: dict[str, int | str],
        group: Group,
        problems: tuple[Finding, ...],
    ) -> Explanation:
        """A key that stays what it is, and the line that says so."""
        base = group.name(0)
        here = End((base,), 1, 0, self.shape(group), carry.kind, str(carry.term), mine=True)
        return replace(
            self.explanation,
            fate="carried",
            rule=f"{book}: {carry.why}",
            where=carry.where,
            equation=str(carry.term),
            values=values,
            why=carry.why,
            sources=(here,),
            targets=(here,),
            problems=problems or self.own_problems(),
        )

    def kept(self) -> Explanation:
        """A tensor that is about none of the base's: the result has it, or it goes into those that share it."""
        assert self.name is not None
        here = End((self.name.name,), 1, 0, None, "any", self.name.name, mine=True)
        stays = self.name.name in self.subject.made
        why = "it is about no tensor of the base, and the result has it as it is"
        if not stays:
            why = "the modules that share it are written as another family, and its numbers go into them"
        return replace(
            self.explanation,
            fate="carried",
            where=self.subject.where,
            why=why,
            sources=(here,),
            targets=(here,) if stays else (),
        )

    def own_problems(self) -> tuple[Finding, ...]:
        """Problems of the whole file that name this key."""
        name = self.name
        if name is None:
            return ()
        return tuple(f for f in self.subject.problems if f.key in (name.name, name.base))

    def nowhere(self, base: str, group: Group) -> Explanation:
        others = {n.base for n in self.subject.names.values()} - {base}
        names = self.base_names() or sorted(others)
        return replace(
            self.explanation,
            fate="unmatched",
            near=self.near(base, group),
            closest=closest(base, names),
            problems=self.own_problems() or self.subject.problems[:1],
        )

    def base_names(self) -> list[str]:
        """The tensors of the base model, where its weights are beside its config."""
        if self.subject.model is None or self.subject.kind != "adapter":
            return []
        folder = Path(self.subject.model.path).parent
        if not is_checkpoint(folder):
            return []
        try:
            return open_checkpoint(folder).tensors.names
        except BadInputError:
            return []  # a config without weights: names of the base are then not known

    def near(self, key: str, group: Group) -> tuple[Near, ...]:
        """The rules that come closest, each with the place where they part."""
        shape = self.shape(group)
        found: list[tuple[float, Near]] = []
        for edge in self.edges:
            book = edge.book
            scope = self.subject.scopes.get(book.name, Scope())
            for rule in book.rules:
                name = f"{book.name}/{rule.name}"
                read, written = edge.sides(rule)
                for term in (*read, *written):
                    if term.key is None:
                        continue
                    layout = edge.source if term in read else self.to
                    if match_group(term.key, group) is not None:
                        why, cost = self.whole_match(term, scope, group, shape, layout), 0.1
                        found.append((cost, Near(name, rule.where, str(term), why)))
                        continue
                    found += _parted(key, name, rule.where, term, f" (in {layout})", 0.0)
            for carry in book.carries:
                name = f"{book.name}: {carry.why}"
                found += _parted(key, name, carry.where, carry.term, "", 0.3)
        found.sort(key=lambda pair: pair[0])
        unique: dict[tuple[str, str | None], Near] = {}
        for _, near in found:
            unique.setdefault((near.rule, near.expected), near)
        return tuple(list(unique.values())[:_NEAR])

    def whole_match(
        self, term: Term, scope: Scope, group: Group, shape: tuple[int, ...] | None, layout: str
    ) -> str:
        if not scope.admits(group.template):
            return f"it matches, but the rule applies below {scope.below} only"
        if layout == self.to:
            return f"this is a name of {self.to}: the key is in the target layout already"
        dims = len(term.dims) - term.ends_open
        return f"it matches by name, but wants {dims} dims, and the tensor has {len(shape or ())}"

    def backwards(self) -> Explanation:
        """A key that is not in the file: what makes it, or what is spelled like it."""
        plan = self.whole_plan()
        if plan is not None:
            for entry in plan.entries:
                for term in entry.written:
                    names = entry.keys(term).names()
                    if self.key in names:
                        row = names.index(self.key) // max(1, len(names) // len(entry))
                        made = replace(
                            self.explanation,
                            fate="moved",
                            rule=f"{entry.rule.book}/{entry.rule.name}",
                            where=entry.rule.where,
                            equation=entry.rule.equation.text.strip(),
                            steps=(f"it is not in the file: it is made in {self.to}",),
                        )
                        return with_entry(made, plan, entry, row, self.key)
        bases = sorted(
            {name.base for name in self.subject.names.values()} | set(self.subject.names)
        )
        targets = [n for g in plan.targets() for n in g.names()] if plan is not None else []
        group = group_names([self.key])[0]
        return replace(
            self.explanation,
            near=self.near(self.key, group) if not self.claims_by_name(group) else (),
            closest=closest(self.key, [*bases, *targets]),
            problems=(
                Finding(
                    "no-such-key",
                    "it is neither in the file nor in what becomes of it",
                    where=self.subject.where,
                    key=self.key,
                    fix="check the spelling; regraft inspect lists what is there",
                ),
                *self.subject.problems,
            ),
        )

    def claims_by_name(self, group: Group) -> bool:
        return any(
            term.key is not None and match_group(term.key, group) is not None
            for edge in self.edges
            for rule in edge.book.rules
            if rule.reads in (None, edge.reads)
            for term in edge.sides(rule)[0]
        )

    def whole_plan(self) -> Plan | None:
        subject = self.subject
        if subject.plan is not None or not subject.shapes_known or subject.layout == self.to:
            return subject.plan
        try:
            return build_plan(
                subject.headers,
                self.edges,
                scopes=subject.scopes,
                where=subject.where,
            )
        except RegraftError:
            return None  # then the names alone have to do; explaining goes on without a plan


def _find(subject: Subject, key: str) -> Name | None:
    """The tensor that is meant: by its name in the file, its base tensor, or its module."""
    if key in subject.names:
        return subject.names[key]
    bare = key.removeprefix(PREFIX)
    for wanted in (bare, f"{bare}.weight"):
        for name in subject.names.values():
            if name.base == wanted:
                return name
    return None


def _fits(term: Term, dims: int) -> bool:
    fixed = len(term.dims) - term.ends_open
    return dims >= fixed if term.ends_open else dims == fixed


def _parted(
    key: str, rule: str, where: str, term: Term, more: str, handicap: float
) -> Iterator[tuple[float, Near]]:
    assert term.key is not None
    parting = part_ways(key, term.key)
    # What only {*p} and {*q} hold says nothing.
    if not 0 < parting.cost <= _TOO_FAR or 2 * (parting.agree + 1) < len(key.split(".")):
        return
    if parting.expected is None:
        why = f"it has no {parting.found!r} there"
    elif parting.found is None:
        why = f"the key lacks {parting.expected!r}"
    else:
        why = f"it has {parting.expected!r} where the key has {parting.found!r}"
    near = Near(rule, where, str(term.key), why + more, parting.at, parting.expected, parting.found)
    yield parting.cost + handicap, near
