"""Random equations, and what they mean by explicit loops over indices: an oracle that shares no code with regraft.

An expression is ("axis", name), ("product", parts) or ("sum", alternatives). An equation has axes that all elements
share, and factors: lists of alternatives. One choice of an alternative from each factor is a box. A side splits every
factor into parts and has one term for each combination of parts.
"""

from dataclasses import dataclass, field
from itertools import product
from math import prod

import numpy as np
from hypothesis import strategies as st


def written(expr, brackets=True):
    """An expression in regraft's notation."""
    kind, inside = expr
    if kind == "axis":
        return inside
    if kind == "product":
        text = " ".join(written(part) for part in inside)
    else:
        text = " + ".join(written(part, False) for part in inside)
    return f"({text})" if brackets else text


def span(expr, sizes):
    kind, inside = expr
    if kind == "axis":
        return sizes[inside]
    spans = [span(part, sizes) for part in inside]
    return prod(spans) if kind == "product" else sum(spans)


def names_in(expr):
    kind, inside = expr
    return {inside} if kind == "axis" else set().union(*(names_in(part) for part in inside))


def position(expr, at, sizes):
    """The index of an expression for the indices of a box's axes; None in a summand of another box."""
    kind, inside = expr
    if kind == "axis":
        return at.get(inside)
    if kind == "product":
        result = 0
        for part in inside:
            index = position(part, at, sizes)
            if index is None:
                return None
            result = result * span(part, sizes) + index
        return result
    offset = 0
    for part in inside:
        index = position(part, at, sizes)
        if index is not None:
            return offset + index
        offset += span(part, sizes)
    return None


@dataclass
class Tensor:
    """One term of a side: the expressions in its key's holes, and its dims."""

    name: str
    holes: list
    dims: list
    kind: str = "any"

    def key(self, indices):
        return f"{self.name}." + "".join(f"{index}." for index in indices) + "weight"

    @property
    def template(self):
        return self.key("{" + written(hole) + "}" for hole in self.holes)

    def shape(self, sizes):
        return tuple(span(dim, sizes) for dim in self.dims)

    def keys(self, sizes):
        return [self.key(at) for at in product(*(range(span(h, sizes)) for h in self.holes))]


@dataclass
class Made:
    """A random equation with its sizes."""

    sizes: dict
    boxes: list
    left: list
    right: list
    loose: list = field(default_factory=list)

    def sides(self, reverse=False):
        return (self.right, self.left) if reverse else (self.left, self.right)

    @property
    def text(self):
        """With keys, and every size in a where clause."""
        sides = [
            "\n".join(f"{t.template} : {' '.join(map(written, t.dims))}" for t in side)
            for side in (self.left, self.right)
        ]
        clauses = ", ".join(f"{axis} = {size}" for axis, size in self.sizes.items())
        return "\n== ".join(sides) + f"\nwhere {clauses}"

    @property
    def bare_text(self):
        """Without keys and sizes; only where there are no holes."""
        return " == ".join(
            ", ".join(" ".join(map(written, t.dims)) for t in side)
            for side in (self.left, self.right)
        )

    def elements(self):
        """(a number, the indices of its axes) for every element of the equation."""
        number = 0
        for box in self.boxes:
            names = sorted(box)
            for index in product(*(range(self.sizes[name]) for name in names)):
                yield number, dict(zip(names, index, strict=True))
                number += 1

    def filled(self, side, values=None, dtype=np.int64):
        """A side's tensors by key, every element with its own value."""
        tensors = {
            k: np.full(t.shape(self.sizes), -1, dtype) for t in side for k in t.keys(self.sizes)
        }
        for number, at in self.elements():
            key, index = self.place(side, at)
            assert tensors[key][index] == -1
            tensors[key][index] = number if values is None else values[number]
        return tensors

    def place(self, side, at):
        """The key and the index of an element on a side."""
        for term in side:
            spots = [position(e, at, self.sizes) for e in (*term.holes, *term.dims)]
            if None not in spots:
                count = len(term.holes)
                return term.key(spots[:count]), tuple(spots[count:])
        raise AssertionError("an element without a place")

    def moved(self, tensors, reverse=False):
        """Tensors of one side as those of the other, element by element."""
        read, write = self.sides(reverse)
        result = {
            k: np.empty(t.shape(self.sizes), next(iter(tensors.values())).dtype)
            for t in write
            for k in t.keys(self.sizes)
        }
        for _, at in self.elements():
            key, index = self.place(read, at)
            to, there = self.place(write, at)
            result[to][there] = tensors[key][index]
        return result


