"""What the values of a config's fields can be: predicates, each with its description."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any

from msgspec import Struct

from regraft.adapters.families.settings import whole_path
from regraft.dialects.peft.config import ALL_LINEAR
from regraft.storage.expressions import is_expression

LARGEST = 2**31 - 1
"""Of whole numbers: sizes of tensors, ranks and layer numbers are far below it."""


class FieldType(Struct, frozen=True):
    """What the value of a field must be: a predicate, and its description."""

    accepts: Callable[[Any], bool]
    expected: str


def is_size(value: object) -> bool:
    """A whole number from 0 on, of a size that tensors can have."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def is_count(value: object) -> bool:
    """The same from 1 on."""
    return is_size(value) and value != 0


def is_number(value: object) -> bool:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def is_names(value: object) -> bool:
    """A list of strings."""
    return isinstance(value, list) and all(isinstance(x, str) for x in value)


def is_targets(value: object) -> bool:
    """Modules as ``target_modules`` names them."""
    if isinstance(value, str):
        return value.lower() == ALL_LINEAR or is_expression(value)
    return is_names(value)


def is_token_indices(value: object) -> bool:
    """Token numbers, or a table of them by embedding."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and are_tokens(v) for k, v in value.items())
    return value != [] and are_tokens(value)


def are_tokens(value: object) -> bool:
    """Token numbers, each once: of a row that stands twice, nothing says which counts."""
    return isinstance(value, list) and is_sizes(value) and len(set(value)) == len(value)


def is_sizes(value: object) -> bool:
    """A list of whole numbers from 0 on."""
    return isinstance(value, list) and all(map(is_size, value))


def is_replication(value: object) -> bool:
    """Pairs of layer numbers."""
    return isinstance(value, list) and all(is_sizes(pair) and len(pair) == 2 for pair in value)


def pattern_of(accepts: Callable[[Any], bool], what: str) -> FieldType:
    """A table of patterns and values that a predicate accepts."""

    def fits(value: object) -> bool:
        return isinstance(value, dict) and all(
            is_expression(key) and is_expression(whole_path(key)) and accepts(item)
            for key, item in value.items()
        )

    return FieldType(fits, f"a table of regular expressions and {what}")


COUNT = FieldType(is_count, f"a whole number from 1 to {LARGEST}")
SIZE = FieldType(is_size, f"a whole number from 0 to {LARGEST}")
NUMBER = FieldType(is_number, "a finite number")
FLAG = FieldType(lambda value: isinstance(value, bool), "true or false")
TEXT = FieldType(lambda value: isinstance(value, str), "a string")
OBJECT = FieldType(lambda value: isinstance(value, dict), "an object")
NAMES = FieldType(is_names, "a list of names")
TARGETS = FieldType(is_targets, "a list of names, a regular expression or 'all-linear'")
EXPRESSIONS = FieldType(
    lambda value: is_names(value) or is_expression(value),
    "a list of names, or a regular expression",
)
WORD = FieldType(lambda value: isinstance(value, (str, bool)), "a word, true or false")
LAYERS = FieldType(
    lambda value: is_size(value) or is_sizes(value), "a layer's number, or a list of them"
)
