"""Converters whose operations nobody here knows by name: they are run on labelled elements, and their rule is learned.

A converter of the registry is a chain of operations with a way back. The way back is run on labelled tensors of the
model, small and at two sizes, and the chain on what comes out: if that is not what went in, values change, and there
is no rule. Otherwise the index map is an equation, learned as from any other converter (`regraft.learning`).
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch

from regraft.bridges.transformers.building import build, make_config, model_class
from regraft.bridges.transformers.operations import UnknownOperationError
from regraft.bridges.transformers.registry import Transform
from regraft.equation.notation import Equation, Term, Where, parse_equation
from regraft.equation.sizes import SizeError, evaluate, solve_sizes
from regraft.learning.learn import learn_pairs
from regraft.learning.pairs import Pair
from regraft.learning.probe import MOST, labels
from regraft.learning.roles import kinds_by_axes
from regraft.learning.shrink import several_experts, shrink
from regraft.names.live import skeleton_of
from regraft.names.skeleton import Skeleton, SubModel
from regraft.planning.model import Scope

Shapes = Sequence[tuple[int, ...]]
Tensors = dict[str, torch.Tensor]

_SIZES = 2
_NUMBER = re.compile(r"(?<![0-9])[0-9]+")
_NAME = re.compile(r"[A-Za-z_]\w*")
_LETTERS = string.ascii_lowercase
"""What sources and targets are called: numbers would be taken for indices."""
_PLACE = re.compile(r"^[st]_([a-z])(?:\.(\{.*\}))?$")


@dataclass(frozen=True, slots=True)
class Written:
    """One term of a watched converter's equation."""

    number: int
    """Which of the sources, or of the targets."""
    index: str | None
    """What the ``*`` of a source's key holds."""
    dims: str


@dataclass(frozen=True, slots=True)
class Watched:
    """An equation of a watched converter: sources on the left, targets on the right."""

    left: tuple[Written, ...]
    right: tuple[Written, ...]
    clauses: tuple[str, ...]
    left_kinds: tuple[str, ...]
    unread: tuple[int, ...]
    """The sources that the way back does not write: files of another form have them."""


@dataclass(frozen=True, slots=True)
class _Case:
    """A converter's targets in one model: what it is run on."""

    keys: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    config: Any
    tensors: Mapping[str, tuple[int, ...]]
    """All tensors of the model."""


@dataclass(frozen=True, slots=True)
class _Model:
    """What operations ask of a model."""

    config: Any
    tensors: Mapping[str, tuple[int, ...]]

    def get_parameter_or_buffer(self, name: str) -> Any:
        """A tensor without values."""
        if name not in self.tensors:
            raise AttributeError(name)
        return torch.empty(self.tensors[name], device="meta")

    get_parameter = get_buffer = get_parameter_or_buffer


def watch_converter(
    transform: Transform,
    keys: Sequence[str],
    shapes: Shapes,
    kinds: Sequence[str],
    skeleton: Skeleton,
) -> list[Watched]:
    """The equations of a converter, learned by running it.

    ``keys``, ``shapes`` and ``kinds`` are those of its targets in a model.

    Raises ``UnknownOperationError`` where it changes values, cannot be run, or is not as the shapes are.
    """
    names = ", ".join(type(op).__name__ for op in transform.operations)
    if max(len(transform.forward.sources), len(keys)) > len(_LETTERS):
        raise UnknownOperationError(f"{names} is about too many tensors at once to be watched")
    cases = _cases(keys, shapes, skeleton)
    pairs = []
    for number, case in enumerate(cases):
        data = _fields(case.config)
        before, after = _run(transform, case, number, names)
        pairs.append(Pair.of(before, after, data))
    found = learn_pairs(pairs, layouts=("old", "new"), model_types=())
    if not found.sound:
        why = next(iter(found.odd.values()), "its rule does not hold at every size")
        raise UnknownOperationError(f"{names} was watched, and no rule was found: {why}")
    read = {_LETTERS.index(name[2]) for name in pairs[0].before}
    unread = tuple(n for n in range(len(transform.forward.sources)) if n not in read)
    scope = Scope(_fields(skeleton.submodels[0].config))
    return [
        _written(rule.equation, scope, shapes, kinds, unread, names) for rule in found.book.rules
    ]


