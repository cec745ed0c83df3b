"""Proposing a rule book that leads from one file to another, from their contents alone.

Tensors that are equal bit by bit, as they lie or turned, are renames; what is left on one side is searched for what is
left on the other (`regraft.learning.blocks`). Names only decide between tensors that are equal. The book is then
loaded and carried out, and what it makes is compared with the file that is there.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from importlib.resources.abc import Traversable
from itertools import chain
from typing import Any, cast

import numpy as np

from regraft.arrays.apply import apply_plan
from regraft.equation.notation import parse_equation
from regraft.errors import RegraftError
from regraft.layouts.graph import Edge
from regraft.learning.blocks import Finder, natural
from regraft.learning.choosing import NOTHING_CHOSEN, Chosen
from regraft.learning.content import Bits, Tensor, digest
from regraft.learning.relate import (
    Names,
    Relation,
    carried,
    equations,
    pair,
    relation_of,
    writable,
)
from regraft.names.keys import group_names
from regraft.planning.build import build_plan
from regraft.planning.model import Scope
from regraft.planning.plan import Headers, Plan
from regraft.rules.book import Book, Carry, Rule, load_book
from regraft.rules.write import write_book
from regraft.values import replace

_COMMENT = (
    "Proposed by regraft diff from two files, by content. It holds for these two; read it before you use it\n"
    "for others. Contents do not tell the kinds of tensors ('any'): name them before you convert adapters."
)

_CHUNK = 1 << 20

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Made:
    """What a rule reads of the first file and makes of it, and what of that the second has otherwise."""

    rule: Rule
    reads: tuple[str, ...]
    names: tuple[str, ...]
    wrong: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Proposal:
    """A rule book that leads from one file to another."""

    book: Book
    text: str
    """As TOML, as `load_book` reads it."""
    verified: bool
    """Whether carrying it out on the first file gives the second's tensors, bit for bit, both ways."""
    explained: frozenset[str]
    """Names of the first file."""
    makes: frozenset[str]
    """Names of the second file."""
    ambiguous: int
    """How many tensors are equal to others, so that only names told which is which."""
    made: tuple[Made, ...] = ()


def propose(
    left: Tensors,
    right: Tensors,
    *,
    name: str,
    layouts: tuple[str, str],
    model_types: Sequence[str] = (),
) -> Proposal | None:
    """A rule book for what two files have in common; ``None`` where nothing moved."""
    same = [n for n, t in left.items() if n in right and t.look == right[n].look]
    mine = {n: t for n, t in left.items() if n not in right or t.look != right[n].look}
    yours = {n: t for n, t in right.items() if n not in left or t.look != left[n].look}
    mine = {n: t for n, t in mine.items() if writable(n)}
    yours = {n: t for n, t in yours.items() if writable(n)}
    relations, ambiguous = relate(mine, yours)
    if not relations:
        return None
    explained = frozenset(n for r in relations for n in _of(r, left=True))
    makes = frozenset(n for r in relations for n in _of(r, left=False))
    kept = [n for n in same if writable(n)]
    best: Proposal | None = None
    for literal in (False, True):
        text = _write(
            relations, kept, explained, (left, right), name, layouts, model_types, literal=literal
        )
        book = load_book(cast(Traversable, _Text(text)), f"{name}.toml")
        whole = explained | frozenset(kept), makes | frozenset(kept)
        verified = check(book, left, right, *whole)
        best = best or Proposal(book, text, verified, *whole, ambiguous)
        if verified:
            best = dataclasses.replace(best, book=book, text=text, verified=True)
            break
    assert best is not None
    return dataclasses.replace(best, made=tuple(_made(best, left, right)))


def _made(proposal: Proposal, left: Tensors, right: Tensors) -> Iterator[Made]:
    plan = plan_names(proposal.book, left, proposal.explained, proposal.book.right)
    if plan is None:
        return
    table: dict[str, tuple[list[str], list[str], list[str]]] = defaultdict(lambda: ([], [], []))
    for rule, *parts in compare(plan, left, right):
        for column, part in zip(table[rule], parts, strict=True):
            column.extend(part)
    for each in proposal.book.rules:
        reads, names, wrong = map(tuple, table[str(each)])
        yield Made(each, reads, names, wrong)


