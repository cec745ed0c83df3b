"""Numbers and shapes in words."""

from __future__ import annotations

from collections.abc import Iterable


def count_in_words(number: int, noun: str) -> str:
    """A number and a noun.

    >>> count_in_words(1, "key"), count_in_words(2, "key")
    ('1 key', '2 keys')
    """
    return f"{number} {noun}{'s' * (number != 1)}"


def size_in_words(count: float) -> str:
    """A number of bytes with a decimal unit.

    >>> size_in_words(4_400_000_000)
    '4.4 GB'
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def shape_in_words(shape: Iterable[int]) -> str:
    """A shape as people write it.

    >>> shape_in_words((2, 3)), shape_in_words(())
    ('2 x 3', 'scalar')
    """
    return " x ".join(map(str, shape)) or "scalar"
