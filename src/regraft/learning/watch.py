"""Learning from a converter that is a function on a state dict: it is called with labelled tensors."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from regraft.errors import BadInputError, Finding, RegraftError
from regraft.learning.casts import with_digits
from regraft.learning.content import content_of
from regraft.learning.learn import (
    Config,
    Learned,
    Told,
    asked_of,
    learn_pairs,
    require_sound,
)
from regraft.learning.pairs import Pair, arrays_of
from regraft.learning.probe import Arrays, digits, labels
from regraft.learning.roles import KindOf
from regraft.rules.book import Book

Convert = Callable[[dict[str, Any]], Mapping[str, Any]]


def learn_from(
    convert: Convert,
    headers: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    layouts: tuple[str, str] = ("before", "after"),
    name: str = "learned",
    configs: Sequence[Config | None] = (),
    model_types: Sequence[str] | None = None,
    partial: bool = False,
    choose: Sequence[str] = (),
    torch: bool | None = None,
    model: Any = None,
) -> Book:
    """A rule book learned by calling a converter with labelled tensors.

    ``headers`` are names and shapes (or tensors, of which only the shapes count), one mapping or one for each of
    several sizes; ``convert`` gets and returns a state dict, of torch's tensors where torch is installed, unless
    ``torch`` is false. Configs that belong to the sizes name them; ``choose`` and ``model`` are those of `learn`.

    >>> def convert(state):
    ...     return {"both": np.concatenate([state["a"], state["b"]])}
    >>> shapes = [{"a": (4, 3), "b": (2, 3)}, {"a": (6, 5), "b": (3, 5)}]
    >>> book = learn_from(convert, shapes, torch=False)
    >>> str(book.rules[0].equation)
    'a : a b, b : c b == both : (a + c) b where a = 2 * c'

    Raises ``BadInputError`` where the converter fails, or something is not explained, ``AmbiguousError`` where two
    readings fit.
    """
    found = watch(
        convert,
        headers,
        layouts=layouts,
        name=name,
        configs=configs,
        model_types=model_types,
        choose=choose,
        torch=torch,
        model=model,
    )
    if not partial:
        require_sound(found)
    return found.book


def watch(
    convert: Convert,
    headers: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    layouts: tuple[str, str] = ("before", "after"),
    name: str = "learned",
    configs: Sequence[Config | None] = (),
    model_types: Sequence[str] | None = None,
    choose: Sequence[str] = (),
    torch: bool | None = None,
    kind_of: tuple[KindOf, KindOf] | None = None,
    source: str = "regraft.learn_from",
    model: Any = None,
) -> Learned:
    """What `learn_from` finds, with its evidence."""
    many = [headers] if isinstance(headers, Mapping) else list(headers)
    known = [*configs, *[None] * (len(many) - len(configs))]
    with_torch = importlib.util.find_spec("torch") is not None if torch is None else torch
    pairs = [
        pair_of(
            convert,
            _shapes(each),
            config,
            with_torch=with_torch,
            where=f"size {number}",
            other_values=number == 1,
        )
        for number, (each, config) in enumerate(zip(many, known, strict=True), 1)
    ]
    return learn_pairs(
        pairs,
        layouts=layouts,
        name=name,
        model_types=model_types,
        source=source,
        choose=choose,
        **(asked_of(model, pairs) if kind_of is None else Told(kind_of=kind_of)),
    )


def _shapes(headers: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(getattr(value, "shape", value)) for key, value in headers.items()}


def pair_of(
    convert: Convert,
    shapes: Mapping[str, tuple[int, ...]],
    config: Config | None,
    *,
    with_torch: bool,
    where: str,
    other_values: bool = True,
) -> Pair:
    """The labels that a converter gets and those that it returns.

    With ``other_values`` it is called once more with other labels, so that what depends on values shows.

    Raises ``BadInputError`` where it fails, or two runs differ.
    """
    before = labels(shapes)
    after = _call(convert, before, with_torch=with_torch, where=where)
    again = _again(convert, before, with_torch=with_torch, where=where)
    unsteady = [k for k in after if k not in again or not _same(after[k], again[k])]
    if unsteady or after.keys() != again.keys():
        message = "the converter makes something else of the same tensors when it is called again"
        raise BadInputError(
            Finding("unsteady", message, where=where, key=next(iter(unsteady), None))
        )
    odd = (
        _by_value(convert, shapes, before, after, with_torch=with_torch, where=where)
        if other_values
        else {}
    )
    for name in odd:
        after[name] = (-1.5 - np.arange(after[name].size, dtype=np.float32)).reshape(
            after[name].shape
        )
    if any(array.dtype != np.float32 for array in after.values()):
        made = [
            (part, _again(convert, part, with_torch=with_torch, where=where))
            for part in digits(shapes)
        ]
        labelled = _pair(before, after, config, where)
        return with_digits(labelled, [_pair(*each, config, where) for each in made])
    return _pair(before, after, config, where, odd)


def _by_value(
    convert: Convert,
    shapes: Mapping[str, tuple[int, ...]],
    before: Arrays,
    after: Arrays,
    *,
    with_torch: bool,
    where: str,
) -> dict[str, str]:
    """Tensors whose elements come from elsewhere when the same tensors hold other values: sorted ones, for one."""
    others = labels(shapes, 77)
    made = _again(convert, others, with_torch=with_torch, where=where)
    plain = {k: v for k, v in after.items() if v.dtype == np.float32}
    one, two = _origins(before, plain), _origins(others, {k: made[k] for k in plain if k in made})
    why = "which element goes where depends on the values, so that is no layout change"
    return {k: why for k in plain if k not in two or not np.array_equal(one[k], two[k])}


def _origins(before: Arrays, after: Arrays) -> dict[str, Any]:
    """Which label each element is; -1 for none."""
    flat = np.concatenate([x.reshape(-1) for x in before.values()])
    order = np.argsort(flat)
    values = flat[order]
    result = {}
    for name, array in after.items():
        at = np.minimum(np.searchsorted(values, array), len(values) - 1)
        result[name] = np.where(values[at] == array, order[at], -1)
    return result


def _pair(
    before: Arrays,
    after: Arrays,
    config: Config | None,
    where: str,
    odd: Mapping[str, str] | None = None,
) -> Pair:
    return Pair(content_of(before, where), content_of(after, where), config, where, (), odd or {})


def _same(one: Any, other: Any) -> bool:
    return bool(
        one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()
    )


def _again(convert: Convert, arrays: Arrays, *, with_torch: bool, where: str) -> Arrays:
    """The same as the first time, which went well: a converter may stumble over what it left behind."""
    try:
        return _call(convert, arrays, with_torch=with_torch, where=where)
    except BadInputError as error:
        raise BadInputError(
            [
                replace(
                    finding,
                    message=f"the first run went well, but when it was run again {finding.message}",
                    fix="let it run more than once: it must not need, or refuse, what an earlier run wrote",
                )
                for finding in error.findings
            ]
        ) from error


def _call(convert: Convert, arrays: Arrays, *, with_torch: bool, where: str) -> Arrays:
    state: dict[str, Any] = {key: array.copy() for key, array in arrays.items()}
    if with_torch:
        import torch

        state = {key: torch.from_numpy(array) for key, array in state.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = convert(state)
    except RegraftError:
        raise
    except Exception as error:
        message = f"it raised {type(error).__name__}: {str(error).strip()[:300]}"
        raise BadInputError(Finding("converter", message, where=where)) from error
    state = dict(made) if hasattr(made, "items") else {}
    if not state:
        message = f"it returned {type(made).__name__} without tensors, and a state dict is wanted"
        raise BadInputError(Finding("converter", message, where=where))
    return {key: np.ascontiguousarray(array) for key, array in arrays_of(state).items()}
