"""Converters that cast to a smaller type: several probes carry the digits of each label.

Of float32 labels bfloat16 keeps a few only. Whole numbers up to 251 it has, so a label is written in digits, each in
a probe of its own; what a converter makes of them is put together again. What becomes of the labels themselves then
tells whether the values are only cast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from regraft.learning.content import Tensor, content_of
from regraft.learning.pairs import Pair
from regraft.learning.probe import DIGIT, Arrays, join_digits


def with_digits(labelled: Pair | None, digits: Sequence[Pair]) -> Pair:
    """The pair of labels that were converted digit by digit.

    ``labelled`` is what the converter makes of a probe that is no digit: what is not the same there but for a cast is
    no layout change.
    """
    first = digits[0]
    before = _labels([_values(pair.before) for pair in digits])
    after = _labels([_values(pair.after) for pair in digits])
    for name in set(first.after) - after.keys():
        after[name] = _nothing(np.empty(first.after[name].shape))  # not in every probe
    if labelled is not None:
        for name in _changed(labelled, before, after):
            after[name] = _nothing(after[name])
    types = {t.dtype for t in first.before.values()}
    cast = Counter(t.dtype for t in first.after.values() if t.dtype not in types)
    notes = tuple(
        f"the converter casts {count} tensors to {dtype}: the book moves them and keeps each one's type"
        for dtype, count in sorted(cast.items())
    )
    where = (labelled or first).where
    return Pair(content_of(before, where), content_of(after, where), first.config, where, notes)


def _labels(parts: Sequence[Arrays]) -> Arrays:
    """Labels from digits; constants as they are, and what is neither unlike everything else."""
    result = {}
    for name, numbers in join_digits(parts).items():
        values = np.stack([part[name].astype(np.float64) for part in parts])
        constant = (values == values[0]).all(axis=0)
        label = np.where(numbers > 0, numbers.astype(np.float64), _nothing(values[0]))
        result[name] = np.where(constant, values[0], label)
    return result


def _nothing(array: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Values that are nowhere, no two alike."""
    return -1.5 - np.arange(array.size, dtype=np.float64).reshape(array.shape)


def joined(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs of files, those of digits put together: `regraft probe --digits` writes them after the labels."""
    result: list[Pair] = []
    digits: list[Pair] = []
    for pair in pairs:
        like = digits[0] if digits else result[-1] if result else None
        if like is not None and _is_digit(pair) and _shapes(pair) == _shapes(like):
            digits.append(pair)
            continue
        _put_together(result, digits)
        digits = []
        result.append(pair)
    _put_together(result, digits)
    return result


def _put_together(result: list[Pair], digits: list[Pair]) -> None:
    if len(digits) == 1:
        result += digits
    elif digits:
        result[-1] = with_digits(result[-1], digits)


def _shapes(pair: Pair) -> dict[str, tuple[int, ...]]:
    return {name: t.shape for name, t in pair.before.items()}


def _is_digit(pair: Pair) -> bool:
    """Whether all values before are whole numbers that are digits."""
    for tensor in pair.before.values():
        values = tensor.typed
        if not tensor.whole or values.dtype.kind not in "fV":
            return False
        if not ((values >= 1) & (values <= DIGIT) & (values == np.rint(values))).all():
            return False
    return True


def _values(tensors: Mapping[str, Tensor]) -> Arrays:
    return {name: t.typed for name, t in tensors.items() if t.whole}


def _changed(labelled: Pair, before: Arrays, after: Arrays) -> list[str]:
    """Tensors after whose labels are not those before, cast."""
    names = list(before)
    numbers = np.concatenate([before[name].reshape(-1) for name in names])
    values = np.concatenate([labelled.before[name].typed.reshape(-1) for name in names])
    order = np.argsort(numbers)
    numbers, values = numbers[order], values[order].astype(np.float64)
    changed = []
    for name, array in after.items():
        tensor = labelled.after.get(name)
        if tensor is None or not tensor.whole or tensor.shape != array.shape:
            changed.append(name)
            continue
        at = np.minimum(np.searchsorted(numbers, array), len(numbers) - 1)
        known = numbers[at] == array
        is_now, wanted = tensor.typed.astype(np.float64)[known], values[at][known]
        if not (np.abs(is_now - wanted) <= _precision(tensor) * np.abs(wanted)).all():
            changed.append(name)
    return changed


def _precision(tensor: Tensor) -> float:
    """How far a value of this type may be from what was cast, truncated at worst."""
    return _PRECISION.get(tensor.dtype, 0.0)


_PRECISION = {"F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}


__all__ = ["joined", "with_digits"]
