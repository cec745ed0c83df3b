"""Other sizes of a checkpoint, from its headers and its config: for models that nothing but their files describes.

The config is made small as any other (`learning.shrink`), whatever its fields are called. What a size in a header is
made of is told from the old config: a field, a product of two, a multiple, the rows of a fused qkv. Where several say
it, the tensor's name decides, so it takes a converter to show whether the new sizes are those of a model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import lcm
from typing import Any

from regraft.learning.relate import Names, isolated
from regraft.learning.shrink import shrink
from regraft.names.keys import MARK, fill

Shapes = Mapping[str, tuple[int, ...]]
Path = tuple[str, ...]
Row = tuple[int, ...]

_SORTS = {
    sort: (re.compile(field), re.compile(rf"(^|[._\d])({tensor})"))
    for sort, field, tensor in (
        ("vocab", "vocab|tokens", "embed|wte|tok|emb|lm_head|out|unembed|head|logits"),
        ("experts", "expert|moe", "expert|router|gate|moe"),
        ("positions", "position|context|seq|ctx|block_size", "pos|wpe"),
        ("layers", "layer|block|depth|stage", "layer|block|stage"),
        (
            "head",
            "head|kv|query|groups",
            r"att|w?[qkvo](kv)?([._]|$)|key|query|value|proj|rope|rot|c_attn|in_proj|qkv",
        ),
        ("rank", "rank|lora", "q|kv|k|lora|down|up|rank"),
        (
            "inner",
            "ff|mlp|intermediate|inner|feed",
            r"mlp|ff|fc|gate|up|down|w\d|dense|inter|lin|expert",
        ),
    )
}
"""What a field says, by words of its name, and the names of the tensors that have such a size."""
_HEAD_SIZE = re.compile(r"head_?(dim|size|width)|(d|dim)_?head|kv_channels|hd")
_KEYS = re.compile("kv|key|group")
_HIDDEN = re.compile(
    r"hidden_?size|hidden_?dim|d_?model|n_?emb(d|ed)|dim|width|model_dim|embed_dim"
)
_FRESH = (29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 103, 107, 109, 127)
_SMALL = 8
"""Sizes below are too often something else, for a field of an unknown name to be them."""
_MULTIPLES = range(2, 9)


@dataclass(frozen=True, slots=True)
class _Field:
    """A whole number of a config, before and after."""

    path: Path
    old: int
    new: int

    @property
    def sort(self) -> str | None:
        name = self.path[-1].lower()
        return next((sort for sort, (field, _) in _SORTS.items() if field.search(name)), None)

    @property
    def counts_heads(self) -> bool:
        return self.sort == "head" and not _HEAD_SIZE.search(self.path[-1])

    @property
    def counts_queries(self) -> bool:
        return self.counts_heads and not _KEYS.search(self.path[-1])


def resized(
    shapes: Shapes, config: Mapping[str, Any], size: int, fixed: Mapping[str, Any] | None = None
) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Names and shapes of a model that is as a checkpoint's is, but for its sizes, and its config.

    ``size`` counts from 0, ``fixed`` fields stay what they are told to be.

    >>> config = {"dim": 16, "n_heads": 4, "n_layers": 1}
    >>> shapes = {"blocks.0.qkv.weight": (48, 16), "blocks.0.norm.weight": (16,)}
    >>> resized(shapes, config, 0)
    ({'blocks.0.qkv.weight': (144, 48), 'blocks.0.norm.weight': (48,)}, {'dim': 48, 'n_heads': 6, 'n_layers': 1})
    """
    holes = _Holes(shapes)
    small = shrink(config, size, fixed, own=True)
    for change in (_kept_counts, _told_apart, _agreeing):
        for path, value in change(_fields(config, small), holes, size).items():
            if path[0] not in (fixed or ()):
                _put(small, path, value)
    fields = _fields(config, small)
    _fit_lists(config, small, fields)
    made = {
        name: tuple(_dim(n, like, fields) for n in shapes[like])
        for name, like in holes.names(fields)
    }
    return {name: made[name] for name in sorted(made, key=_order(shapes, made))}, small


def _order(shapes: Shapes, made: Shapes) -> Any:
    """Names in the checkpoint's order, those that it has not behind."""
    known = {name: number for number, name in enumerate(shapes)}
    return lambda name: known.get(name, len(known) + len(made))


