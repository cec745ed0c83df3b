"""Kinds of the tensors of learned rules: from live models, from where axes go, or from names and numbers of dims."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from regraft.equation.notation import Term, axes_of
from regraft.errors import BadInputError, Finding
from regraft.learning.assemble import Drafted
from regraft.names.keys import group_names
from regraft.names.skeleton import Skeleton
from regraft.rules.kinds import BATCH, IN, KINDS, OUT
from regraft.rules.templates import match_group

KindOf = Callable[[str], str | None]
"""The kind of a tensor by its name, where a live model says it."""


Shapes = Mapping[str, tuple[int, ...]]


def kinds_told(skeleton: Skeleton, sides: Sequence[tuple[Shapes, Shapes]]) -> tuple[KindOf, KindOf]:
    """The kinds that a live model tells, on the side that has its tensors; ``sides`` are those of each size.

    Where both sides have as many of its names, it is the one with its shapes.

    Raises ``BadInputError`` where neither side has one of its tensors.
    """
    scores = [
        max(
            (
                len(skeleton.tensors.keys() & shapes.keys()),
                len(skeleton.tensors.items() & shapes.items()),
            )
            for shapes in side
        )
        for side in zip(*sides, strict=True)
    ]
    if not any(names for names, _ in scores):
        raise BadInputError(
            Finding(
                "missing",
                "neither side has a tensor of the model",
                where="the model",
                key=next(iter(skeleton.tensors), None),
                fix="give a model whose state dict has the names before, or those after",
            )
        )
    if scores[1] > scores[0]:
        return _nothing, skeleton.kinds.get
    return skeleton.kinds.get, _nothing


def _nothing(_: str) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Kinds:
    """What is known of the kinds of tensors before and after."""

    told: tuple[KindOf, KindOf]
    shapes: tuple[Shapes, Shapes]

    def of_rename(self, before: str, after: str) -> tuple[str, str]:
        """The kinds of a tensor that only gets another name, before and after.

        What one side says holds for the other, where that says nothing.
        """
        kinds = [self.told[0](before), self.told[1](after)]
        if kinds[0] is None and kinds[1] is None:
            # The name after may be of another tool, whose parameters are no modules' weights.
            guessed = self.guess(after, 1), self.guess(before, 0)
            kinds[1] = guessed[0] if guessed[0] != "any" else guessed[1]
        one, other = kinds[0] or kinds[1] or "any", kinds[1] or kinds[0] or "any"
        return one, other

    def guess(self, name: str, side: int) -> str:
        """The kind of a tensor by its name and its number of dims."""
        has_bias = f"{name.removesuffix('.weight')}.bias" in self.shapes[side]
        return guess(name, len(self.shapes[side][name]), has_bias=has_bias)


def guess(name: str, dims: int, *, has_bias: bool = False) -> str:
    """The kind of a tensor by its name and how many dims it has.

    >>> guess("layers.0.mlp.up.weight", 2), guess("wte.weight", 2), guess("layers.0.experts.up", 3)
    ('linear', 'embedding', 'experts')
    """
    module, _, leaf = name.rpartition(".")
    if dims == 1:
        return "vector"
    if leaf != "weight" and "expert" not in name:
        return "any"
    last = module.rpartition(".")[2]
    if dims == 2:
        words = ("embed", "wte", "wpe", "embd", "embedding")
        # A projection may be called like an embedding, but an embedding has no bias.
        named = any(w in last for w in words) and "proj" not in last and not has_bias
        return "embedding" if named else "linear"
    if dims == 3 and "expert" in name:
        return "experts"
    return "conv" if leaf == "weight" else "any"


def kinds_of(
    left: Sequence[Term],
    right: Sequence[Term],
    each: Drafted | None,
    known: tuple[KindOf, KindOf],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Kinds of all terms: from live models, else from names on the one side and from where the axes go on the other."""
    sides: list[list[str | None]] = []
    for number, terms in enumerate((left, right)):
        names = each.names[number] if each is not None else ()
        kinds: list[str | None] = []
        for term in terms:
            name = next((n for n in names if _is_of(n, term)), None)
            kinds.append(known[number](name) if name is not None else None)
        sides.append(kinds)
    guessed = [[guess(str(t.key), len(t.dims)) for t in terms] for terms in (left, right)]
    roles: dict[str, str] = {}
    # The side with more tensors is the one of single modules, whose names tell most.
    first = 0 if len(left) >= len(right) else 1
    for number in (first, 1 - first):
        for term, kind, guessed_kind in zip(
            (left, right)[number], sides[number], guessed[number], strict=True
        ):
            told = kind or (guessed_kind if number == first else None)
            if told is not None and KINDS[told].roles and KINDS[told].fits(term):
                _note_roles(term, told, roles)
    for tag in each.tags if each is not None else ():
        roles.pop(tag, None)
    result = []
    for terms, kinds, guesses in zip((left, right), sides, guessed, strict=True):
        result.append(
            tuple(
                _kind(term, kind, other, roles)
                for term, kind, other in zip(terms, kinds, guesses, strict=True)
            )
        )
    return result[0], result[1]


def kinds_by_axes(
    left: Sequence[Term], right: Sequence[Term], known: Sequence[str]
) -> tuple[str, ...]:
    """Kinds of the terms on the left, where those on the right are known: from where the axes go."""
    roles: dict[str, str] = {}
    for term, kind in zip(right, known, strict=True):
        if KINDS[kind].roles and KINDS[kind].fits(term):
            _note_roles(term, kind, roles)
    return tuple(
        _kind(term, None, "vector" if len(term.dims) == 1 else "any", roles) for term in left
    )


def _kind(term: Term, told: str | None, guessed: str, roles: Mapping[str, str]) -> str:
    """The kind that a live model tells, that the axes tell, or that the name tells."""
    if told is None and len(term.dims) > 1 and not term.ends_open:
        told = _by_roles(term, roles)
    kind = told or guessed
    return kind if kind in KINDS and KINDS[kind].fits(term) and not term.ends_open else "any"


def _note_roles(term: Term, kind: str, roles: dict[str, str]) -> None:
    for hole in term.holes:
        for axis in axes_of(hole):
            roles.setdefault(axis, BATCH)
    for dim, expr in enumerate(term.dims):
        for axis in axes_of(expr):
            roles.setdefault(axis, KINDS[kind].role(dim))


def _by_roles(term: Term, roles: Mapping[str, str]) -> str | None:
    dims = [{roles[a] for a in axes_of(d) if a in roles} for d in term.dims]
    if any(len(found) != 1 for found in dims):
        return None
    order = tuple(found.pop() for found in dims)
    kinds = ("linear", "conv1d", "experts", "experts-transposed")
    known = next((k for k in kinds if KINDS[k].roles == order), None)
    return known or ("conv" if order[:1] == (OUT,) and set(order[1:]) == {IN} else None)


def _is_of(name: str, term: Term) -> bool:
    return term.key is not None and match_group(term.key, group_names([name])[0]) is not None


__all__ = ["KindOf", "Kinds", "guess", "kinds_by_axes", "kinds_of", "kinds_told"]
