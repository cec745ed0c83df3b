"""Numbers and shapes in words."""

from __future__ import annotations

from collections.abc import Iterable


def count_in_words(number: int, noun: str) -> str:
    """A number and a noun.

    >>> count_in_words(1, "key"), count_in_words(2, "key")
    ('1 key', '2 keys')
    """
    return f"{number} {noun}{'s' * (number != 1)}"


def shape_in_words(shape: Iterable[int]) -> str:
    """A shape as people write it.

    >>> shape_in_words((2, 3)), shape_in_words(())
    ('2 x 3', 'scalar')
    """
    return " x ".join(map(str, shape)) or "scalar"
