"""Relations between tensors of two files, and equations that say many of them at once.

A relation is concrete: this tensor is made of those. Relations that differ in numbers of their names only become one
equation, with holes where the numbers go together.
"""

from __future__ import annotations

import string
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from regraft.learning.blocks import Block, Made
from regraft.learning.content import Tensor, digest
from regraft.names.keys import MARK, group_names

_PIECES = "abcdfghj"
_LOOPS = "lmnuvwxyz"
_UNWRITABLE = set(" \t\r\n:,(){}")
Role = str | None
"""What a number of a name is: ``e`` or ``s`` where it counts, ``None`` where it is not known yet."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tensors that take the same place in wholes of one kind; one of them where nothing is stacked."""

    template: str
    numbers: tuple[int, ...]
    """Those of the first."""
    roles: tuple[Role, ...]
    dims: str


@dataclass(frozen=True, slots=True)
class Relation:
    """One tensor and what it is made of."""

    template: str
    numbers: tuple[int, ...]
    dims: str
    pieces: tuple[Piece, ...]
    where: tuple[str, ...]
    whole_left: bool
    """Whether the one tensor is on the left, and what it is made of on the right."""
    names: tuple[str, ...]
    """Every name that it explains: the whole's first."""


class Names:
    """Templates and numbers of names."""

    def __init__(self, names: Iterable[str]) -> None:
        self.split: dict[str, tuple[str, tuple[int, ...]]] = {}
        known = list(names)
        for group in group_names(known):
            for number, row in zip(group.ids.tolist(), group.numbers.tolist(), strict=True):
                self.split[known[number]] = group.template, tuple(row)

    def __getitem__(self, name: str) -> tuple[str, tuple[int, ...]]:
        return self.split[name]


def writable(name: str) -> bool:
    """Whether the notation can hold a name."""
    return not _UNWRITABLE & set(name)


def pair(left: Tensor, right: Tensor, names: Names) -> Relation | None:
    """The relation of two tensors that hold the same elements: equal, transposed, or in another shape."""
    if left.look == right.look:
        dims = "...", "..."
    else:
        found = _transposed(left, right) or _reshaped(left, right)
        if found is None:
            return None
        dims = found
    where: tuple[str, ...] = ()
    if "(" in "".join(dims):
        shape, text = (left.shape, dims[0]) if "(" not in dims[0] else (right.shape, dims[1])
        where = tuple(f"{axis} = {n}" for axis, n in zip(text.split()[1:], shape[1:], strict=True))
    elif left.name == right.name:
        # Only sizes tell the layouts apart where a tensor keeps its name.
        where = tuple(f"{axis} = {n}" for axis, n in zip(dims[0].split(), left.shape, strict=False))
    template, numbers = names[left.name]
    piece = Piece(template, numbers, (None,) * len(numbers), dims[0])
    template, numbers = names[right.name]
    return Relation(
        template, numbers, dims[1], (piece,), where, whole_left=False, names=(right.name, left.name)
    )


def _transposed(left: Tensor, right: Tensor) -> tuple[str, str] | None:
    dims = len(left.shape)
    if not (left.whole and right.whole) or not 2 <= dims <= 4 or left.dtype != right.dtype:
        return None
    for order in permutations(range(dims)):
        fits = tuple(left.shape[i] for i in order) == right.shape and order != tuple(range(dims))
        if fits and digest(left.bits.transpose(order)) == right.digest:
            names = _PIECES[:dims]
            return " ".join(names), " ".join(names[i] for i in order)
    return None


def _reshaped(left: Tensor, right: Tensor) -> tuple[str, str] | None:
    """The last dims of one joined in the other: a flattened convolution."""
    if left.dtype != right.dtype or left.digest != right.digest:
        return None
    for many, few, swap in ((left, right, False), (right, left, True)):
        if len(few.shape) < len(many.shape) and many.shape[: len(few.shape) - 1] == few.shape[:-1]:
            axes = list(_PIECES[: len(many.shape)])
            kept = len(few.shape) - 1
            joined = [*axes[:kept], f"({' '.join(axes[kept:])})"]
            both = " ".join(axes), " ".join(joined)
            return both[::-1] if swap else both
    return None


