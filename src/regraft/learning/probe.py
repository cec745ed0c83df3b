"""Probes: small checkpoints whose elements are all different, so that what a converter does can be read off.

Values are random and positive, no two alike: a converter that adds, scales or negates makes values that are nowhere
before. In float32 some eight million values can be told apart, in float16 and bfloat16 far fewer: there a label is
spread over several probes, one digit in each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from regraft.errors import BadInputError, Finding

Shapes = Mapping[str, tuple[int, ...]]
Arrays = dict[str, npt.NDArray[Any]]

MOST = 6_000_000
"""Elements that float32 labels tell apart safely."""
DIGIT = 251
"""Values of one digit: whole numbers that bfloat16 and float16 have, too."""


def labels(shapes: Shapes, seed: int = 0) -> Arrays:
    """Tensors of float32 with all elements different, in random order.

    >>> a = labels({"w": (2, 3), "b": (3,)})
    >>> len(np.unique(np.concatenate([x.reshape(-1) for x in a.values()])))
    9

    Raises ``BadInputError`` for more elements than float32 can tell apart.
    """
    count = sum(prod(shape) for shape in shapes.values())
    if count > MOST:
        message = f"{count} elements are more than float32 can tell apart ({MOST})"
        raise BadInputError(
            Finding("probe", message, fix="make the model smaller: fewer layers, smaller sizes")
        )
    random = np.random.default_rng(seed)
    # Between 1 and 2 float32 has 2**23 values, all at the same distance.
    chosen = _distinct(random, count)
    values = (np.uint32(0x3F800000) + chosen.astype(np.uint32)).view(np.float32)
    return _cut(values, shapes)


def _distinct(random: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
    """So many different numbers below 2**23, in random order."""
    if count > 1 << 20:
        return random.permutation(1 << 23)[:count]
    chosen = _once(random.integers(0, 1 << 23, 2 * count + 16))
    return random.permutation(chosen)[:count]


def _once(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Each value once, in order; numpy's unique takes twenty times as long."""
    values = np.sort(values)
    first = np.ones(len(values), dtype=bool)
    first[1:] = values[1:] != values[:-1]
    return values[first]


def digits(shapes: Shapes, seed: int = 0) -> list[Arrays]:
    """The same labels, written in digits: whole numbers below 251, a tensor for each digit.

    >>> one, two = digits({"w": (300,)})
    >>> len(set(zip(one["w"].tolist(), two["w"].tolist())))
    300
    """
    count = sum(prod(shape) for shape in shapes.values())
    number = 2
    while DIGIT**number < 4 * count:
        number += 1
    random = np.random.default_rng(seed)
    limit = DIGIT**number
    chosen = _once(random.integers(0, limit, 2 * count + 16))
    # Where all digits are one number it might be a constant that a converter pads with.
    chosen = chosen[chosen % ((limit - 1) // (DIGIT - 1)) != 0]
    chosen = random.permutation(chosen)[:count]
    return [
        _cut((chosen // DIGIT**place % DIGIT + 1).astype(np.float32), shapes)
        for place in range(number)
    ]


def join_digits(parts: Sequence[Mapping[str, npt.NDArray[Any]]]) -> Arrays:
    """Labels from their digits; 0 where a value is no digit, so that it is nowhere before."""
    joined: Arrays = {}
    for name in parts[0]:
        if any(name not in part or part[name].shape != parts[0][name].shape for part in parts):
            continue
        total = np.zeros(parts[0][name].shape, dtype=np.uint64)
        valid = np.ones(parts[0][name].shape, dtype=bool)
        for place, part in enumerate(parts):
            values = part[name].astype(np.float64)
            whole = np.rint(values)
            valid &= (whole == values) & (whole >= 1) & (whole <= DIGIT)
            total += np.where(valid, whole - 1, 0).astype(np.uint64) * np.uint64(DIGIT**place)
        joined[name] = np.where(valid, total + np.uint64(1), np.uint64(0))
    return joined


def _cut(values: npt.NDArray[Any], shapes: Shapes) -> Arrays:
    result: Arrays = {}
    at = 0
    for name, shape in shapes.items():
        size = prod(shape)
        result[name] = values[at : at + size].reshape(shape)
        at += size
    return result
