"""What the shapes of a learned equation do not say: clauses from the config's fields, from other axes, or numbers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, permutations
from math import prod
from operator import add, mul
from typing import Any

from regraft.equation.notation import (
    Axis,
    Equation,
    Product,
    Sum,
    axes_of,
    parse_equation,
)
from regraft.equation.sizes import undetermined
from regraft.learning.choosing import AXIS, Doubt, as_clause, fields_in, value_of
from regraft.learning.loops import Looped

Config = Mapping[str, Any]

_HINTS = (
    "head_dim",
    "num_key_value_heads",
    "num_attention_heads",
    "hidden_size",
    "intermediate_size",
)
"""Fields that are preferred where several have a size."""
_FIELD = re.compile(r"config\.[\w.]+")
_SKIPPED = (
    *("token", "_id", "version", "seed", "max_position", "window", "per_tok"),
    *("label2id", "chunk_size"),
)


@dataclass(frozen=True, slots=True)
class Seen:
    """The sizes of an equation's axes in one pair of files, for each of its members, and the pair's config."""

    sizes: tuple[Mapping[str, int], ...]
    config: Config | None


@dataclass(frozen=True, slots=True)
class Clauses:
    """The clauses of an equation, and what is not sure about them."""

    where: tuple[str, ...]
    notes: tuple[str, ...]
    doubts: tuple[Doubt, ...] = ()
    ranks: tuple[int, ...] = ()
    """How good each is (`_Option`)."""

    @property
    def weak(self) -> bool:
        """Whether some sizes are said by nothing that is sure."""
        return max(self.ranks, default=0) >= _WEAK

    @property
    def cost(self) -> tuple[int, int, int]:
        """Less is better."""
        unsure = sum(not doubt.sure for doubt in self.doubts)
        return max(self.ranks, default=0), unsure, sum(self.ranks)


_WEAK = 4


@dataclass(frozen=True, slots=True)
class _Option:
    """A clause for an axis."""

    rank: int
    """How good it is; less is better."""
    clause: str
    note: str = ""
    alike: tuple[str, ...] = ()
    """Readings that say the size as well, the clause's first."""
    sure: bool = False
    """Whether names speak for the first."""


@dataclass(frozen=True, slots=True)
class _Favour:
    """What makes one field better than another that says the same size."""

    words: frozenset[str]
    """Those of the names in the equation."""
    chosen: frozenset[str]
    """Fields that were chosen."""

    def rank(self, field: str) -> int:
        """The place among the fields that are known for sizes; less is better."""
        if field in self.chosen:
            return -1
        name = field.rpartition(".")[2]
        return _HINTS.index(name) if name in _HINTS else len(_HINTS)

    def is_known(self, field: str) -> bool:
        """Whether it is one that is known for sizes, and of no other part of the model."""
        return self.rank(field) < len(_HINTS) and self.distance(field) < 2

    def distance(self, field: str) -> int:
        """0 for a field of the part of the model that names speak of, 1 for the model's own, 2 for another part's."""
        if field in self.chosen:
            return 0
        *parts, _ = field.removeprefix("config.").split(".")
        if not parts:
            return 1
        part = parts[0].removesuffix("_config")
        return 0 if self.words & {part, *_PARTS.get(part, ())} else 2

    def order(self, field: str) -> tuple[int, int, int, str]:
        """Less for what is better."""
        return self.distance(field), self.rank(field), field.count("."), field


def clauses_of(
    looped: Looped, seen: Sequence[Seen], chosen: frozenset[str] = frozenset()
) -> Clauses | None:
    """Clauses with which the equation can be read in both directions; ``None`` where members need different ones.

    ``chosen`` are fields of the config that come before others.
    """
    first = looped.members[0]
    where = first.fixed
    notes: list[str] = []
    done = set(first.tags)
    lonely = {*first.copies, *(axis for axis, _ in first.fills)}
    favour = _Favour(frozenset(re.findall("[a-z]+", looped.sides)), chosen)
    doubts: list[Doubt] = []
    ranks: list[int] = []
    beside = _beside(parse_equation(looped.sides))
    while True:
        text = looped.sides + (f"\nwhere {', '.join(where)}" if where else "")
        equation = parse_equation(text)
        loose = [
            name
            for reverse in (False, True)
            for name in undetermined(equation, reverse=reverse)
            if name not in done
        ]
        if not loose:
            counts = _counts(equation, done, lonely, seen, favour)
            return Clauses((*where, *counts), tuple(notes), tuple(doubts), tuple(ranks))
        options = [
            (axis, found)
            for axis in dict.fromkeys(loose)
            if (found := _clause(axis, loose, lonely, seen, favour, beside.get(axis, ())))
        ]
        if not options:
            return None
        axis, best = min(options, key=lambda o: (o[1].rank, len(o[1].alike) > 1 and not o[1].sure))
        ranks.append(best.rank)
        where.append(best.clause)
        done.add(axis)
        if best.note:
            notes.append(best.note)
        if best.alike:
            doubts.append(Doubt(axis, looped.sides, best.alike, best.sure))


