"""What was extracted, as a report."""

from __future__ import annotations

from dataclasses import dataclass, field

from regraft.shown import Shown


@dataclass(frozen=True, slots=True)
class Extracted:
    """One weight that tuning changed."""

    key: str
    """The base's name of it."""
    shape: tuple[int, ...]
    rank: int
    """0 where the whole change is kept."""
    error: float
    """How far the factors are off as they are written, relative to the change's Frobenius norm; measured."""
    mass: float
    """The share of the sum of the change's squared singular values that the factors' components have."""


@dataclass(slots=True, repr=False)
class Extraction(Shown):
    """What was extracted; ``to_dict`` gives plain data."""

    base: str
    tuned: str
    destination: str
    layout: str
    """That of both models."""
    to: str
    """The dialect, or the layout, that was written."""
    targets: list[Extracted] = field(default_factory=list)
    """What became factors."""
    whole: list[str] = field(default_factory=list)
    """What is no matrix, or no module, and is kept as a whole."""
    skipped: list[str] = field(default_factory=list)
    """What changed, and was left out because that was asked for."""
    unchanged: int = 0
    """How many tensors tuning left as they are."""
    error: float = 0.0
    """How far all factors together are off, relative to the norm of all changes together."""
    notes: list[str] = field(default_factory=list)
    written: bool = True
