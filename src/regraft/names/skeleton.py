"""What a live model is, without its tensors: sub-models, keys, shapes and kinds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SubModel:
    """A transformers model, or one inside it.

    ``custom_code`` is True where none of its classes is a model of transformers' own, so that its names may mean
    something else than they do there. A user's subclass of a model of transformers is not custom code in this sense.
    """

    path: str
    """The canonical path in the model; "" for the model itself."""
    classes: tuple[str, ...]
    """Class names along the MRO, most derived first, those below PreTrainedModel only and none that torch made."""
    model_type: str | None
    config: Any
    """The live config, an object or a dict."""
    base_model_prefix: str
    custom_code: bool


@dataclass(frozen=True, slots=True)
class Skeleton:
    """One model: its sub-models (itself first), and its tensors by canonical key in state dict order."""

    submodels: tuple[SubModel, ...]
    tensors: Mapping[str, tuple[int, ...]]
    """Shapes; persistent buffers included. A sharded tensor has its whole shape."""
    kinds: Mapping[str, str]
    """Kinds of tensors; one that is not here is of kind ``any``."""
    parameters: Mapping[str, tuple[str, ...]]
    """For a module's path: its own parameters of kind ``parameter`` or ``experts``, in the order of registration."""
