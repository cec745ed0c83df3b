"""From boxes to one equation: every dim becomes a product or a sum of axes, and axes that go together one name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from regraft.learning.index_map import AxisRun, Box, Component, NotABoxError, Stack

_NAMES = "abcdfghijkmnopqstuvwxyz"

Ref = tuple[int, int]
"""An axis: the number of its box, and its number there."""


@dataclass(frozen=True, slots=True)
class Written:
    """One term: a name with loops still to be found, and its dims."""

    template: str
    numbers: tuple[int, ...]
    holes: tuple[tuple[int, str], ...]
    """Which of the numbers are stacked indices, and how they are written."""
    dims: str


@dataclass(frozen=True, slots=True)
class Drafted:
    """An equation between tensors, before its loops and sizes are known."""

    left: tuple[Written, ...]
    right: tuple[Written, ...]
    sizes: tuple[tuple[str, int], ...]
    """Of every axis."""
    tags: tuple[str, ...]
    """Axes of size 1 that only tell boxes apart."""
    copies: tuple[str, ...]
    fills: tuple[tuple[str, float], ...]
    names: tuple[tuple[str, ...], tuple[str, ...]]
    """The tensors on either side."""
    ranges: tuple[str, ...] = ()
    """Clauses that say of which layers it is."""

    @property
    def numbered(self) -> tuple[tuple[int, ...], ...]:
        """The numbers in its names that count nothing that is stacked: the same at every size."""
        terms = (*self.left, *self.right)
        stacked = [{column for column, _ in term.holes} for term in terms]
        return tuple(
            tuple(n for column, n in enumerate(term.numbers) if column not in columns)
            for term, columns in zip(terms, stacked, strict=True)
        )

    @property
    def fixed(self) -> list[str]:
        """Clauses that belong to the equation, whatever the sizes."""
        clauses = [f"{tag} = 1" for tag in self.tags]
        clauses += [f"copies {axis}" for axis in self.copies]
        clauses += [f"fill {axis} = {value:g}" for axis, value in self.fills]
        return [*clauses, *self.ranges]


@dataclass(slots=True)
class _Piece:
    """Part of a dim: where it begins, and axes from the outermost on; each stands for one axis of every box."""

    start: int
    axes: list[tuple[int, int, list[Ref]]]
    """Size, step, and the axes of boxes that it is."""
    boxes: list[int]


@dataclass(slots=True)
class _Draft:
    component: Component
    boxes: list[Box]
    parent: dict[Ref, Ref] = field(default_factory=dict)
    tags: list[Ref] = field(default_factory=list)
    placed: tuple[set[Ref], set[Ref]] = field(default_factory=lambda: (set(), set()))
    """Tags that stand in a sum already, after and before."""
    split: bool = False
    """Whether axes were made of one that may stand in a tree already."""

    def root(self, ref: Ref) -> Ref:
        while self.parent.get(ref, ref) != ref:
            ref = self.parent[ref]
        return ref

    def join(self, refs: Sequence[Ref]) -> None:
        for other in refs[1:]:
            one, two = self.root(refs[0]), self.root(other)
            if one != two:
                self.parent[two] = one


Tree = tuple[Any, ...]
"""An axis (``Ref``), or ``*`` or ``+`` and a list of what it is made of; of a sum also the boxes of each piece."""


class _OverlapError(NotABoxError):
    """Parts of a dim that lie in each other; it names axes of boxes that could be cut, and where."""

    def __init__(self, boxes: list[Box], cuts: dict[Ref, set[int]]) -> None:
        super().__init__("its parts lie in each other in no order that an equation could say")
        self.boxes, self.cuts = boxes, cuts


_CUTS = 12
"""How often boxes are cut before one gives up."""
_LONGEST = 8
"""Positions of an axis that is cut into single ones."""


def draft(component: Component) -> Drafted:
    """The equation of a component.

    Raises ``NotABoxError`` where its boxes do not fit into sums and products of axes.
    """
    for _ in range(_CUTS):
        try:
            return _draft(component)
        except _OverlapError as error:
            if not error.cuts:
                raise
            component = replace(component, boxes=tuple(_cut(error.boxes, error.cuts)))
    return _draft(component)


def _cut(boxes: Sequence[Box], cuts: Mapping[Ref, set[int]]) -> Iterator[Box]:
    """Boxes with some axes cut before some of their positions."""
    for number, box in enumerate(boxes):
        parts = [box]
        for (owner, at), places in cuts.items():
            if owner != number:
                continue
            axis = box.axes[at]
            edges = [0, *sorted(places), axis.size]
            parts = [
                replace(
                    part,
                    start_before=_moved(part.start_before, axis.before, low),
                    start_after=_moved(part.start_after, axis.after, low),
                    axes=[
                        replace(a, size=high - low) if n == at else a
                        for n, a in enumerate(part.axes)
                    ],
                )
                for part in parts
                for low, high in pairwise(edges)
            ]
        yield from parts


def _moved(start: tuple[int, ...], place: tuple[int, int] | None, times: int) -> tuple[int, ...]:
    if place is None:
        return start
    dim, step = place
    return tuple(n + step * times * (d == dim) for d, n in enumerate(start))


def _grown(component: Component) -> tuple[_Draft, list[list[list[Tree]]]]:
    """The trees of all dims. Where one dim splits an axis, it is split in all others, too."""
    boxes: Sequence[Box] = component.boxes
    while True:
        work = _Draft(component, _refined(boxes))
        _mark_copies(work)
        trees: list[list[list[Tree]]] = [[], []]
        for side, stacks in enumerate((component.after, component.before)):
            for number, stack in enumerate(stacks):
                trees[side].append(
                    [_dim(work, side, number, dim) for dim in range(len(stack.shape))]
                )
        if not work.split:
            return work, trees
        boxes = work.boxes


def _draft(component: Component) -> Drafted:
    work, trees = _grown(component)
    _tell_apart(work, trees)
    names = _name(work, trees)
    left, right = (
        tuple(
            _term(stack, [_write(work, tree, names) for tree in dims])
            for stack, dims in zip(stacks, trees[side], strict=True)
        )
        for side, stacks in ((1, component.before), (0, component.after))
    )
    sizes: dict[str, int] = {}
    copies: dict[str, None] = {}
    fills: dict[str, float] = {}
    for number, box in enumerate(work.boxes):
        own = [names[work.root((number, at))] for at in range(len(box.axes))]
        if len(set(own)) < len(own):
            raise NotABoxError("one axis would stand twice in a box")
        for at, (name, axis) in enumerate(zip(own, box.axes, strict=True)):
            if sizes.setdefault(name, axis.size) != axis.size:
                raise NotABoxError("one axis would have two sizes")
            if at in box.copied:
                copies[name] = None
        if box.before < 0 and box.value is not None:
            fills[_padding_axis(work, number, own)] = box.value
    tags = {names[work.root(ref)] for ref in work.tags}
    return Drafted(
        left,
        right,
        tuple(sizes.items()),
        tuple(sorted(tags)),
        tuple(copies),
        tuple(fills.items()),
        (
            tuple(n for s in component.before for n in s.names),
            tuple(n for s in component.after for n in s.names),
        ),
    )


def _padding_axis(work: _Draft, number: int, own: Sequence[str]) -> str:
    """The axis that only padding has."""
    others = {
        work.root((other, at))
        for other, box in enumerate(work.boxes)
        if box.before >= 0
        for at in range(len(box.axes))
    }
    for at, name in enumerate(own):
        if work.root((number, at)) not in others:
            return name
    raise NotABoxError("padding has no axis of its own")


def _refined(boxes: Sequence[Box]) -> list[Box]:
    """Axes of equal boxes split alike: where one box has 6 and another 2 and 3, all have 2 and 3."""
    return [
        Box(
            b.before,
            b.after,
            b.start_before,
            b.start_after,
            [a for a in b.axes if a.size > 1],
            b.value,
            [
                n
                for n, a in enumerate([a for a in b.axes if a.size > 1])
                if a.before is None and b.before >= 0
            ],
        )
        for b in boxes
    ]


def _mark_copies(work: _Draft) -> None:
    """Elements that go to several places: the second place and those after it get an axis of size 1."""
    seen: dict[object, int] = {}
    for number, box in enumerate(work.boxes):
        if box.before < 0:
            continue
        region = sorted((a.size, a.before) for a in box.axes if a.before is not None)
        key = (box.before, box.start_before, tuple(map(str, region)))
        if key in seen:
            box.axes.append(AxisRun(1, None, (len(work.component.after[box.after].shape) - 1, 1)))
            box.copied.append(len(box.axes) - 1)
            work.tags.append((number, len(box.axes) - 1))
        seen.setdefault(key, number)


def _place(axis: AxisRun, side: int) -> tuple[int, int] | None:
    return axis.before if side else axis.after


def _dim(work: _Draft, side: int, stack: int, dim: int) -> Tree:
    """One dim of a tensor as a tree; ``side`` is 0 after and 1 before."""
    pieces: list[_Piece] = []
    for number, box in enumerate(work.boxes):
        if (box.before if side else box.after) != stack:
            continue
        start = (box.start_before if side else box.start_after)[dim]
        mine = [
            (axis.size, place[1], [(number, at)])
            for at, axis in enumerate(box.axes)
            if (place := _place(axis, side)) is not None and place[0] == dim
        ]
        mine.sort(key=lambda each: (-each[1], each[0] == 1))
        pieces.append(_Piece(start, mine, [number]))
    size = (work.component.before if side else work.component.after)[stack].shape[dim]
    return _tree(work, pieces, size, side, stack, dim)


def _tree(work: _Draft, pieces: list[_Piece], size: int, side: int, stack: int, dim: int) -> Tree:
    pieces = _merged(pieces)
    if not pieces:
        raise NotABoxError("part of a tensor is nowhere on the other side")
    if len(pieces) == 1:
        (piece,) = pieces
        step = size
        trees: list[Tree] = []
        for count, own, refs in piece.axes:
            if count > 1 and own * count != step:
                raise NotABoxError("part of a tensor is nowhere on the other side")
            step = own if count > 1 else step
            work.join(refs)
            trees.append(refs[0])
        if step != 1 or piece.start:
            raise NotABoxError("part of a tensor is nowhere on the other side")
        return trees[0] if len(trees) == 1 else ("*", trees)
    outer = [next((a for a in p.axes if a[0] > 1), None) for p in pieces]
    if all(a is not None and a[0] * a[1] == size for a in outer):
        least = min(a[0] for a in outer if a is not None)
        for piece in pieces:
            _split_outer(work, piece, least)
        heads = [p.axes.pop(0) for p in pieces]
        refs = [ref for _, _, refs in heads for ref in refs]
        work.join(refs)
        inner = _tree(work, pieces, size // least, side, stack, dim)
        parts = inner[1] if isinstance(inner[0], str) and inner[0] == "*" else [inner]
        return ("*", [refs[0], *parts])
    terms: list[Tree] = []
    boxes: list[set[int]] = []
    for start, end, cluster in _clusters(pieces, size):
        boxes.append({number for piece in cluster for number in piece.boxes})
        for piece in cluster:
            piece.start -= start
        if len(cluster) == 1 and not any(a[0] > 1 for a in cluster[0].axes):
            terms.append(_tag(work, cluster[0], side))
            continue
        if len(cluster) == len(pieces):
            raise _OverlapError(work.boxes, _to_cut(cluster))
        terms.append(_tree(work, cluster, end - start, side, stack, dim))
    return ("+", terms, boxes)


def _merged(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Pieces that are in the same places as one."""
    grouped: dict[object, _Piece] = {}
    for piece in pieces:
        key = piece.start, tuple((size, step) for size, step, _ in piece.axes)
        known = grouped.setdefault(key, piece)
        if known is not piece:
            for mine, other in zip(known.axes, piece.axes, strict=True):
                mine[2].extend(other[2])
            known.boxes.extend(piece.boxes)
    return list(grouped.values())