class _Text:
    """A file that is only its text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def read_text(self, encoding: str) -> str:
        return self.text


def _of(relation: Relation, *, left: bool) -> tuple[str, ...]:
    whole, *parts = relation.names
    return (whole,) if relation.whole_left == left else tuple(parts)


def relate(left: Tensors, right: Tensors) -> tuple[list[Relation], int]:
    """Which tensors of one file are made of which of the other, and how many only their names told apart."""
    names = Names([*left, *right])
    pairs, ambiguous, _ = pair_equal(left, right, names)
    relations = []
    for one, other in pairs:
        relation = pair(left[one], right[other], names)
        if relation is not None:
            relations.append(relation)
    used = {name for relation in relations for name in relation.names}
    for parts, wholes, whole_left in ((left, right, False), (right, left, True)):
        rest = {n: t for n, t in parts.items() if whole_left or n not in used}
        done = {n for r in relations for n in _of(r, left=not whole_left)}
        gone = {n for r in relations for n in _of(r, left=whole_left)}
        finder = Finder(t for n, t in rest.items() if n not in done)
        for name in sorted(wholes, key=natural):
            if name in gone:
                continue
            made = finder.find(wholes[name])
            relation = (
                relation_of(made, wholes[name], names, whole_left=whole_left) if made else None
            )
            if relation is not None:
                relations.append(relation)
    return relations, ambiguous


@dataclass(frozen=True, slots=True)
class Tied:
    """A tensor after that is equal to several before, and names do not tell to which it belongs."""

    target: str
    sources: tuple[str, ...]
    """The one that was taken first."""


def pair_equal(
    left: Tensors, right: Tensors, names: Names, chosen: Chosen = NOTHING_CHOSEN
) -> tuple[list[tuple[str, str]], int, list[Tied]]:
    """Tensors with the same elements, whatever their order of dims.

    Names decide between equal ones, and what was chosen before them. The second result counts those, the third has
    them whose names say nothing.
    """
    tied: list[Tied] = []
    pairs: list[tuple[str, str]] = []
    taken: set[str] = set()
    ambiguous = 0
    for look in (_as_it_is, _in_any_order):
        ours: dict[object, list[str]] = defaultdict(list)
        theirs: dict[object, list[str]] = defaultdict(list)
        for table, tensors, side in ((ours, left, "l"), (theirs, right, "r")):
            for name, tensor in tensors.items():
                if side + name not in taken:
                    table[look(tensor)].append(name)
        single = [(ours[k][0], theirs[k][0]) for k in ours if len(ours[k]) == len(theirs[k]) == 1]
        scores = _Scores(
            names,
            {(names[a][0], names[b][0]) for a, b in chain(pairs, single)},
            {(names[a][0], names[b][0]) for a, b in chosen.tensors if a in left and b in right},
            chosen.tensors,
        )
        for a, b in chain(pairs, single):
            scores.moves[names[a][1]].add(names[b][1])
        found = list(single)
        for key, mine in ours.items():
            yours = theirs.get(key, [])
            if not yours or len(mine) == len(yours) == 1:
                continue
            ambiguous += len(mine)
            found += _closest(mine, yours, scores, tied)
        pairs += found
        taken |= {"l" + a for a, _ in found} | {"r" + b for _, b in found}
    return pairs, ambiguous, tied


def _as_it_is(tensor: Tensor) -> object:
    return tensor.look


def _in_any_order(tensor: Tensor) -> object:
    """The same for a tensor and its transposes and reshapes; equal ones are compared afterwards."""
    if not tensor.whole or not tensor.size:
        return tensor.look
    flat = tensor.bits.reshape(-1)
    plain = mixed = 0
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK].astype(np.uint64) + np.uint64(1)
        plain += int(part.sum(dtype=np.uint64))
        part *= np.uint64(0x9E3779B97F4A7C15)
        part ^= part >> np.uint64(29)
        mixed += int((part * part).sum(dtype=np.uint64))
    return tensor.dtype, flat.size, plain % 2**64, mixed % 2**64


@dataclass(slots=True)
class _Scores:
    """How much two names are alike; templates and numbers that go together elsewhere count more than words."""

    names: Names
    known: set[tuple[str, str]]
    """Templates that go together elsewhere."""
    wanted: set[tuple[str, str]]
    """Templates of what was chosen."""
    exact: frozenset[tuple[str, str]]
    """Names that were chosen."""
    moves: dict[object, set[object]] = field(default_factory=lambda: defaultdict(set))
    words: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    def told(self, a: str, b: str) -> float:
        """What speaks for a pair: that it was chosen, numbers and templates, and words in common."""
        (one, numbers), (other, others) = self.names[a], self.names[b]
        pair = one, other
        if pair not in self.words:
            ratio = SequenceMatcher(None, one, other, autojunk=False).ratio()
            both = [set(_WORD.findall(name)) for name in pair]
            self.words[pair] = len(both[0] & both[1]) / max(1, len(both[0] | both[1])), ratio
        together = others in self.moves[numbers] if numbers in self.moves else numbers == others
        chosen = 2 * _CHOSEN * ((a, b) in self.exact) + _CHOSEN * (pair in self.wanted)
        return chosen + 4.0 * (pair in self.known) + 2.0 * together + self.words[pair][0]

    def of(self, a: str, b: str) -> float:
        """The same, and how alike the letters are, which tells nothing for sure."""
        told = self.told(a, b)
        return told + self.words[self.names[a][0], self.names[b][0]][1]


_CHOSEN = 8.0
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")


def _closest(
    mine: Sequence[str], yours: Sequence[str], scores: _Scores, tied: list[Tied]
) -> Iterator[tuple[str, str]]:
    """Pairs of names that are most alike; where others are as good, that is noted."""
    table = {(a, b): scores.of(a, b) for a in mine for b in yours}
    told = {(a, b): scores.told(a, b) for a in mine for b in yours}
    order = sorted(table, key=lambda pair: (-table[pair], natural(pair[0]), natural(pair[1])))
    partner: dict[str, str] = {}
    taken: set[str] = set()
    for a, b in order:
        if b not in partner and a not in taken:
            partner[b] = a
            taken.add(a)
    back = {a: b for b, a in partner.items()}
    for b, a in partner.items():
        others = [o for o in mine if o != a and not _decided(told, a, b, o, back.get(o))]
        if others:
            tied.append(Tied(b, (a, *others)))
        yield a, b


def _decided(
    told: Mapping[tuple[str, str], float], a: str, b: str, other: str, its: str | None
) -> bool:
    """Whether names tell that ``a`` is ``b``, and not ``other``, which would be ``its`` where it is anything.

    Both must speak for it: a post_attention_layernorm is no attention_norm only because that is left over.
    """
    if its is None:
        return told[a, b] > told[other, b]
    right = told[a, b], told[other, its]
    wrong = told[other, b], told[a, its]
    if max(right) >= _CHOSEN > max(wrong):
        return True
    return right[0] > wrong[0] and right[1] > wrong[1]


def _write(
    relations: Sequence[Relation],
    kept: Sequence[str],
    explained: frozenset[str],
    files: tuple[Tensors, Tensors],
    name: str,
    layouts: tuple[str, str],
    model_types: Sequence[str],
    *,
    literal: bool,
) -> str:
    texts = list(equations(relations, literal=literal))
    if not literal:
        texts = _join_prefixes(texts, files)
    rules = []
    seen: dict[str, int] = defaultdict(int)
    for text, _ in texts:
        equation = parse_equation(text)
        target = str(equation.right[0].key)
        words = [w for w in target.split(".") if not w.startswith("{") and w != "weight"]
        title = " ".join(words[-2:]) or target
        seen[title] += 1
        title += f" {seen[title]}" if seen[title] > 1 else ""
        kinds = tuple("any" for _ in equation.left), tuple("any" for _ in equation.right)
        rules.append(Rule(title, equation, *kinds, name, ""))
    split = Names([*files[0], *files[1]])
    carries = [
        _carry(key)
        for key in carried([n for n in kept if n not in explained], split, literal=literal)
    ]
    book = Book(
        name,
        f"Proposed: from {layouts[0]} to {layouts[1]}",
        *layouts,
        tuple(model_types),
        tuple(rules),
        tuple(carries),
        (),
        (),
        (),
        (),
        "",
        "regraft diff",
    )
    return write_book(book, _COMMENT)


def _carry(key: str) -> Carry:
    equation = parse_equation(f"{key} : ... == {key} : ...")
    return Carry(equation.left[0], equation, "the same in both files", "any", "")


def _join_prefixes(
    texts: Sequence[tuple[str, int]], files: tuple[Tensors, Tensors]
) -> list[tuple[str, int]]:
    """Renames that only exchange the first segments become one, where nothing else begins with them."""
    groups: dict[tuple[str, str], list[tuple[str, int]]] = defaultdict(list)
    rest = []
    for text, count in texts:
        equation = parse_equation(text)
        terms = (*equation.left, *equation.right)
        if len(terms) == 2 and all(str(t).endswith(": ...") for t in terms):
            groups[_prefixes(str(terms[0].key), str(terms[1].key))].append((text, count))
        else:
            rest.append((text, count))
    result: list[tuple[str, int]] = []
    for prefixes, same in groups.items():
        count = sum(number for _, number in same)
        if len(same) > 1 and all(
            _begin(files[side], prefix) == count for side, prefix in enumerate(prefixes)
        ):
            sides = [f"{prefix}.{{*p}}" if prefix else "{*p}" for prefix in prefixes]
            result.append((f"{sides[0]} : ...\n    == {sides[1]} : ...\n", count))
        else:
            result += same
    return result + rest


def _prefixes(one: str, other: str) -> tuple[str, str]:
    a, b = one.split("."), other.split(".")
    while len(a) > 0 and len(b) > 0 and a[-1] == b[-1] and len(a) + len(b) > 1:
        a.pop()
        b.pop()
    return ".".join(a), ".".join(b)


def _begin(tensors: Tensors, prefix: str) -> int:
    return sum(not prefix or name.startswith(prefix + ".") for name in tensors)


def check(
    book: Book,
    left: Tensors,
    right: Tensors,
    explained: Iterable[str],
    makes: Iterable[str],
    config: Mapping[str, Any] | None = None,
) -> bool:
    """Whether a book leads from some tensors to others and back, bit for bit."""
    for one, other, names, expected, layout in (
        (left, right, explained, makes, book.right),
        (right, left, makes, explained, book.left),
    ):
        plan = plan_names(book, one, names, layout, config)
        if plan is None:
            return False
        made: set[str] = set()
        try:
            for _, _, targets, wrong in compare(plan, one, other):
                if wrong:
                    return False
                made.update(targets)
        except RegraftError:
            return False  # copies that differ, padding that is none: the caller says that it is not verified
        if made != set(expected):
            return False
    return True


def plan_names(
    book: Book,
    tensors: Tensors,
    names: Iterable[str],
    layout: str,
    config: Mapping[str, Any] | None = None,
) -> Plan | None:
    """The plan of some tensors; ``None`` where the book does not fit them."""
    wanted = list(names)
    shapes = [tensors[n].shape for n in wanted]
    headers = Headers(group_names(wanted), shapes, [tensors[n].dtype for n in wanted])
    try:
        return build_plan(headers, [Edge.to(book, layout)], scopes={book.name: Scope(config)})
    except RegraftError:
        return None  # the caller says that the book is not verified


def compare(
    plan: Plan, source: Tensors, target: Tensors
) -> Iterator[tuple[str, list[str], list[str], list[str]]]:
    """Carry a plan out, a few tensors at a time: the rule, what it reads and makes, and what of that differs."""
    count = 1 + max((int(g.ids.max()) for g in plan.headers.groups if len(g)), default=-1)
    called: list[str] = [""] * count
    for group in plan.headers.groups:
        for number, name in zip(group.ids.tolist(), group.names(), strict=True):
            called[number] = name
    bits: list[Any] = [None] * count
    """Of the tensors that are at work alone: all of them may be more than fits into memory."""
    plain = replace(plan, entries=(), carried=(), demands=())
    for entry, asked in chain(
        ((e, True) for e in plan.demands), ((e, False) for e in plan.entries)
    ):
        for row in range(len(entry)):
            part = replace(
                entry,
                loops=entry.loops[row : row + 1],
                sources=tuple(ids[row : row + 1] for ids in entry.sources),
            )
            numbers = [number for ids in part.sources for number in ids.reshape(-1).tolist()]
            read = [number for number in numbers if number >= 0 and called[number] in source]
            for number in read:
                bits[number] = source[called[number]].typed
            step = replace(plain, demands=(part,)) if asked else replace(plain, entries=(part,))
            made = apply_plan(step, bits)
            wrong = [n for n, array in made.items() if not _equal(target.get(n), array)]
            for number in read:
                bits[number] = None
            if not asked:
                yield str(entry.rule), [called[n] for n in read], list(made), wrong
    for item in plan.carried:
        names = item.group.names()
        wrong = [n for n in names if n not in target or source[n].look != target[n].look]
        yield "", names, names, wrong


def _equal(tensor: Tensor | None, bits: Bits) -> bool:
    if tensor is None:
        return False
    if tensor.bits_shape != bits.shape or tensor.held_as != bits.dtype:
        return False
    return digest(bits) == tensor.digest


__all__ = ["Proposal", "Tied", "check", "compare", "pair_equal", "plan_names", "propose", "relate"]
