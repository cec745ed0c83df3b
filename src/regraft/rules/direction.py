"""The two sides of a rule, and which of them is read."""

from __future__ import annotations

from enum import Enum
from typing import Literal

Side = Literal["left", "right"]
"""One side of a rule book, and of each of its equations."""
SIDES: tuple[Side, Side] = ("left", "right")


class Direction(Enum):
    """How the rules of a book are read.

    >>> Direction.BACKWARD.read, Direction.BACKWARD.written
    ('right', 'left')
    """

    FORWARD = "left to right"
    BACKWARD = "right to left"

    @property
    def backward(self) -> bool:
        """Whether the right side is the one that is read: the switch that equations take."""
        return self is Direction.BACKWARD

    @property
    def read(self) -> Side:
        """The side that is read."""
        return "right" if self.backward else "left"

    @property
    def written(self) -> Side:
        """The side that is written."""
        return "left" if self.backward else "right"
