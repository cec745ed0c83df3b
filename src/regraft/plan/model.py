"""What is known of the base model: its config, and its tensors where there is a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from regraft.equation.notation import ConfigPath


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model's ``config.json`` and the part of it that a rule book speaks of.

    A composite model (a vision-language model, say) has one config inside another; a rule's ``config.x`` is
    looked up in the part whose model type the rule book knows.
    """

    data: Mapping[str, Any]
    path: str

    @property
    def model_type(self) -> str | None:
        """The model type of the whole model."""
        value = self.data.get("model_type")
        return value if isinstance(value, str) else None

    def parts(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Every config in this one, itself first: its path inside the file, and its fields."""
        stack: list[tuple[str, Mapping[str, Any]]] = [("", self.data)]
        while stack:
            path, part = stack.pop(0)
            yield path, part
            stack.extend(
                (f"{path}{name}.", value)
                for name, value in part.items()
                if isinstance(value, Mapping) and "model_type" in value
            )

    def model_types(self) -> list[str]:
        """All model types in it, that of the whole model first."""
        return [str(p["model_type"]) for _, p in self.parts() if isinstance(p.get("model_type"), str)]

    def part_of(self, model_types: tuple[str, ...]) -> Mapping[str, Any] | None:
        """The innermost part that has one of the model types."""
        found = [p for _, p in self.parts() if p.get("model_type") in model_types]
        return found[-1] if found else None

    def is_composite(self) -> bool:
        """Whether there are configs of other models inside."""
        return len(self.model_types()) > 1


@dataclass(frozen=True, slots=True)
class Scope:
    """What a rule book's ``config.x`` and ``shape(x)`` mean here."""

    config: Mapping[str, Any] | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def look_up(self, value: ConfigPath) -> int | None:
        """The first of the fields that the config has as a whole number."""
        for path in value.paths:
            node: Any = self.config
            for name in path:
                node = node.get(name) if isinstance(node, Mapping) else None
            if isinstance(node, int) and not isinstance(node, bool):
                return node
        return None
