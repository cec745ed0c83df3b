"""The way of one key: what stands around it, the rule that moves it, where it goes, and what it is made with.

For a key that goes nowhere: which rules almost match, where they part, and which names are spelled like it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from regraft.adapters.scan import PREFIX
from regraft.checkpoints.source import is_checkpoint, open_checkpoint
from regraft.equation.lower import Copy
from regraft.equation.notation import Axis, Term, loops_of
from regraft.errors import BadInputError, Finding, RegraftError
from regraft.layouts import parse_layout
from regraft.names.keys import Group, Ints, group_names
from regraft.names.patterns import patterns
from regraft.plan.build import build_plan
from regraft.plan.model import Scope
from regraft.plan.plan import Entry, Headers, Plan, walk
from regraft.rules.book import Book, Carry, Rule, own_layouts
from regraft.rules.templates import Match, match_group, specificity
from regraft.why.near import closest, part_ways
from regraft.why.subject import Name, Subject, open_subject

_NEAR = 3
_TOO_FAR = 2.0


@dataclass(frozen=True, slots=True)
class End:
    """The tensors of one term of a rule: those that are read together, or made together."""

    keys: tuple[str, ...]
    """As patterns (``experts.{0..7}.w1``)."""
    count: int
    absent: int
    """How many of them are not there; an adapter need not have them all."""
    shape: tuple[int, ...] | None
    kind: str
    term: str
    """As the rule writes it."""
    mine: bool
    """Whether the key that was asked for is among them."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A block that goes from one tensor to another."""

    source: str
    source_place: tuple[str, ...]
    """One entry for each dim: ``:`` for all of it, ``0:6``, ``3``, or ``1::2``."""
    target: str
    target_place: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Near:
    """A rule that almost matches."""

    rule: str
    where: str
    template: str
    why: str
    """Where they part."""
    at: int | None = None
    """The number of the key's segment where they part."""
    expected: str | None = None
    found: str | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """The way of one key; ``fate`` is moved, carried, unmatched, unknown or there."""

    src: str
    key: str
    """As it was asked for."""
    kind: str
    """adapter or checkpoint."""
    fate: str
    base: str | None
    """The base tensor that it is about, without what PEFT and wrappers add."""
    role: str
    source_layout: str | None
    target_layout: str
    evidence: tuple[str, ...]
    steps: tuple[str, ...]
    """What is taken off the name before a rule sees it, and the scope of the rule book."""
    rule: str | None = None
    where: str | None = None
    """The rule's file and line."""
    equation: str | None = None
    values: Mapping[str, int | str] = field(default_factory=dict)
    """What holes and ``{*p}`` stand for in this key."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """How large the axes are."""
    sources: tuple[End, ...] = ()
    targets: tuple[End, ...] = ()
    pieces: tuple[Piece, ...] = ()
    why: str | None = None
    """Why it is carried over."""
    passed: tuple[str, ...] = ()
    """Other rules that match and are less close."""
    near: tuple[Near, ...] = ()
    closest: tuple[str, ...] = ()
    problems: tuple[Finding, ...] = ()

    @property
    def arrives(self) -> bool:
        """Whether the key is explained."""
        return self.fate in ("moved", "carried", "there") and not self.problems


def explain(
    src: str | os.PathLike[str],
    key: str,
    *,
    to: str,
    model: str | os.PathLike[str] | None = None,
    source: str | None = None,
) -> Explanation:
    """Explain what becomes of one tensor on the way to a layout.

    ``key`` is a tensor's name in the file, the base tensor that it is about, or a name of the result.

    Raises ``BadInputError`` where ``src`` cannot be read.
    """
    layout = parse_layout(to, own_layouts()).name
    known = Path(model) if model is not None else None
    subject = open_subject(Path(src), to, known, source)
    return _Search(subject, key, layout).explain()


@dataclass(frozen=True, slots=True)
class _Claim:
    book: Book
    rule: Rule
    term: Term
    match: Match
    rank: tuple[int, int, int]


class _Search:
    def __init__(self, subject: Subject, key: str, to: str) -> None:
        self.subject, self.key, self.to = subject, key, to
        found = subject.names.get(key)
        if found is None:
            found = next((n for n in subject.names.values() if n.base == key), None)
        self.name = found
        source = subject.layout
        if source is None and subject.books:
            source = next((_other(book, to) for book in subject.books), None)
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
        if name.role.startswith("lora"):
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
        claims = self.claims(group)
        if claims:
            return self.moved(claims, group)
        for book in self.subject.books:
            scope = self.subject.scopes.get(book.name, Scope())
            for carry in book.carries:
                if carry.term.key is not None and scope.admits(base):
                    match = match_group(carry.term.key, group)
                    if match is not None:
                        return self.carried(book, carry, match, group)
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

    def read(self, book: Book, rule: Rule) -> tuple[Term, ...]:
        return rule.equation.sides(book.left == self.to)[0]

    def claims(self, group: Group) -> list[_Claim]:
        """The terms that match a key, the closest first."""
        shape = self.shape(group)
        found = []
        for book in self.subject.books:
            scope = self.subject.scopes.get(book.name, Scope())
            for rule in book.rules:
                for term in self.read(book, rule):
                    match = match_group(term.key, group) if term.key is not None else None
                    if match is None or not scope.admits(group.template):
                        continue
                    if shape is None or _fits(term, len(shape)):
                        found.append(_Claim(book, rule, term, match, specificity(term)))
        return sorted(found, key=lambda claim: claim.rank, reverse=True)

    def moved(self, claims: list[_Claim], group: Group) -> Explanation:
        best, *others = claims
        made = replace(
            self.explanation,
            fate="moved",
            rule=f"{best.book.name}/{best.rule.name}",
            where=best.rule.where,
            equation=best.rule.equation.text.strip(),
            values=_values(best.term, best.match),
            passed=tuple(f"{c.rule} ({c.term.key})" for c in others if c.rule != best.rule),
        )
        plan, problems = self.plan_of(best, group)
        found = _locate(plan, self.explanation.base) if plan is not None else None
        if plan is None or found is None:
            return replace(
                made,
                problems=problems,
                sources=tuple(_unsized(best, True, best.book.left == self.to)),
                targets=tuple(_unsized(best, False, best.book.left == self.to)),
            )
        entry, row = found
        return _with_entry(made, plan, entry, row, self.explanation.base)

    def plan_of(self, best: _Claim, group: Group) -> tuple[Plan | None, tuple[Finding, ...]]:
        """A plan of the tensors that the rule takes together with this one."""
        subject = self.subject
        if subject.plan is not None or not subject.shapes_known:
            return subject.plan, subject.problems
        headers = subject.headers
        family = _family(best, headers, self.read(best.book, best.rule))
        part = Headers(family, headers.shapes, headers.dtypes)
        try:
            plan = build_plan(
                part,
                [best.book],
                target_layout=self.to,
                scopes=dict(subject.scopes),
                where=subject.where,
            )
        except RegraftError as error:
            return None, error.findings
        return plan, ()

    def carried(self, book: Book, carry: Carry, match: Match, group: Group) -> Explanation:
        shape = self.shape(group)
        base = group.name(0)
        here = End((base,), 1, 0, shape, carry.kind, str(carry.term), True)
        problems: tuple[Finding, ...] = ()
        if self.subject.shapes_known and self.subject.plan is None:
            try:
                headers = self.subject.headers
                build_plan(
                    Headers((group,), headers.shapes, headers.dtypes),
                    [book],
                    target_layout=self.to,
                    scopes=dict(self.subject.scopes),
                    where=self.subject.where,
                )
            except RegraftError as error:
                problems = error.findings
        return replace(
            self.explanation,
            fate="carried",
            rule=f"{book.name}: {carry.why}",
            where=carry.where,
            equation=str(carry.term),
            values=_values(carry.term, match),
            why=carry.why,
            sources=(here,),
            targets=(here,),
            problems=problems or self.own_problems(),
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
        for book in self.subject.books:
            scope = self.subject.scopes.get(book.name, Scope())
            read_layout = _other(book, self.to)
            for rule in book.rules:
                name = f"{book.name}/{rule.name}"
                read, written = rule.equation.sides(book.left == self.to)
                for term in (*read, *written):
                    if term.key is None:
                        continue
                    layout = read_layout if term in read else self.to
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
                        return _with_entry(made, plan, entry, row, self.key)
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
            for book in self.subject.books
            for rule in book.rules
            for term in self.read(book, rule)
        )

    def whole_plan(self) -> Plan | None:
        subject = self.subject
        if subject.plan is not None or not subject.shapes_known or subject.layout == self.to:
            return subject.plan
        try:
            return build_plan(
                subject.headers,
                subject.books,
                target_layout=self.to,
                scopes=dict(subject.scopes),
                where=subject.where,
            )
        except RegraftError:
            return None  # then the names alone have to do; explaining goes on without a plan


def _other(book: Book, layout: str) -> str:
    return book.left if book.right == layout else book.right


def _fits(term: Term, dims: int) -> bool:
    fixed = len(term.dims) - term.ends_open
    return dims >= fixed if term.ends_open else dims == fixed


def _values(term: Term, match: Match) -> dict[str, int | str]:
    """What the holes of a template stand for in the only row of a match."""
    assert term.key is not None
    values: dict[str, int | str] = {}
    at = 0
    for name, text in zip(term.key.rests, match.rests, strict=True):
        marks = text.count("\0")
        numbers = match.rest_numbers[0][at : at + marks].tolist()
        parts = text.split("\0")
        values["*" + name] = parts[0] + "".join(
            f"{n}{part}" for n, part in zip(numbers, parts[1:], strict=True)
        )
        at += marks
    for hole, index in zip(term.key.holes, match.holes[0].tolist(), strict=True):
        values[str(hole)] = index
    return values


def _family(best: _Claim, headers: Headers, read: Sequence[Term]) -> list[Group]:
    """The keys that a rule takes together with one: the same loops, any stacked index."""
    loops = loops_of(best.rule.equation)
    mine = _loop_values(best.term, best.match, loops)[0]
    groups = []
    for group in headers.groups:
        rows: set[int] = set()
        for term in read:
            match = match_group(term.key, group) if term.key is not None else None
            if match is None or match.rests != best.match.rests:
                continue
            values = _loop_values(term, match, loops)
            rows.update(match.rows[(values == mine).all(axis=1)].tolist())
        if rows:
            groups.append(group.take(np.array(sorted(rows))))
    return groups


def _loop_values(term: Term, match: Match, loops: Sequence[str]) -> Ints:
    assert term.key is not None
    names = [hole.name if isinstance(hole, Axis) else "" for hole in term.key.holes]
    columns = [names.index(loop) for loop in loops]
    return np.concatenate([match.rest_numbers, match.holes[:, columns]], axis=1)


def _locate(plan: Plan, base: str | None) -> tuple[Entry, int] | None:
    """The entry that reads a key, and which of its loop values."""
    for entry in plan.entries:
        for term in entry.read:
            names = entry.keys(term).names()
            if base in names:
                return entry, names.index(base) // max(1, len(names) // len(entry))
    return None


def _unsized(best: _Claim, reading: bool, reverse: bool) -> Iterator[End]:
    """The terms of a rule where sizes are not known: holes stay holes, except those that are."""
    values = _values(best.term, best.match)
    loops = loops_of(best.rule.equation)
    sides, kinds = best.rule.equation.sides(reverse), best.rule.kinds(reverse)
    for term, kind in zip(sides[not reading], kinds[not reading], strict=True):
        key = str(term.key)
        for name, value in values.items():
            if name in loops or name.startswith("*") or term is best.term:
                text = str(value)
                key = key.replace("{" + name + "}" + ("." if not text else ""), text)
        yield End((key,), 0, 0, None, kind, str(term), term is best.term)


def _with_entry(
    made: Explanation, plan: Plan, entry: Entry, row: int, key: str | None
) -> Explanation:
    """Sources, targets and pieces of one loop value of an entry."""
    loops = loops_of(entry.rule.equation)
    sizes = {name: size for name, size in entry.sizes.items() if name not in loops}
    sources: list[End] = []
    targets: list[End] = []
    names: list[list[list[str]]] = [[], []]
    for reading, terms, kinds in (
        (True, entry.read, entry.read_kinds),
        (False, entry.written, entry.written_kinds),
    ):
        for number, (term, kind) in enumerate(zip(terms, kinds, strict=True)):
            whole = entry.keys(term).names()
            each = len(whole) // len(entry)
            mine = whole[row * each : (row + 1) * each]
            names[not reading].append(mine)
            absent = int((entry.sources[number][row] < 0).sum()) if reading else 0
            end = End(
                tuple(pattern for pattern, _ in patterns(mine)),
                each,
                absent,
                entry.shape(term),
                kind,
                str(term),
                key in mine,
            )
            (sources if reading else targets).append(end)
    pieces = [
        piece
        for copy in entry.copies
        for piece in _pieces(entry, copy, names)
        if key in (piece.source, piece.target)
    ]
    return replace(
        made,
        sizes=sizes,
        sources=tuple(sources),
        targets=tuple(targets),
        pieces=tuple(pieces),
    )


def _pieces(entry: Entry, copy: Copy, names: list[list[list[str]]]) -> Iterator[Piece]:
    """Every pair of tensors that a copy joins, and the block in each."""
    outer = [axis for axis in copy.axes if axis.source.in_key or axis.target.in_key]
    from_slots, from_dims = walk(entry, copy, outer, False)
    to_slots, to_dims = walk(entry, copy, outer, True)
    read, written = entry.read[copy.source], entry.written[copy.target]
    for point in range(len(from_slots)):
        yield Piece(
            names[0][copy.source][int(from_slots[point])],
            _place(entry, copy, read, copy.source_start, from_dims[:, point].tolist(), False),
            names[1][copy.target][int(to_slots[point])],
            _place(entry, copy, written, copy.target_start, to_dims[:, point].tolist(), True),
        )


def _place(
    entry: Entry,
    copy: Copy,
    term: Term,
    starts: Sequence[int],
    moved: Sequence[int],
    target: bool,
) -> tuple[str, ...]:
    """A block in one tensor, dim by dim, as a slice is written."""
    shape = entry.flat_shape(term)
    result = []
    for dim, (start, offset, size) in enumerate(zip(starts, moved, shape, strict=True)):
        first = start + offset
        inner: list[tuple[int, int]] = []
        for axis in copy.axes:
            place = axis.target if target else axis.source
            other = axis.source if target else axis.target
            if not place.in_key and not other.in_key and place.index == dim and axis.size > 1:
                inner.append((place.step, axis.size))
        inner.sort()
        step, span = (inner[0][0], 1) if inner else (1, 1)
        regular = True
        for stride, count in inner:
            regular &= stride == step * span
            span *= count
        if not regular:
            result.append(f"{first}:… in {span} blocks")
        elif span == size and first == 0:
            result.append(":")
        elif not inner:
            result.append(str(first) if size > 1 else ":")
        elif step == 1:
            result.append(f"{first}:{first + span}")
        else:
            result.append(f"{first}:{first + span * step}:{step}")
    return tuple(result)


def _parted(
    key: str, rule: str, where: str, term: Term, more: str, handicap: float
) -> Iterator[tuple[float, Near]]:
    assert term.key is not None
    parting = part_ways(key, term.key)
    if not 0 < parting.cost <= _TOO_FAR:
        return
    if parting.expected is None:
        why = f"it has no {parting.found!r} there"
    elif parting.found is None:
        why = f"the key lacks {parting.expected!r}"
    else:
        why = f"it has {parting.expected!r} where the key has {parting.found!r}"
    near = Near(rule, where, str(term.key), why + more, parting.at, parting.expected, parting.found)
    yield parting.cost + handicap, near