def relation_of(made: Made, whole: Tensor, names: Names, *, whole_left: bool) -> Relation | None:
    """The relation of a whole and its blocks; ``None`` where its stack has no order that an index says."""
    stacks: dict[int | None, list[Block]] = defaultdict(list)
    for block in made.blocks:
        stacks[block.lead].append(block)
    rows = list(stacks.values())
    first = rows[0]
    shape = [(block.size, block.turned) for block in first]
    if any([(b.size, b.turned) for b in row] != shape for row in rows):
        return None
    stacked = None not in stacks
    columns = [[row[q] for row in rows] for q in range(len(first))]
    pieces: list[Piece] = []
    for number, column in enumerate(columns):
        piece = _piece([block.part for block in column], names, stacked=stacked)
        if piece is None:
            return None
        dims = _piece_dims(made, whole, first[number], _PIECES[number % 8] + "1" * (number // 8))
        pieces.append(Piece(piece.template, piece.numbers, piece.roles, dims))
    where: list[str] = []
    inner = [_PIECES[q % 8] + "1" * (q // 8) for q in range(len(columns))]
    shards = _shards(columns, names) if len(columns) > 1 else None
    if shards is not None and made.along != "none":
        one = pieces[0]
        roles = tuple("s" if at == shards else role for at, role in enumerate(one.roles))
        pieces = [Piece(one.template, one.numbers, roles, one.dims)]
        joined = "(s a)"
        where.append(f"s = {len(columns)}")
    else:
        joined = f"({' + '.join(inner)})" if len(inner) > 1 else inner[0]
        where += _sizes(inner, [block.size for block in first])
    explained = (whole.name, *(block.part for block in made.blocks))
    template, numbers = names[whole.name]
    dims = _whole_dims(made, whole, joined, stacked=stacked)
    if made.along == "none":
        where = []
    return Relation(template, numbers, dims, tuple(pieces), tuple(where), whole_left, explained)


def _piece_dims(made: Made, whole: Tensor, block: Block, axis: str) -> str:
    match made.along:
        case "rows" | "columns":
            straight = (axis, "i")
            return " ".join(straight[::-1] if block.turned else straight)
        case "first":
            return f"{axis} ..."
        case "last":
            return axis
    if len(whole.shape) == 2:
        return "i"
    if len(whole.shape) == 3:
        return "i a" if block.turned else "a i"
    return "..."


def _whole_dims(made: Made, whole: Tensor, joined: str, *, stacked: bool) -> str:
    lead = "e " if stacked else ""
    match made.along:
        case "rows":
            return f"{lead}{joined} i"
        case "columns":
            return f"{lead}i {joined}"
        case "first":
            return f"{joined} ..."
        case "last":
            return f"{lead}{joined}"
    return {2: "e i", 3: "e a i"}.get(len(whole.shape), "e ...")


def _piece(parts: Sequence[str], names: Names, *, stacked: bool) -> Piece | None:
    """The parts that are stacked at one place; one number of their names must count them."""
    split = [names[part] for part in parts]
    template, numbers = split[0]
    if any(other != template for other, _ in split):
        return None
    if not stacked:
        return Piece(template, numbers, (None,) * len(numbers), "")
    if len(parts) == 1:
        zeros = [at for at, alone in enumerate(isolated(template)) if alone and not numbers[at]]
        single: list[Role] = [
            "e" if at == max(zeros, default=-1) else None for at in range(len(numbers))
        ]
        return Piece(template, numbers, tuple(single), "") if zeros else None
    roles: list[Role] = []
    for column in zip(*(n for _, n in split), strict=True):
        if list(column) == list(range(len(parts))):
            roles.append("e")
        elif len(set(column)) == 1:
            roles.append(None)
        else:
            return None
    return Piece(template, numbers, tuple(roles), "") if roles.count("e") == 1 else None


def _shards(columns: Sequence[Sequence[Block]], names: Names) -> int | None:
    """The number in the name that counts the pieces of a whole, all alike."""
    firsts = [column[0] for column in columns]
    split = [names[block.part] for block in firsts]
    if len({(template,) for template, _ in split}) > 1:
        return None
    if len({(block.size, block.turned) for block in firsts}) > 1:
        return None
    found = None
    for at, column in enumerate(zip(*(numbers for _, numbers in split), strict=True)):
        if list(column) == list(range(len(columns))):
            if found is not None or not (len(columns) > 2 or isolated(split[0][0])[at]):
                return None
            found = at
        elif len(set(column)) > 1:
            return None
    return found


def _sizes(axes: Sequence[str], sizes: Sequence[int]) -> Iterator[str]:
    """Clauses that say how a sum is split; those of the commonest size need no number."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for axis, size in zip(axes, sizes, strict=True):
        by_size[size].append(axis)
    free = max(by_size, key=lambda size: len(by_size[size]))
    for size, same in by_size.items():
        if size != free:
            yield f"{same[0]} = {size}"
        yield from (f"{axis} = {same[0]}" for axis in same[1:])


def isolated(template: str) -> list[bool]:
    """For every number of a template whether it is a segment of its own: an index, most likely."""
    return [segment == MARK for segment in template.split(".") for _ in range(segment.count(MARK))]


def equations(relations: Iterable[Relation], *, literal: bool = False) -> Iterator[tuple[str, int]]:
    """Few equations that say the relations, each with how many it says; ``literal`` makes no holes for loops."""
    groups: dict[object, list[Relation]] = defaultdict(list)
    for relation in relations:
        pieces = tuple((p.template, p.roles, p.dims) for p in relation.pieces)
        look = (relation.template, relation.whole_left, relation.dims, relation.where, pieces)
        groups[look].append(relation)
    for same in groups.values():
        yield from _generalise(same, literal=literal)


def _generalise(same: list[Relation], *, literal: bool) -> Iterator[tuple[str, int]]:
    first = same[0]
    holes: list[dict[int, str]] = [{} for _ in range(len(first.pieces) + 1)]
    for at, piece in enumerate(first.pieces, 1):
        holes[at] = {i: role for i, role in enumerate(piece.roles) if role is not None}
    tables = [[r.numbers for r in same]] + [
        [r.pieces[q].numbers for r in same] for q in range(len(first.pieces))
    ]
    alone = [isolated(first.template), *(isolated(p.template) for p in first.pieces)]
    for column in range(len(first.numbers)) if not literal else ():
        values = [row[column] for row in tables[0]]
        partners: list[int] = []
        for at in range(1, len(tables)):
            fitting = [
                i
                for i in range(len(tables[at][0]))
                if i not in holes[at]
                and [row[i] for row in tables[at]] == values
                and (len(set(values)) > 1 or (alone[0][column] and alone[at][i]))
            ]
            if not fitting:
                break
            partners.append(fitting[0])
        if len(partners) == len(tables) - 1:
            taken = sum(name in _LOOPS for name in holes[0].values())
            name = _LOOPS[taken] if taken < len(_LOOPS) else f"l{taken}"
            holes[0][column] = name
            for at, i in enumerate(partners, 1):
                holes[at][i] = name
    for at, table in enumerate(tables):
        for i in range(len(table[0])):
            if i not in holes[at] and len({row[i] for row in table}) > 1:
                parts: dict[int, list[Relation]] = defaultdict(list)
                for row, relation in zip(table, same, strict=True):
                    parts[row[i]].append(relation)
                for part in parts.values():
                    yield from _generalise(part, literal=literal)
                return
    whole = _term(first.template, first.numbers, holes[0], first.dims)
    pieces = [
        _term(p.template, p.numbers, holes[at], p.dims) for at, p in enumerate(first.pieces, 1)
    ]
    text = "\n".join(pieces) + f"\n    == {whole}"
    if first.whole_left:
        text = f"{whole}\n    == " + "\n    ".join(pieces)
    if first.where:
        text += f"\nwhere {', '.join(first.where)}"
    yield text + "\n", len(same)


def _term(template: str, numbers: Sequence[int], holes: Mapping[int, str], dims: str) -> str:
    return f"{fill_holes(template, numbers, holes)} : {dims}"


def fill_holes(template: str, numbers: Sequence[int], holes: Mapping[int, str]) -> str:
    """A key of the notation: holes where they are named, numbers elsewhere and where the hole is a number."""
    parts = template.split(MARK)
    text = parts[0]
    for at, part in enumerate(parts[1:]):
        hole = holes.get(at, str(numbers[at]))
        text += (hole if hole.isdigit() else "{" + hole + "}") + part
    return text


def carried(names: Iterable[str], split: Names, *, literal: bool = False) -> list[str]:
    """Templates of keys that stay what they are; numbers that are segments become holes."""
    keys: dict[str, None] = {}
    for name in names:
        template, numbers = split[name]
        holes = {
            at: string.ascii_lowercase[at + 11]
            for at, alone in enumerate(isolated(template)[:9])
            if alone and not literal
        }
        keys[fill_holes(template, numbers, holes)] = None
    return list(keys)
