"""Casting tensors by name, where the user asks for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from msgspec import Struct

from regraft.errors import BadInputError, Finding

_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "fp64": "F64",
    "fp32": "F32",
    "fp16": "F16",
    "half": "F16",
    "bf16": "BF16",
}
_CAST = ("F64", "F32", "F16", "BF16")
TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What torch and ``config.json`` call them."""


class Cast(Struct, frozen=True):
    """Tensors whose names fit a pattern become a type; numbers that are no floats stay."""

    pattern: str
    dtype: str


def parse_casts(texts: str | Iterable[str] | None) -> tuple[Cast, ...]:
    """Casts from ``bfloat16`` (all tensors) or ``*.norm.weight=float32`` (some); the last that fits counts.

    >>> parse_casts("bfloat16")
    (Cast(pattern='*', dtype='BF16'),)

    Raises ``BadInputError`` for a type that is none of float64, float32, float16 and bfloat16.
    """
    casts = []
    for text in [texts] if isinstance(texts, str) else texts or ():
        pattern, _, name = text.rpartition("=")
        dtype = name.upper() if name.upper() in _CAST else _NAMES.get(name.lower())
        if dtype is None:
            message = f"cannot cast to {name[:100]!r}; known: {', '.join(TORCH.values())}"
            raise BadInputError(Finding("bad-dtype", message))
        casts.append(Cast(pattern or "*", dtype))
    return tuple(casts)


def cast_dtypes(
    names: Sequence[str], dtypes: Sequence[str], casts: Sequence[Cast], kept: frozenset[str]
) -> tuple[list[str], dict[str, int]]:
    """The types to write, and how many tensors change from what to what; those in ``kept`` stay.

    Raises ``BadInputError`` for a pattern that no name fits.
    """
    if not casts:
        return list(dtypes), {}
    unused = {cast.pattern for cast in casts}
    unused = {p for p in unused if not any(fnmatchcase(name, p) for name in names)}
    if unused:
        raise BadInputError(
            Finding(
                "bad-dtype",
                f"no tensor of the result has a name that fits {pattern}",
                fix="give names as they are in the layout that is written",
            )
            for pattern in sorted(unused)
        )
    result = []
    changed: Counter[str] = Counter()
    for name, dtype in zip(names, dtypes, strict=True):
        new = dtype
        if dtype in _CAST and name not in kept:
            fits = (cast.dtype for cast in reversed(casts) if fnmatchcase(name, cast.pattern))
            new = next(fits, dtype)
        if new != dtype:
            changed[f"{dtype} -> {new}"] += 1
        result.append(new)
    return result, dict(changed)
