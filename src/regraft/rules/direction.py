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

    backward: bool
    """Whether the right side is the one that is read: the switch that equations take."""
    read: Side
    """The side that is read."""
    written: Side
    """The side that is written."""

    def __init__(self, value: str) -> None:
        self.backward = value == "right to left"
        self.read, self.written = SIDES[::-1] if self.backward else SIDES