def _to_cut(pieces: Sequence[_Piece]) -> dict[Ref, set[int]]:
    """Outermost axes that are cut where other pieces begin or end; or else the shortest one, at every position.

    Rows that one tensor has as they are and another in parts are as many parts in both. And [q, k, v, q] holds the two
    of q around the others: two boxes, not one with a step.
    """
    cuts: dict[Ref, set[int]] = {}
    edges = {edge for piece in pieces for edge in _span(piece)}
    outer = [(p, a) for p in pieces if (a := next((a for a in p.axes if a[0] > 1), None))]
    for piece, (size, step, refs) in outer:
        if step * size < _span(piece)[1] - piece.start:
            continue  # an inner axis goes on beyond it
        inside = {(e - piece.start) // step for e in edges if not (e - piece.start) % step}
        inside = {at for at in inside if 0 < at < size}
        if inside:
            cuts.update((ref, inside) for ref in refs)
    if cuts:
        return cuts
    known = [a for _, a in outer if a[0] <= _LONGEST and a[1] > 1]
    if not known:
        return {}
    size, _, refs = min(known, key=lambda a: a[0])
    return {ref: set(range(1, size)) for ref in refs}


def _span(piece: _Piece) -> tuple[int, int]:
    """The first position of a piece, and the one after its last."""
    return piece.start, piece.start + sum((c - 1) * s for c, s, _ in piece.axes if c > 1) + 1


def _split_outer(work: _Draft, piece: _Piece, least: int) -> None:
    """Make the outermost axis of a piece so large, on both sides of its boxes."""
    at = next(n for n, a in enumerate(piece.axes) if a[0] > 1)
    size, step, refs = piece.axes[at]
    if at:
        piece.axes.insert(0, piece.axes.pop(at))
    if size == least:
        return
    if size % least:
        raise NotABoxError("its parts repeat differently")
    rest = size // least
    work.split = True
    made: list[Ref] = []
    for number, axis in refs:
        box = work.boxes[number]
        old = box.axes[axis]
        scaled = [None if p is None else (p[0], p[1] * rest) for p in (old.before, old.after)]
        box.axes[axis] = AxisRun(least, scaled[0], scaled[1])
        box.axes.append(AxisRun(rest, old.before, old.after))
        made.append((number, len(box.axes) - 1))
    piece.axes[0] = (least, step * rest, refs)
    piece.axes.insert(1, (rest, step, made))


def _clusters(pieces: Sequence[_Piece], size: int) -> Iterator[tuple[int, int, list[_Piece]]]:
    """Pieces that lie in one interval together; the intervals lie one after the other and leave nothing out."""
    spans = sorted(
        ((*_span(p), p) for p in pieces),
        key=lambda span: span[:2],
    )
    result: list[tuple[int, int, list[_Piece]]] = []
    for start, end, piece in spans:
        if result and start < result[-1][1]:
            low, high, same = result[-1]
            result[-1] = low, max(high, end), [*same, piece]
        else:
            result.append((start, end, [piece]))
    at = 0
    for start, end, cluster in result:
        if start != at:
            raise NotABoxError("part of a tensor is nowhere on the other side")
        at = end
        yield start, end, cluster
    if at != size:
        raise NotABoxError("part of a tensor is nowhere on the other side")


def _tag(work: _Draft, piece: _Piece, side: int) -> Tree:
    """An axis of size 1 for a piece of one position, on both sides."""
    if piece.axes:
        work.join([ref for _, _, refs in piece.axes for ref in refs])
        return piece.axes[0][2][0]
    made = [_free_tag(work, number, side) for number in piece.boxes]
    if None in made or len({work.root(ref) for ref in made if ref is not None}) > 1:
        made = [_add_tag(work, number) for number in piece.boxes]
    refs = [ref for ref in made if ref is not None]
    work.join(refs)
    work.placed[side].update(refs)
    return refs[0]


def _free_tag(work: _Draft, number: int, side: int) -> Ref | None:
    """An axis of size 1 that a box has for the other side."""
    return next(
        (ref for ref in work.tags if ref[0] == number and ref not in work.placed[side]), None
    )


def _add_tag(work: _Draft, number: int) -> Ref:
    box = work.boxes[number]
    box.axes.append(AxisRun(1, None, None))
    ref = number, len(box.axes) - 1
    work.tags.append(ref)
    return ref


def _tell_apart(work: _Draft, trees: list[list[list[Tree]]]) -> None:
    """Put axes of size 1 where a side lacks them, and add some where two boxes have the same axes."""
    seen: dict[frozenset[Ref], int] = {}
    for number, box in enumerate(work.boxes):
        roots = frozenset(work.root((number, at)) for at in range(len(box.axes)))
        if roots in seen and not box.copied and box.before >= 0:
            _add_tag(work, number)
        seen.setdefault(roots, number)
    placed = [
        {work.root(ref) for dims in side for tree in dims for ref in _refs(tree)} for side in trees
    ]
    for ref in work.tags:
        box = work.boxes[ref[0]]
        one_sided = ref[1] in box.copied
        for side in (0, 1):
            if side and (one_sided or box.before < 0):
                continue
            if work.root(ref) in placed[side]:
                continue
            stack = box.before if side else box.after
            alike = {
                number for number, at in work.tags if work.root((number, at)) == work.root(ref)
            }
            everyone = {
                n for n, b in enumerate(work.boxes) if (b.before if side else b.after) == stack
            }
            dims = trees[side][stack]
            if not dims:
                raise NotABoxError("there is no dim for an axis that tells two blocks apart")
            for dim in range(len(dims) - 1, -1, -1):
                made = _beside(dims[dim], ref, alike)
                if made is not None:
                    dims[dim] = made
                    break
            else:
                if not everyone <= alike:
                    raise NotABoxError("there is no dim for an axis that tells two blocks apart")
                dims[-1] = _times(dims[-1], ref)
            placed[side].add(work.root(ref))


def _beside(tree: Tree, ref: Ref, alike: set[int]) -> Tree | None:
    """The tree with an axis of size 1 in the piece of a sum that only some boxes have; ``None`` where there is none."""
    if tree[0] == "+":
        for at, (part, boxes) in enumerate(zip(tree[1], tree[2], strict=True)):
            if ref[0] in boxes:
                made = _times(part, ref) if boxes <= alike else _beside(part, ref, alike)
                if made is None:
                    return None
                return ("+", [*tree[1][:at], made, *tree[1][at + 1 :]], tree[2])
    if tree[0] == "*":
        for at in range(len(tree[1]) - 1, -1, -1):
            made = _beside(tree[1][at], ref, alike)
            if made is not None:
                return ("*", [*tree[1][:at], made, *tree[1][at + 1 :]])
    return None


def _times(tree: Tree, ref: Ref) -> Tree:
    return ("*", [*tree[1], ref]) if tree[0] == "*" else ("*", [tree, ref])


def _refs(tree: Tree) -> Iterator[Ref]:
    if isinstance(tree[0], str):
        for part in tree[1]:
            yield from _refs(part)
    else:
        yield tree


def _name(work: _Draft, trees: list[list[list[Tree]]]) -> dict[Ref, str]:
    """A letter for each axis, in the order of the sides."""
    names: dict[Ref, str] = {}
    for side in (trees[1], trees[0]):
        for dims in side:
            for tree in dims:
                for ref in _refs(tree):
                    root = work.root(ref)
                    if root not in names:
                        at = len(names)
                        more = at // len(_NAMES)
                        names[root] = _NAMES[at % len(_NAMES)] + (str(more) if more else "")
    for number, box in enumerate(work.boxes):
        for at in range(len(box.axes)):
            if work.root((number, at)) not in names:
                raise NotABoxError("an axis stands nowhere")
    return names


def _write(work: _Draft, tree: Tree, names: dict[Ref, str]) -> str:
    if not isinstance(tree[0], str):
        return names[work.root(tree)]
    parts = [_write(work, part, names) for part in tree[1]]
    if not parts:
        return "1"
    if tree[0] == "*":
        return "(" + " ".join(parts) + ")" if len(parts) > 1 else parts[0]
    inner = [
        text[1:-1] if isinstance(part[0], str) and part[0] == "*" and text.startswith("(") else text
        for text, part in zip(parts, tree[1], strict=True)
    ]
    return "(" + " + ".join(inner) + ")"


def _term(stack: Stack, dims: Sequence[str]) -> Written:
    holes = []
    for column, start, step, text in zip(
        stack.columns, stack.starts, stack.steps, dims[: stack.keyed], strict=True
    ):
        written = text
        if start or step > 1:
            if not text.isalnum():
                raise NotABoxError("a stack of several indices begins late or has gaps")
            written = f"{step} {text}" if step > 1 else text
            written += f" + {start}" if start else ""
        holes.append((column, written))
    return Written(stack.template, stack.numbers, tuple(holes), " ".join(dims[stack.keyed :]))


__all__ = ["Drafted", "Written", "draft"]