def _fields(old: Mapping[str, Any], new: Mapping[str, Any], at: Path = ()) -> list[_Field]:
    found: list[_Field] = []
    for name, value in old.items():
        if isinstance(value, Mapping) and isinstance(new.get(name), Mapping):
            found += _fields(value, new[name], (*at, str(name)))
        elif _is_number(value) and _is_number(new.get(name)) and value > 0:
            field = _Field((*at, str(name)), value, new[name])
            found += [field] if value > 1 or field.counts_heads else []
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _put(config: dict[str, Any], path: Path, value: int) -> None:
    for name in path[:-1]:
        config = config[name]
    config[path[-1]] = value


class _Holes:
    """The numbers in the names of a checkpoint, and how many there are of each."""

    def __init__(self, shapes: Shapes) -> None:
        names = Names(shapes)
        self.rows: dict[str, dict[Row, str]] = defaultdict(dict)
        for name in shapes:
            template, row = names[name]
            self.rows[template][row] = name
        self.sizes = {n for shape in shapes.values() for n in shape}
        self.counts: dict[str, int] = {}
        """How many numbers there are behind a prefix, which ends with a hole that is a segment."""
        self.uneven: set[str] = set()
        """Prefixes whose numbers do not all have the same tensors."""
        for prefix, found in self._seen(shapes).items():
            self.counts[prefix] = max(n for numbers in found.values() for n in numbers) + 1
            whole = set(range(self.counts[prefix]))
            if any(
                set(numbers) != whole or len(set(looks)) > 1
                for numbers, looks in ((each.keys(), each.values()) for each in found.values())
            ):
                self.uneven.add(prefix)

    def _seen(self, shapes: Shapes) -> dict[str, dict[object, dict[int, tuple[int, ...]]]]:
        """Behind each prefix, for all that is equal but for that number: the numbers, with the shapes."""
        seen: dict[str, dict[object, dict[int, tuple[int, ...]]]] = defaultdict(
            lambda: defaultdict(dict)
        )
        for template, rows in self.rows.items():
            for hole, prefix in _prefixes(template):
                for row, name in rows.items():
                    rest = template, row[:hole], row[hole + 1 :]
                    seen[prefix][rest][row[hole]] = shapes[name]
        return seen

    def field(self, prefix: str, fields: Sequence[_Field]) -> _Field | None:
        """The field that says how many numbers there are behind a prefix."""
        wanted = "experts" if "expert" in prefix.split(".")[-2:][0] else "layers"
        same = [f for f in fields if f.old == self.counts[prefix]]
        return next((f for f in same if f.sort == wanted), None)

    def names(self, fields: Sequence[_Field]) -> Iterator[tuple[str, str]]:
        """The names of the other size, each with one of the checkpoint whose tensor is as its own."""
        for template, rows in self.rows.items():
            made = dict(rows)
            for hole, prefix in _prefixes(template):
                field = self.field(prefix, fields)
                if field is None:
                    continue
                if prefix in self.uneven:
                    made = {row: name for row, name in made.items() if row[hole] < field.new}
                else:
                    made = {
                        (*row[:hole], number, *row[hole + 1 :]): name
                        for row, name in made.items()
                        if row[hole] == 0
                        for number in range(field.new)
                    }
            for row, name in made.items():
                yield fill(template, row), name


def _prefixes(template: str) -> Iterator[tuple[int, str]]:
    """The holes that are segments of their own, by number, each with the template up to it."""
    parts = template.split(MARK)
    for hole, alone in enumerate(isolated(template)):
        if alone:
            yield hole, MARK.join(parts[: hole + 1]) + MARK


def _kept_counts(fields: Sequence[_Field], holes: _Holes, _: int) -> dict[Path, int]:
    """Counts that the names cannot follow: of layers that are not alike there are never more than there were."""
    kept = {}
    for field in fields:
        if field.sort not in ("layers", "experts") or field.new == field.old:
            continue
        mine = [prefix for prefix in holes.counts if holes.field(prefix, fields) == field]
        uneven = any(prefix in holes.uneven for prefix in mine)
        missing = not mine and (field.sort == "layers" or field.old not in holes.sizes)
        if missing or (uneven and field.new > field.old):
            kept[field.path] = field.old
    return kept


def _told_apart(fields: Sequence[_Field], holes: _Holes, size: int) -> dict[Path, int]:
    """Sizes for fields that are the sizes of tensors, but have none of their own yet."""
    changed: dict[Path, int] = {}
    taken = {field.new for field in fields if field.new != field.old}
    seen: dict[int, int] = {}
    number = 0
    for field in fields:
        unknown = field.new == field.old and field.old >= _SMALL and field.sort != "layers"
        alike = field.new != field.old and seen.setdefault(field.new, field.old) != field.old
        if field.old not in holes.sizes or not (unknown or alike):
            continue
        equal = next((f.path for f in fields if f.path in changed and f.old == field.old), None)
        if equal is not None:
            changed[field.path] = changed[equal]
            continue
        parts = [
            f.new
            for f in fields
            if f.counts_heads and field.old % f.old == 0 and field.sort not in ("vocab", "inner")
        ]
        base = lcm(*parts)
        while (new := base * _FRESH[(number * 3 + size) % len(_FRESH)]) in taken:
            number += 1
        number += 1
        taken.add(new)
        changed[field.path] = new
    return changed


