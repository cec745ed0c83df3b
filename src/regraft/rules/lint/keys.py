"""Lint of a rule book against the names of a checkpoint or an adapter: what never fires, what is not explained."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from regraft.equation.lower import stacked_holes
from regraft.equation.notation import Term
from regraft.errors import Finding
from regraft.names.keys import Group
from regraft.rules.book import Book, Rule
from regraft.rules.direction import Side
from regraft.rules.indices import reading_of
from regraft.rules.lint.book import Fault
from regraft.rules.templates import match_group, specificity


@dataclass(frozen=True, slots=True)
class Keys:
    """The names of a file's tensors, and how many dims each has where that is known."""

    groups: tuple[Group, ...]
    dims: Mapping[int, int]
    """By id; an adapter's base tensors have none."""
    where: str
    whole: bool
    """Whether nothing may be missing: True for a checkpoint, False for an adapter."""

    def __len__(self) -> int:
        return sum(map(len, self.groups))


def lint_keys(book: Book, keys: Keys) -> tuple[dict[str, int], list[Fault]]:
    """How many keys every rule claims, and what is wrong between the book and the keys.

    A rule is dead where it claims no key on either side, so the layout need not be known; a module's rule where none of
    its parts does: a model without biases has no use for one of them.
    """
    hits: dict[str, Counter[Side]] = {str(rule): Counter() for rule in book.rules}
    faults: list[Fault] = []
    explained: set[int] = set()
    for side in ("left", "right"):
        owner = _claims(book, side, keys)
        explained |= owner.keys()
        for rule, _ in owner.values():
            hits[str(rule)][side] += 1
        if keys.whole:
            faults += _missing(book, side, keys, owner)
    lines: dict[str, int] = {carry.where: 0 for carry in book.carries}
    for carry in book.carries:
        for group in keys.groups:
            match = match_group(carry.term.key, group) if carry.term.key is not None else None
            if match is not None:
                ids = set(group.ids[match.rows].tolist()) - explained
                explained |= ids
                lines[carry.where] += len(ids)
    fired = {name: max(counts.values(), default=0) for name, counts in hits.items()}
    parts: dict[tuple[str, str], list[Rule]] = defaultdict(list)
    for rule in book.rules:
        parts[rule.where, rule.module or str(rule)].append(rule)
    for same in parts.values():
        if not any(fired[str(rule)] for rule in same):
            finding = Finding(
                "dead-rule",
                f"it claims none of the {len(keys)} keys, in either layout",
                where=same[0].where,
                rule=same[0].module or same[0].name,
                fix="correct its keys, or remove it if no model has them",
            )
            faults.append(Fault("warning", finding))
    for where, count in lines.items():
        own = where.startswith(f"{book.path}:")
        if own and not count:
            finding = Finding(
                "dead-rule",
                f"this carry-over takes none of the {len(keys)} keys",
                where=where,
                fix="correct its keys, or remove it if no model has them",
            )
            faults.append(Fault("note", finding))
    for group in keys.groups:
        rows = [row for row, number in enumerate(group.ids.tolist()) if number not in explained]
        if rows:
            more = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
            finding = Finding(
                "unmatched",
                f"no rule matches this key{more}",
                where=keys.where,
                key=group.name(rows[0]),
                fix=f"add it to {book.path}; regraft explain shows which rules come close",
            )
            faults.append(Fault("error", finding, None, group.name(rows[0])))
    return fired, faults


def _claims(book: Book, side: Side, keys: Keys) -> dict[int, tuple[Rule, Term]]:
    """Who claims every key, as the plan does it: the closest term that it fits."""
    terms = [
        (specificity(term, rule.equation), rule, term)
        for rule in book.rules
        for term in (rule.equation.left if side == "left" else rule.equation.right)
    ]
    terms.sort(key=lambda each: each[0], reverse=True)
    owner: dict[int, tuple[Rule, Term]] = {}
    for _, rule, term in terms:
        fixed = len(term.dims) - term.ends_open
        for group in keys.groups:
            match = match_group(term.key, group) if term.key is not None else None
            for row in match.rows.tolist() if match is not None else ():
                number = int(group.ids[row])
                dims = keys.dims.get(number)
                if dims is None or (dims >= fixed if term.ends_open else dims == fixed):
                    owner.setdefault(number, (rule, term))
    return owner


def _missing(
    book: Book, side: Side, keys: Keys, owner: Mapping[int, tuple[Rule, Term]]
) -> Iterator[Fault]:
    """Stacked indices with gaps, and terms of a rule that are there without their siblings."""
    for rule in book.rules:
        terms = rule.equation.left if side == "left" else rule.equation.right
        seen = [_indices(rule, term, keys, owner) for term in terms]
        if not all(seen) or _is_shared(book, rule, side):
            continue
        for term, found in zip(terms, seen, strict=True):
            if not stacked_holes(rule.equation, term):
                continue
            most = max(max(each) for indices in found.values() for each in indices) + 1
            gaps = [
                (loop, n)
                for loop, indices in found.items()
                for n in range(most)
                if len(next(iter(indices))) == 1 and (n,) not in indices
            ]
            if gaps:
                loop, n = gaps[0]
                place = f" where the other indices are {list(loop[1:])}" if loop[1:] else ""
                finding = Finding(
                    "incomplete-index",
                    f"{len(gaps)} of the tensors that {term.key} stacks are missing: the first is "
                    f"number {n} of {most}{place}",
                    where=rule.where,
                    rule=rule.name,
                    fix="complete the checkpoint; or give the missing ones their own rule",
                )
                yield Fault("error", finding, None, str(term.key))


Loop = tuple[object, ...]


def _indices(
    rule: Rule, term: Term, keys: Keys, owner: Mapping[int, tuple[Rule, Term]]
) -> dict[Loop, set[tuple[int, ...]]]:
    """The stacked indices that are there, for each value of the loops."""
    assert term.key is not None
    bare = [not each for each in reading_of(rule.equation, term.key).stacked]
    found: dict[Loop, set[tuple[int, ...]]] = {}
    for group in keys.groups:
        match = match_group(term.key, group)
        if match is None:
            continue
        for at, row in enumerate(match.rows.tolist()):
            if owner.get(int(group.ids[row]), (None, None))[1] is not term:
                continue
            holes = match.holes[at].tolist()
            loop = [n for n, is_loop in zip(holes, bare, strict=True) if is_loop]
            stack = tuple(n for n, is_loop in zip(holes, bare, strict=True) if not is_loop)
            text = (match.rests, *match.rest_numbers[at].tolist(), *loop)
            found.setdefault(text, set()).add(stack)
    return found


def _is_shared(book: Book, rule: Rule, side: Side) -> bool:
    """Whether the side's keys are those of the other side, too: then the layout is not told by them."""
    left, right = rule.equation.left, rule.equation.right
    return {t.key for t in left} == {t.key for t in right}