def _cases(keys: Sequence[str], shapes: Shapes, skeleton: Skeleton) -> list[_Case]:
    """The targets in small models of the same class; in the model itself where it cannot be made small."""
    root = skeleton.submodels[0]
    data = _fields(root.config)
    for fields in (several_experts(data), data):
        found = _small_cases(keys, _Fields(fields), root)
        if len(found) == _SIZES and found[0].shapes != found[1].shapes:
            return found
    if sum(map(prod, shapes)) > MOST:
        raise UnknownOperationError(
            "no equation is known for its operations, and its tensors are too large to watch it"
        )
    return [_Case(tuple(keys), tuple(shapes), root.config, skeleton.tensors)]


def _small_cases(keys: Sequence[str], data: _Fields, root: SubModel) -> list[_Case]:
    """The targets in small models with a config; fewer than ``_SIZES`` where some model has them not."""
    wanted = _NUMBER.sub("#", keys[0])
    found = []
    for size in range(_SIZES):
        model = _small(root.classes[0], str(root.model_type), data, size)
        if model is None:
            break
        config, small = model
        alike = next((key for key in small if _NUMBER.sub("#", key) == wanted), None)
        if alike is None:
            break
        numbers = _NUMBER.findall(alike)
        mine = [alike, *(_with_numbers(key, numbers) for key in keys[1:])]
        if any(key not in small for key in mine):
            break
        found.append(_Case(tuple(mine), tuple(small[key] for key in mine), config, small))
    return found


