"""What two files with the same weights say of the rule between them: equations, and what no equation explains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from regraft.equation.lower import check_equation
from regraft.equation.notation import parse_equation
from regraft.errors import BadInputError
from regraft.learning.assemble import Drafted, Written, draft
from regraft.learning.blocks import _marks
from regraft.learning.choosing import NOTHING_CHOSEN, Chosen
from regraft.learning.content import Tensor
from regraft.learning.index_map import (
    UNCLEAR,
    Family,
    NotABoxError,
    Origins,
    decompose,
    families,
    find_origins,
    stacks_of,
    together,
)
from regraft.learning.loops import with_loops
from regraft.learning.propose import Tied, pair_equal
from regraft.learning.relate import Names, writable

_FEW = 1 << 22
"""Elements that are looked up one by one; of more, rows are."""
_MANY = 1 << 23

Tensors = Mapping[str, Tensor]


@dataclass(slots=True)
class Inferred:
    """Equations between two files, and the rest."""

    drafts: list[Drafted] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    """Names with the same content on both sides."""
    odd: dict[str, str] = field(default_factory=dict)
    """Names after that no equation makes, each with the reason."""
    unused: list[str] = field(default_factory=list)
    """Names before from which nothing is taken."""
    by_name: int = 0
    """How many tensors are equal to others, so that only their names told which is which."""
    tied: list[Tied] = field(default_factory=list)
    """Those whose names do not tell it."""


def infer(before: Tensors, after: Tensors, chosen: Chosen = NOTHING_CHOSEN) -> Inferred:
    """Equations that make the tensors after of those before; ``chosen`` tells equal tensors apart."""
    result = Inferred()
    mine = {n: t for n, t in before.items() if writable(n)}
    yours = {n: t for n, t in after.items() if writable(n)}
    result.odd.update(
        dict.fromkeys((n for n in after if n not in yours), "its name cannot be written in a rule")
    )
    same = [n for n, t in mine.items() if n in yours and t.look == yours[n].look]
    result.kept = same
    mine = {n: t for n, t in mine.items() if n not in same}
    yours = {n: t for n, t in yours.items() if n not in same}
    names = Names([*before, *after])
    _equal(mine, yours, names, result, chosen)
    _by_rows(mine, yours, names, result)
    _by_elements(mine, yours, names, result)
    _again(before, after, mine, yours, names, result)
    result.unused = list(mine)
    for name in yours:
        result.odd.setdefault(name, "nothing of it is before")
    return result


def _equal(
    mine: dict[str, Tensor],
    yours: dict[str, Tensor],
    names: Names,
    result: Inferred,
    chosen: Chosen,
) -> None:
    """Tensors that only get another name."""
    looks = {t.look for t in yours.values()}
    ours = {n: t for n, t in mine.items() if t.look in looks}
    pairs, result.by_name, result.tied = pair_equal(ours, yours, names, chosen)
    used: set[str] = set()
    for one, other in pairs:
        if mine[one].look != yours[other].look:
            continue
        left, right = (Written(*names[n], (), "...") for n in (one, other))
        result.drafts.append(Drafted((left,), (right,), (), (), (), (), ((one,), (other,))))
        used |= {"<" + one, ">" + other}
    for name in [n for n in mine if "<" + n in used]:
        del mine[name]
    for name in [n for n in yours if ">" + n in used]:
        del yours[name]


def _by_rows(
    mine: dict[str, Tensor], yours: dict[str, Tensor], names: Names, result: Inferred
) -> None:
    """Rows of the last dim as they are: most layout changes move whole rows."""
    if sum(t.size for t in mine.values()) <= _FEW:
        return
    for turned in (False, True):
        widths = {t.shape[-1] for t in mine.values() if t.whole and len(t.shape) > 1}
        for width in sorted(widths):
            some = _of_width(mine, width, turned=False)
            others = _of_width(yours, width, turned=turned)
            if not some or not others:
                continue
            left = {n: _rows(t, turned=False) for n, t in some.items()}
            right = {n: _rows(t, turned=turned) for n, t in others.items()}
            _take(
                _solve(left, right, names, {}),
                width,
                turned=turned,
                mine=mine,
                yours=yours,
                result=result,
            )


def _of_width(tensors: dict[str, Tensor], width: int, *, turned: bool) -> dict[str, Tensor]:
    """Tensors whose rows have so many elements, or whose columns."""
    dim = -2 if turned else -1
    return {
        n: t for n, t in tensors.items() if t.whole and len(t.shape) > 1 and t.shape[dim] == width
    }


def _take(
    drafts: list[Drafted],
    width: int,
    *,
    turned: bool,
    mine: dict[str, Tensor],
    yours: dict[str, Tensor],
    result: Inferred,
) -> None:
    for each in drafts:
        result.drafts.append(_wider(each, width, turned=turned))
        for name in each.names[0]:
            mine.pop(name, None)
        for name in each.names[1]:
            yours.pop(name, None)


def _rows(tensor: Tensor, *, turned: bool) -> Tensor:
    """A tensor of one number for each row, or for each column."""
    bits = tensor.bits.swapaxes(-1, -2) if turned else tensor.bits
    shape = bits.shape[:-1]
    if len(shape) == 1:
        marks = _marks(bits)
    else:
        marks = np.concatenate([_marks(part) for part in bits.reshape(-1, *bits.shape[-2:])])
    return Tensor(tensor.name, "uint64", shape, marks.reshape(shape))


def _wider(each: Drafted, width: int, *, turned: bool) -> Drafted:
    """The same with the dim in which rows lie: the last one, of turned tensors after the one before it."""

    def wide(terms: tuple[Written, ...], *, turned: bool) -> tuple[Written, ...]:
        return tuple(replace(t, dims=_with_last(t.dims, turned=turned)) for t in terms)

    sizes = (*each.sizes, ("z9", width))
    return replace(
        each, left=wide(each.left, turned=False), right=wide(each.right, turned=turned), sizes=sizes
    )


def _with_last(dims: str, *, turned: bool) -> str:
    if not turned:
        return f"{dims} z9".strip()
    depth, at = 0, len(dims)
    while at and (depth or dims[at - 1] != " "):
        at -= 1
        depth += (dims[at] == ")") - (dims[at] == "(")
    return f"{dims[:at]}z9 {dims[at:]}"


def _by_elements(
    mine: dict[str, Tensor], yours: dict[str, Tensor], names: Names, result: Inferred
) -> None:
    by_word: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = defaultdict(lambda: ({}, {}))
    for side, tensors in enumerate((mine, yours)):
        for name, tensor in tensors.items():
            by_word[tensor.dtype][side][name] = tensor
    for some, others in by_word.values():
        if not some or max(sum(t.size for t in x.values()) for x in (some, others)) > _MANY:
            why = "it is made of no whole rows, and there are too many elements to look each up: learn from a probe"
            for name in others:
                result.odd.setdefault(name, why)
            continue
        for each in _solve(some, others, names, result.odd):
            result.drafts.append(each)
            for name in each.names[0]:
                mine.pop(name, None)
            for name in each.names[1]:
                yours.pop(name, None)


def _again(
    before: Tensors,
    after: Tensors,
    mine: dict[str, Tensor],
    yours: dict[str, Tensor],
    names: Names,
    result: Inferred,
) -> None:
    """Tensors after that are made of ones which only seemed to be renamed: those have several targets."""
    whole = {d.names[0][0]: d for d in result.drafts if d.left[0].dims == "..."}
    sources = {n: before[n] for n in (*whole, *result.kept) if writable(n)}
    looks = {t.look: n for n, t in sources.items()}
    wanted = {looks[t.look] for t in yours.values() if t.look in looks}
    if yours and sum(t.size for t in sources.values()) <= _FEW:
        for dtype in {t.dtype for t in yours.values()}:
            some = {n: t for n, t in sources.items() if t.dtype == dtype}
            others = {n: t for n, t in yours.items() if t.dtype == dtype}
            if some:
                origins = _certain(find_origins(some, others), others)
                for found, _ in families(origins):
                    wanted.update(found)
    if not wanted:
        return
    for name in wanted:
        mine[name] = before[name]
        if name in whole:
            result.drafts.remove(whole[name])
            target = whole[name].names[1][0]
        else:
            result.kept.remove(name)
            target = name
        yours[target] = after[target]
    for name in yours:
        result.odd.pop(name, None)
    _by_elements(mine, yours, names, result)


def _solve(before: Tensors, after: Tensors, names: Names, odd: dict[str, str]) -> list[Drafted]:
    """Equations by index maps; what is none is noted."""
    origins = find_origins(before, after)
    shapes = {n: t.shape for n, t in before.items()}, {n: t.shape for n, t in after.items()}

    def solved(family: Family) -> Drafted:
        left, right = (stacks_of(*each, names) for each in zip(family, shapes, strict=True))
        drafted = draft(decompose(left, right, origins, after))
        _check(drafted)
        return drafted

    found = []
    known = [each for each in families(_certain(origins, after)) if all(each)]
    for group in together(known, shapes, names):
        if len(group) > 1:
            whole = [n for each in group for n in each[0]], [n for each in group for n in each[1]]
            with suppress(NotABoxError):
                found.append(solved(whole))
                continue
        for family in group:
            try:
                found.append(solved(family))
            except NotABoxError as error:
                odd.update(dict.fromkeys(family[1], str(error)))
    return found


def _check(drafted: Drafted) -> None:
    """Whether the equation pairs all elements.

    Raises ``NotABoxError``.
    """
    for each in with_loops([drafted]):
        clauses = [f"copies {axis}" for axis in drafted.copies]
        clauses += [f"fill {axis} = {value:g}" for axis, value in drafted.fills]
        try:
            check_equation(
                parse_equation(each.sides + (f"\nwhere {', '.join(clauses)}" if clauses else ""))
            )
        except BadInputError as error:
            raise NotABoxError("its blocks cannot be told apart in one equation") from error


def _certain(origins: Origins, after: Tensors) -> Origins:
    """Without tensors of which hardly anything was found: values that two tensors have by chance."""
    kept = {}
    for name, origin in origins.of.items():
        known = origin >= 0
        share = float(known.mean()) if origin.size else 0.0
        kept[name] = (
            origin if share >= 0.25 or (origin == UNCLEAR).any() else np.full_like(origin, -1)
        )
    return Origins(origins.names, origins.starts, kept)