def _counts(
    equation: Equation,
    done: set[str],
    lonely: set[str],
    seen: Sequence[Seen],
    favour: _Favour,
) -> Iterator[str]:
    """How many tensors are stacked, where a field of the config says it: otherwise the last may be missing."""
    loops = {*equation.loops, *equation.indices}
    keyed = {
        name
        for side in equation.sides()
        for term in side
        for hole in term.holes
        for name in axes_of(hole)
    }
    for axis in sorted(keyed - loops - done - lonely):
        fields = _fields(axis, seen) if len(seen) > 1 else []
        fields.sort(key=lambda field: ("expert" not in field, favour.order(field)))
        if fields:
            yield f"{axis} = {fields[0]}"


def _beside(equation: Equation) -> dict[str, list[str]]:
    """For every axis that is a piece of a sum by itself: the others in that sum."""
    table: dict[str, list[str]] = defaultdict(list)
    stack = [dim for side in equation.sides() for term in side for dim in term.dims]
    while stack:
        expr = stack.pop()
        if isinstance(expr, Sum):
            pieces = [part.name for part in expr.terms if isinstance(part, Axis)]
            for name in pieces:
                table[name] += [other for other in pieces if other != name]
        if isinstance(expr, Sum | Product):
            stack += expr.terms if isinstance(expr, Sum) else expr.factors
    return table


def _clause(
    axis: str,
    loose: Sequence[str],
    lonely: set[str],
    seen: Sequence[Seen],
    favour: _Favour,
    beside: Sequence[str],
) -> _Option | None:
    """The best clause for an axis, and what is not sure."""
    tables = [table for each in seen for table in each.sizes]
    fields = sorted(_fields(axis, seen), key=favour.order)
    for other in beside if axis not in lonely else ():
        # Pieces of one sum that are alike wherever they were seen are so by themselves.
        if other in loose and all(t.get(axis) == t.get(other) for t in tables):
            several = fields if len(fields) > 1 and len(seen) > 1 else ()
            return _told(-1, axis, [AXIS + other, *several], favour, sure=True)
    wanted = _wanted(axis, seen)
    composed = _composed(axis, seen, favour)
    number = wanted is not None and len(seen) > 1 and len(set(wanted)) == 1
    numbers = [str(wanted[0])] if number and wanted is not None else []
    if numbers and (not fields or favour.rank(fields[0]) == len(_HINTS)):
        # The same at every size: a number, unless it is what a well-known field says.
        return _told(2, axis, [*numbers, *fields, *composed], favour)
    own = [field for field in fields if favour.distance(field) < 2]
    if own:
        rank = 0 if favour.rank(own[0]) < len(_HINTS) else 1
        note = ""
        if len(seen) == 1 and wanted is not None:
            note = f"{axis} = {own[0]} was seen at one size only: it may be the number {wanted[0]}"
        alike = [each for each in own if favour.order(each)[:3] == favour.order(own[0])[:3]]
        return _told(rank, axis, [*fields, *numbers, *composed], favour, note, sure=len(alike) == 1)
    names = [n for n in tables[0] if n != axis and all(n in t for t in tables)]
    if axis in lonely:
        names = []  # copies and padding are as many as they are, not as many as something else
    for other in names:
        ratios = {Fraction(t[axis], t[other]) if t[other] else Fraction(0) for t in tables}
        if len(ratios) != 1 or not min(ratios):
            continue
        (ratio,) = ratios
        if ratio == 1 and (other in loose):
            return _told(2, axis, [AXIS + other, *fields, *composed], favour, sure=True)
    if fields:
        alike = [each for each in fields if favour.order(each)[:3] == favour.order(fields[0])[:3]]
        return _told(3, axis, [*fields, *composed], favour, sure=len(alike) == 1)
    if composed:
        return _told(4, axis, composed, favour, sure=_is_named(composed, seen, favour))
    times = []
    for other in names if len(seen) > 1 else ():
        ratios = {Fraction(t[axis], t[other]) if t[other] else Fraction(0) for t in tables}
        (ratio, *more) = ratios
        if not more and ratio.denominator == 1 and 1 <= ratio.numerator <= 64:
            factor = "" if ratio == 1 else f"{ratio.numerator} * "
            times.append(f"{factor}{AXIS}{other}")
    if times:
        return _told(5, axis, times, favour)
    sizes = {table[axis] for table in tables}
    if len(sizes) == 1:
        (size,) = sizes
        note = "" if len(seen) > 1 else f"{axis} = {size} was seen at one size only"
        return _Option(6, f"{axis} = {size}", note)
    return None


