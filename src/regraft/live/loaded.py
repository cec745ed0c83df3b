"""What loading a checkpoint into a live model did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from regraft.live.memory import Amounts, Way
from regraft.report import count_in_words, show_size


@dataclass(slots=True)
class Loaded:
    """What was done; ``model.regraft_load`` of a model that was loaded."""

    way: Way
    """How its bytes came into memory: ``map`` (pages of the files), ``copy``, or ``off`` (transformers loaded it)."""
    why: str = ""
    """Why transformers loaded it, where it did."""
    tensors: int = 0
    """How many tensors of the model came from the files."""
    bytes: int = 0
    """Of these tensors in this process."""
    mapped: int = 0
    """Bytes that are pages of the files."""
    copied: int = 0
    """Bytes that were read into memory of this process."""
    to_devices: int = 0
    """Bytes that were read and sent to GPUs."""
    notes: list[str] = field(default_factory=list)
    """What else there is to know."""

    def add(self, amounts: Amounts) -> None:
        """Add what was read."""
        self.mapped += amounts.mapped
        self.copied += amounts.copied
        self.to_devices += amounts.to_devices
        if amounts.not_mapped:
            self.notes.append(
                f"{show_size(amounts.not_mapped)} were copied, for the system allows no more mappings "
                "(vm.max_map_count)"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        if self.way == "off":
            return f"loaded by transformers: {self.why}"
        amounts = (
            ("mapped", self.mapped),
            ("copied", self.copied),
            ("sent to devices", self.to_devices),
        )
        shown = ", ".join(f"{show_size(size)} {what}" for what, size in amounts if size)
        return "\n  ".join(
            [f"{count_in_words(self.tensors, 'tensor')}: {shown or 'nothing read'}", *self.notes]
        )