def _axes(names):
    return [("axis", name) for name in names]


def _one(parts):
    return parts[0] if len(parts) == 1 else ("product", parts)


@st.composite
def parts_of(draw, count):
    """A random partition of range(count) into ordered parts, the whole in one part being likeliest."""
    order = draw(st.permutations(range(count)))
    cuts = (
        sorted(draw(st.sets(st.integers(1, count - 1))))
        if count > 1 and draw(st.booleans())
        else []
    )
    return [list(order[a:b]) for a, b in zip([0, *cuts], [*cuts, count], strict=True)]


@st.composite
def factors_of(draw, prefix, most=3):
    """A random factor: one to three alternatives with one or two axes each."""
    return [
        [f"{prefix}{i}{letter}" for letter in "xy"[: draw(st.integers(1, 2))]]
        for i in range(draw(st.integers(1, most)))
    ]


@st.composite
def slots_of(draw, factor, part):
    """What a part of a factor is in a term: its axes one by one, or one sum."""
    alternatives = [_one(_axes(draw(st.permutations(factor[i])))) for i in part]
    return _axes(factor[part[0]]) if len(part) == 1 else [("sum", alternatives)]


def boxes_of(shared, factors):
    return [{*shared, *(n for part in choice for n in part)} for choice in product(*factors)]


@st.composite
def sizes_of(draw, shared, factors, most=3, least=1):
    names = [*shared, *(name for factor in factors for part in factor for name in part)]
    return {name: draw(st.integers(least, most)) for name in names}


@st.composite
def equations(draw, keyed=True):
    """A random equation: sums and products, axes in any order, several terms, stacked holes on either side."""
    shared = [f"s{i}" for i in range(draw(st.integers(0, 3)))]
    factors = [draw(factors_of(letter)) for letter in "fg"[: draw(st.integers(1, 2))]]
    sizes = draw(sizes_of(shared, factors))
    in_keys = {name: draw(st.sampled_from(["left", "right", "", ""])) for name in shared if keyed}
    sides = []
    for side in ("left", "right"):
        terms = []
        for choice in product(*(draw(parts_of(len(factor))) for factor in factors)):
            slots, holes = [], []
            for factor, part in zip(factors, choice, strict=True):
                pieces = draw(slots_of(factor, part))
                whole = len(part) == len(factor) > 1
                if keyed and side == "left" and whole and draw(st.integers(0, 4)) == 0:
                    holes += pieces
                else:
                    slots += pieces
            sums = [slot for slot in slots if slot[0] == "sum"]
            for name in shared:
                if in_keys.get(name) == side:
                    holes.append(("axis", name))
                elif sums and draw(st.integers(0, 4)) == 0:
                    _distribute(sums[0], name)
                else:
                    slots.append(("axis", name))
            slots, holes = draw(st.permutations(slots)), draw(st.permutations(holes))
            if len(holes) > 1 and draw(st.booleans()):
                holes = [("product", holes)]
            dims, rest = [], list(slots)
            while rest:
                take = draw(st.integers(1, len(rest)))
                dims.append(_one(rest[:take]))
                rest = rest[take:]
            terms.append(Tensor(f"{side}{len(terms)}x", list(holes), dims))
        sides.append(terms)
    return Made(sizes, boxes_of(shared, factors), *sides)


def _distribute(slot, name):
    """Turn ``(a + b)`` into ``(x a + x b)``."""
    for i, part in enumerate(slot[1]):
        inside = part[1] if part[0] == "product" else [part]
        slot[1][i] = ("product", [("axis", name), *inside])


# Equations between kinds of weights, and low-rank deltas on them

KINDS = ("linear", "conv1d", "experts", "experts-transposed")


def is_stack(kind):
    return kind.startswith("experts")


def as_stored(kind, matrix):
    """A delta in (out, in) or (E, out, in) orientation as a kind stores it, or back."""
    return np.swapaxes(matrix, -1, -2) if kind in ("conv1d", "experts-transposed") else matrix