def _told(
    rank: int,
    axis: str,
    readings: Sequence[str],
    favour: _Favour,
    note: str = "",
    *,
    sure: bool = False,
) -> _Option:
    """The clause of the first reading, or of one that was chosen; the others are in doubt where none was.

    ``sure`` is for a first one for which names speak, too.
    """
    chosen = next((each for each in readings if each in favour.chosen), None)
    first = chosen or readings[0]
    alike = tuple(readings) if chosen is None and len(readings) > 1 else ()
    return _Option(rank, f"{axis} = {as_clause(first)}", note, alike, sure)


def _paths(config: Config) -> Iterator[str]:
    """The fields that may say a size."""
    return (path for path in paths_of(config) if "layers" not in path.rpartition(".")[2])


def paths_of(config: Config, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """The fields of a config that are whole numbers, as paths: those that count nothing left out."""
    for name, value in config.items():
        if not isinstance(name, str) or not name.isidentifier():
            continue
        if isinstance(value, bool) or any(word in name for word in _SKIPPED):
            continue
        if isinstance(value, int):
            yield prefix + name
        elif isinstance(value, Mapping) and depth < 2:
            yield from paths_of(value, f"{prefix}{name}.", depth + 1)


def _numbers(seen: Sequence[Seen]) -> dict[str, list[int]]:
    """The config's whole numbers that all pairs have, by field."""
    configs = [each.config for each in seen]
    if not configs or any(config is None for config in configs):
        return {}
    table: dict[str, list[int]] = {}
    assert configs[0] is not None
    for path in _paths(configs[0]):
        values = [value_of(config, path) for config in configs]
        if None not in values:
            table[path] = [v for v in values if v is not None]
    if "head_dim" not in table:
        # A scope knows it from these two where a config does not say it.
        hidden, heads = table.get("hidden_size"), table.get("num_attention_heads")
        if hidden and heads and all(b and a % b == 0 for a, b in zip(hidden, heads, strict=True)):
            table["head_dim"] = [a // b for a, b in zip(hidden, heads, strict=True)]
    return table


def _wanted(axis: str, seen: Sequence[Seen]) -> list[int] | None:
    """The axis' size in each pair; ``None`` where members differ."""
    wanted = []
    for each in seen:
        sizes = {table[axis] for table in each.sizes if axis in table}
        if len(sizes) != 1:
            return None
        wanted.append(sizes.pop())
    return wanted


def _fields(axis: str, seen: Sequence[Seen]) -> list[str]:
    wanted = _wanted(axis, seen)
    if wanted is None:
        return []
    found = [f"config.{path}" for path, values in _numbers(seen).items() if values == wanted]
    if len(seen) == 1 and (wanted[0] < 2 or len(found) > 1):
        return []  # one size says nothing where several fields have it
    return found


def _composed(axis: str, seen: Sequence[Seen], favour: _Favour) -> list[str]:
    """What says the size, computed of fields: multiples, quotients, products of up to four, sums of up to three."""
    wanted = _wanted(axis, seen)
    table = _numbers(seen)
    if wanted is None or not table or len(seen) < 2:
        return []
    order = sorted(table, key=lambda path: favour.order(f"config.{path}"))
    found: list[str] = []
    large = [path for path in order if set(table[path]) != {1}]
    for path in large:
        found += [
            f"{times} * config.{path}"
            for times in _TIMES
            if [times * v for v in table[path]] == wanted
        ]
    for sign, combine in (("*", mul), ("+", add)):
        for one, other in combinations(large if sign == "*" else order, 2):
            if one not in large and other not in large:
                continue
            if list(map(combine, table[one], table[other])) == wanted:
                found.append(f"config.{one} {sign} config.{other}")
    for one, other in permutations(large, 2):
        pairs = list(zip(table[one], table[other], strict=True))
        if all(b and not a % b for a, b in pairs) and [a // b for a, b in pairs] == wanted:
            found.append(f"config.{one} / config.{other}")
    found += _of_many(wanted, table, order)
    if _is_derived(seen):
        found = [each for each in found if not _HEADS.issuperset(fields_in(each))]
    found.sort(key=lambda text: text not in favour.chosen)
    return found


def _of_many(
    wanted: Sequence[int], table: Mapping[str, Sequence[int]], order: Sequence[str]
) -> Iterator[str]:
    """Products of three or four fields, and sums of three, that are a size in every pair."""
    factors = [
        path
        for path in order
        if set(table[path]) != {1}
        and all(v and not size % v for v, size in zip(table[path], wanted, strict=True))
    ]
    for count in (3, 4):
        for some in combinations(factors, count):
            values = zip(*(table[path] for path in some), strict=True)
            if list(map(prod, values)) == wanted:
                yield " * ".join(f"config.{path}" for path in some)
    smaller = [
        path
        for path in order
        if all(0 < v < size for v, size in zip(table[path], wanted, strict=True))
    ]
    place = {path: n for n, path in enumerate(smaller)}
    ending: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for path in smaller:
        ending[tuple(table[path])].append(path)
    for one, other in combinations(smaller, 2):
        pairs = zip(wanted, table[one], table[other], strict=True)
        for last in ending.get(tuple(size - a - b for size, a, b in pairs), ()):
            # Three fields that are the same everywhere say no more than the number that they make.
            some = one, other, last
            if place[last] > place[other] and any(len(set(table[path])) > 1 for path in some):
                yield " + ".join(f"config.{path}" for path in some)


def _is_derived(seen: Sequence[Seen]) -> bool:
    """Whether the size of a head is only known from two other fields."""
    return not any(each.config is not None and "head_dim" in each.config for each in seen)


_HEADS = frozenset({"head_dim", "hidden_size", "num_attention_heads"})


def _is_named(readings: Sequence[str], seen: Sequence[Seen], favour: _Favour) -> bool:
    """Whether names speak for the first of composed readings: the others compute the same of fields less likely.

    What is computed of more fields is less likely than what is of well-known ones.
    """
    table = _numbers(seen)
    first = fields_in(readings[0])
    if all(favour.is_known(f"config.{field}") for field in first):
        readings = [each for each in readings if len(fields_in(each)) <= max(2, len(first))]

    def look(reading: str) -> tuple[object, object]:
        fields = [(tuple(table[f]), favour.order(f"config.{f}")[:3]) for f in fields_in(reading)]
        fields = fields if "/" in reading else sorted(fields)
        return (_FIELD.sub("", reading), [v for v, _ in fields]), [order for _, order in fields]

    (values, order), *others = map(look, readings)
    return all(v == values and o != order for v, o in others)


_TIMES = (2, 3, 4)


def likely(seen: Seen, config: Config | None) -> dict[str, list[int]]:
    """Sizes that an equation's axes may have in another pair, from those that they have in one, by axis."""
    table = _numbers([seen, Seen((), config)])
    result: dict[str, list[int]] = {}
    for axis, size in seen.sizes[0].items():
        named = [there for here, there in table.values() if here == size]
        if not named:
            named = [
                combine(one[1], other[1])
                for combine in (mul, add)
                for one, other in combinations(table.values(), 2)
                if combine(one[0], other[0]) == size
            ]
        result[axis] = list(dict.fromkeys([*named, size]))
    return result


def numbers_of(config: Config | None) -> list[int]:
    """The whole numbers of a config."""
    found = (value_of(config, path) for path in (_paths(config) if config is not None else ()))
    return [number for number in found if number is not None]


_PARTS = {
    "text": ("text", "language", "llm", "lm"),
    "vision": ("vision", "visual", "image", "vit"),
    "audio": ("audio", "speech", "sound"),
    "decoder": ("decoder",),
    "encoder": ("encoder",),
}
"""What a part of a model is called in names, by what its config is called."""
