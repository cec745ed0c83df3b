"""What is known of a model without its weights: the models in it, its names and shapes, and what the tensors are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True, eq=False)
class SubModel:
    """A model of transformers inside a model; the root is one, too."""

    path: str
    """Its canonical path, empty for the root."""
    classes: tuple[str, ...]
    """Its class and that class's bases below ``PreTrainedModel``, most derived first."""
    native: str | None
    """The first of them that transformers itself defines; ``None`` for foreign code."""
    model_type: str | None
    config: Any
    base_model_prefix: str
    ignored: tuple[str, ...] = ()
    """Patterns of old tensors that the model has no use for (``_keys_to_ignore_on_load_unexpected``)."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model's canonical names; wrappers contribute no segments to any of them."""

    submodels: tuple[SubModel, ...]
    """The root first, then in the order of the modules."""
    tensors: Mapping[str, tuple[int, ...]]
    """Key and shape of everything in its state dict, in order."""
    kinds: Mapping[str, str] = field(default_factory=dict)
    """The kind (`rules.kinds`) of each tensor that PEFT can adapt; what is not in it is of kind ``any``."""
    parameters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Module and the names of its own matrices, in the order in which it registers them."""
    computed: frozenset[str] = frozenset()
    """What the model fills itself and neither saves nor loads: its buffers that are not persistent."""
    holds: str | None = None
    """The path of a known model in a class of somebody's own, of which nothing else is known."""

    def held(self, path: str, name: str) -> Skeleton:
        """The model in a class of somebody's own, at a path."""

        def place(key: str) -> str:
            return f"{path}.{key}" if key else path

        around = SubModel("", (name,), None, None, self.submodels[0].config, "")
        return Skeleton(
            (around, *(replace(model, path=place(model.path)) for model in self.submodels)),
            {place(key): shape for key, shape in self.tensors.items()},
            {place(key): kind for key, kind in self.kinds.items()},
            {place(module): names for module, names in self.parameters.items()},
            frozenset(place(key) for key in self.computed),
            path,
        )