class _Fields:
    """A config's fields as a key of a cache."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data, self._text = data, repr(data)

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Fields) and self._text == other._text


@lru_cache(maxsize=8)
def _small(
    name: str, kind: str, fields: _Fields, size: int
) -> tuple[Any, Mapping[str, tuple[int, ...]]] | None:
    """The config and the shapes of a small model of a class; ``None`` where it cannot be made small."""
    try:
        config = make_config(kind, shrink(fields.data, size))
        return config, skeleton_of(build(model_class(name), config)).tensors
    except Exception:  # what transformers asks of a config is not known here
        return None


def _with_numbers(key: str, numbers: Sequence[str]) -> str:
    given = iter(numbers)
    return _NUMBER.sub(lambda match: next(given, match[0]), key)


def _fields(config: Any) -> dict[str, Any]:
    return config.to_dict() if hasattr(config, "to_dict") else dict(config or {})


def _run(transform: Transform, case: _Case, seed: int, names: str) -> tuple[Tensors, Tensors]:
    """What the way back makes of labelled targets, and those targets.

    Raises ``UnknownOperationError`` where the converter does not make the same targets of it again.
    """
    sources, targets = transform.forward.sources, transform.forward.targets
    made = labels({f"t_{_LETTERS[n]}": shape for n, shape in enumerate(case.shapes)}, seed)
    after = {name: torch.from_numpy(array) for name, array in made.items()}
    back: list[Any] = []
    try:
        for operation in transform.operations[::-1]:
            back.append(operation.reverse_op)
        given = {target: [after[f"t_{_LETTERS[n]}"].clone()] for n, target in enumerate(targets)}
        old = _apply(back, given, targets, sources, case)
        again = _apply(transform.operations, _gathered(old, sources), sources, targets, case)
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).strip()[:160]}"
        raise UnknownOperationError(
            f"no equation is known for {names}, and it cannot be run on small weights ({text})"
        ) from error
    for number, target in enumerate(targets):
        tensor = _one(again.get(target))
        if tensor is None or not torch.equal(tensor.float(), after[f"t_{_LETTERS[number]}"]):
            raise UnknownOperationError(
                f"{names} changes values, or its way back does not lead back: no layout change"
            )
    before: Tensors = {}
    for number, source in enumerate(sources):
        pattern = re.compile(re.escape(source).replace(r"\*", r"(\d+)"))
        for key, tensor in old.items():
            match = pattern.fullmatch(key)
            held = _one(tensor)
            if match is not None and held is not None:
                name = f"s_{_LETTERS[number]}" + (f".{match[1]}" if match.groups() else "")
                before[name] = held.contiguous()
    return before, after


def _apply(
    operations: Sequence[Any],
    given: Mapping[str, Any],
    sources: Sequence[str],
    targets: Sequence[str],
    case: _Case,
) -> dict[str, Any]:
    """What a chain of operations makes of tensors, as ``WeightConverter.convert`` calls it."""
    model = _Model(case.config, case.tensors)
    held: dict[str, Any] = dict(given)
    for operation in operations:
        held = operation.convert(
            held,
            source_patterns=list(sources),
            target_patterns=list(targets),
            full_layer_name=case.keys[0],
            model=model,
            config=case.config,
            missing_keys=None,
        )
    return held


def _gathered(old: Mapping[str, Any], sources: Sequence[str]) -> dict[str, list[Any]]:
    """Tensors by the pattern of their source, those of a stack in order."""
    result: dict[str, list[Any]] = {}
    for source in sources:
        pattern = re.compile(re.escape(source).replace(r"\*", r"(\d+)"))
        mine = [(m, t) for key, t in old.items() if (m := pattern.fullmatch(key)) is not None]
        mine.sort(key=lambda each: [int(n) for n in each[0].groups()])
        if mine:
            result[source] = [_one(t) for _, t in mine]
    return result


def _one(value: Any) -> torch.Tensor | None:
    held = value[0] if isinstance(value, list) and value else value
    return held if isinstance(held, torch.Tensor) else None


def _written(
    equation: Equation,
    scope: Scope,
    shapes: Shapes,
    kinds: Sequence[str],
    unread: tuple[int, ...],
    names: str,
) -> Watched:
    """An equation with the sizes of the model, with names that no index of a key has.

    Raises ``UnknownOperationError`` where the model's shapes are not as it says.
    """
    clauses = [_clause(clause, scope) for clause in equation.where]
    clauses += [f"copies {axis}" for axis in equation.copies]
    clauses += [str(fill) for fill in equation.fills]
    text = "\n".join(map(str, equation.left)) + "\n== " + "\n".join(map(str, equation.right))
    first = equation.right[0]
    if first.ends_open:
        rank = len(shapes[_term(first).number]) - len(first.dims) + 1
        text = text.replace("...", " ".join(f"r{n}" for n in range(rank)))
    plain = parse_equation(text + (f"\nwhere {', '.join(clauses)}" if clauses else ""))
    right = [_term(term) for term in plain.right]
    told = [shapes[each.number] for each in right]
    try:
        sizes, _ = solve_sizes(plain, zip(plain.right, told, strict=True))
    except SizeError as error:
        raise UnknownOperationError(f"{names} was watched, and is not as here: {error}") from error
    # Of tensors of any other size nothing was seen, so all sizes are those of the model.
    said = {clause.axis for clause in plain.where}
    clauses += [f"{name} = {size}" for name, size in sizes.items() if name not in said]
    left_kinds = kinds_by_axes(plain.left, plain.right, [kinds[each.number] for each in right])
    return Watched(
        tuple(_term(term) for term in plain.left),
        tuple(right),
        tuple(_renamed(clause) for clause in clauses),
        left_kinds,
        unread,
    )


def _clause(clause: Where, scope: Scope) -> str:
    value = evaluate(clause, scope.look_up)
    return str(clause) if value is None else f"{clause.axis} = {value}"


def _term(term: Term) -> Written:
    match = _PLACE.match(str(term.key))
    if match is None:
        raise UnknownOperationError(f"what was watched is no key of its own: {term.key}")
    index = match[2][1:-1] if match[2] else None
    dims = " ".join(map(str, term.dims))
    return Written(_LETTERS.index(match[1]), _renamed(index) if index else None, _renamed(dims))


def _renamed(text: str) -> str:
    """Axes with a letter before them: indices of keys have names of their own."""
    words = {"copies", "fill"}
    return _NAME.sub(lambda m: m[0] if m[0] in words else f"x{m[0]}", text)


__all__ = ["Watched", "Written", "watch_converter"]