def _agreeing(fields: Sequence[_Field], _: _Holes, __: int) -> dict[Path, int]:
    """The size of a head, where heads of that size were as wide as the model."""
    return {
        one.path: wide.new // heads.new
        for one in fields
        if _HEAD_SIZE.fullmatch(one.path[-1])
        for heads in fields
        if heads.counts_queries
        for wide in fields
        if _HIDDEN.fullmatch(wide.path[-1])
        and heads.old * one.old == wide.old
        and wide.new % heads.new == 0
    }


def _fit_lists(config: Mapping[str, Any], small: dict[str, Any], fields: Sequence[_Field]) -> None:
    """Lists with something for each layer are as long as there are layers."""
    layers = [f for f in fields if f.sort == "layers" and len(f.path) == 1]
    for name, value in config.items():
        count = next((f for f in layers if isinstance(value, list) and len(value) == f.old), None)
        if count is not None:
            small[name] = (value + value[-1:] * count.new)[: count.new]


def _dim(size: int, name: str, fields: Sequence[_Field]) -> int:
    """What a size becomes; what no field says stays."""
    best: tuple[int, int] | None = None
    for cost, new, used in _ways(size, fields):
        strange = sum(not _goes_with(field, name) for field in used)
        if size < 4 and (cost or strange or any(f.sort is None for f in used)):
            continue
        if best is None or cost + 10 * strange < best[0]:
            best = cost + 10 * strange, new
    return size if best is None else best[1]


def _goes_with(field: _Field, name: str) -> bool:
    sort = field.sort
    return sort is None or bool(_SORTS[sort][1].search(name))


def _ways(size: int, fields: Sequence[_Field]) -> Iterator[tuple[int, int, tuple[_Field, ...]]]:
    """What may make a size: how far-fetched it is, what it becomes, and the fields in it."""
    if size == 1:
        return
    for one in fields:
        if one.old == size:
            yield 0, one.new, (one,)
        for more in (1, 2):
            if one.sort == "positions" and one.old + more == size:
                yield 6, one.new + more, (one,)
    changed = [f for f in fields if f.old != f.new and f.sort not in ("layers", "positions")]
    parts = [field for field in changed if not _HIDDEN.fullmatch(field.path[-1])]
    pairs = list(combinations(parts, 2))
    for one, other in pairs:
        if one.old * other.old == size:
            yield 2, one.new * other.new, (one, other)
    for one in changed:
        for times in _MULTIPLES:
            if one.old * times == size:
                yield 4, one.new * times, (one,)
            if times in (2, 4) and one.old == size * times and one.new % times == 0:
                yield 6, one.new // times, (one,)
    for one, other in (*pairs, *((b, a) for a, b in pairs)):
        if one.old == size * other.old and one.new % other.new == 0:
            yield 6, one.new // other.new, (one, other)
        for times in _MULTIPLES:
            if one.old * other.old * times == size:
                yield 8, one.new * other.new * times, (one, other)
    yield from _of_heads(size, fields)


def _of_heads(size: int, fields: Sequence[_Field]) -> Iterator[tuple[int, int, tuple[_Field, ...]]]:
    """Rows of heads whose size a field says, or the model's width divided by the heads: of k and v, of a fused qkv."""
    counts = [field for field in fields if field.counts_heads]
    widths = [field for field in fields if _HIDDEN.fullmatch(field.path[-1])]
    heads: list[tuple[int, int, tuple[_Field, ...]]]
    heads = [(f.old, f.new, (f,)) for f in fields if _HEAD_SIZE.fullmatch(f.path[-1])]
    heads += [
        (wide.old // count.old, wide.new // count.new, (wide, count))
        for wide in widths
        for count in counts
        if count.counts_queries
        if wide.old % count.old == 0 and wide.new % count.new == 0
    ]
    for old, new, said in heads:
        for few in counts:
            if few.old * old == size:
                yield 2, few.new * new, (few, *said)
            for many in counts:
                for keys in (1, 2):
                    if few is not many and (many.old + keys * few.old) * old == size:
                        yield 3, (many.new + keys * few.new) * new, (many, few, *said)


__all__ = ["resized"]