@st.composite
def kind_equations(draw, gathers=False, mixes=False, kinds=KINDS):
    """A random equation whose axes go from out to out and in to in (or all crosswise), batches anywhere.

    ``gathers``: every tensor of the left side goes whole into one of the right. ``mixes``: one out axis changes to
    in while others stay, so that no low-rank image exists.
    """
    pair = draw(st.sampled_from(kinds)), draw(st.sampled_from(kinds))
    least = 2 if mixes else 1
    outs = [f"o{i}" for i in range(2 if mixes else draw(st.integers(0, 2)))]
    ins = [f"i{i}" for i in range(draw(st.integers(0, 1)))]
    factors = {
        "out": draw(factors_of("p")),
        "in": draw(factors_of("q", draw(st.sampled_from([1, 1, 2])))),
    }
    batch = []
    if any(map(is_stack, pair)) or draw(st.booleans()):
        batch = ["e"]
        # an index that stands in keys on both sides is a loop, and every key must hold it
        if any(map(is_stack, pair)) and draw(st.integers(0, 2)) == 0:
            factors["batch"] = draw(factors_of("t", 2))
    roles = list(factors)
    shared = [*outs, *ins, *batch]
    sizes = draw(sizes_of(shared, factors.values(), least=least))
    crossed = not mixes and draw(st.integers(0, 3)) == 0
    sides = []
    for side, kind in zip(("left", "right"), pair, strict=True):
        right = side == "right"
        if gathers:
            cut = [
                [[i] for i in range(len(f))] if not right else [list(range(len(f)))]
                for f in factors.values()
            ]
        else:
            cut = [draw(parts_of(len(f))) for f in factors.values()]
        terms = []
        for choice in product(*cut):
            slots = {"out": _axes(outs), "in": _axes(ins), "batch": _axes(batch)}
            for role, part in zip(roles, choice, strict=True):
                slots[role] += draw(slots_of(factors[role], part))
            if mixes and right:
                slots["in"].append(slots["out"].pop(0))
            out, into, stack = (
                list(draw(st.permutations(slots[r]))) for r in ("out", "in", "batch")
            )
            if crossed and right:
                out, into = into, out
            holes = []
            if not is_stack(kind):
                other = pair[not right]
                may = is_stack(other) or (right and not crossed)
                free = [
                    s for s in stack if may and (right if gathers else draw(st.integers(0, 3)) == 0)
                ]
                where = draw(st.sampled_from([out, into]))
                for slot in free:
                    where.insert(draw(st.integers(0, len(where))), slot)
                holes = [slot for slot in stack if slot not in free]
            dims = [_one(out), _one(into)]
            if kind in ("conv1d", "experts-transposed"):
                dims.reverse()
            if is_stack(kind):
                dims.insert(0, _one(stack))
            terms.append(Tensor(f"{side}{len(terms)}x", holes, dims, kind))
        sides.append(terms)
    return Made(sizes, boxes_of(shared, list(factors.values())), *sides)


@dataclass
class Low:
    """Random low-rank factors on the tensors of a side; ``None`` where there are none."""

    a: dict
    b: dict
    scales: dict

    def delta(self, key, kind):
        product_ = self.b[key].astype(np.float64) @ self.a[key].astype(np.float64)
        return as_stored(kind, product_) * self.scales[key].value


def shapes_and_kinds(made, side):
    return {k: (t.shape(made.sizes), t.kind) for t in side for k in t.keys(made.sizes)}


@st.composite
def factors_on(draw, made, scale_of, everywhere=False, reverse=False):
    """Small-integer factors of random rank on some tensors of a side; some share a factor, some are zero."""
    tensors = shapes_and_kinds(made, made.sides(reverse)[0])
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    chosen = [k for k in tensors if everywhere or draw(st.integers(0, 3))] or [next(iter(tensors))]
    low, drawn = Low({}, {}, {}), {}
    same = draw(st.integers(1, 3)) if everywhere and draw(st.booleans()) else None
    for key in chosen:
        shape, kind = tensors[key]
        rank = same or draw(st.integers(1, 3))
        *batch, out, into = as_stored(kind, np.empty(shape)).shape
        a = random.integers(-2, 3, (*batch, rank, into)).astype(np.float64)
        b = random.integers(-2, 3, (*batch, out, rank)).astype(np.float64)
        if random.integers(4) == 0:
            a = drawn.setdefault(("a", a.shape), a)
        if random.integers(6) == 0:
            b = drawn.setdefault(("b", b.shape), b)
        low.a[key], low.b[key], low.scales[key] = a, b, scale_of(rank)
    return low
