"""What adapters add to a base, free of what kind of model it is: slices of deltas, and tensors in place of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from regraft.adapters.form import Array
from regraft.arrays.pieces import Ask, Piece
from regraft.names.keys import Ints


@dataclass(frozen=True, slots=True, eq=False)
class Replacement:
    """Values that take the place of a tensor's, or of some of its rows'."""

    values: Array
    rows: Ints | None = None
    """Which rows; ``None`` for the whole tensor."""


@dataclass(slots=True, eq=False)
class Addend:
    """What one adapter, or a part of it, does to a base."""

    name: str
    """What it is called in reports."""
    where: str
    weight: float
    pieces: Callable[[Ask], Iterator[Piece]]
    """Slices of what it adds, before the weight, of those tensors that are asked for."""
    find: Callable[[str], int | None]
    """The row of a tensor of the base by the name that a piece has for it."""
    replaced: dict[str, Replacement] = field(default_factory=dict)
    """By the same names."""
    peft_type: str = "LORA"
    layout: str = ""
    evidence: tuple[str, ...] = ()
    tensors: int = 0
    """How many tensors its file has."""
    notes: list[str] = field(default_factory=list)
    ties: bool = False
    """Whether what it does to input embeddings is meant for the output that is tied to them, too."""
    files: Sequence[Path] = ()
    """Those that it was read from."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """By name, where they are known."""
