"""What is known of the base model: its config, and its tensors where there is a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from msgspec import Struct, field

from regraft.equation.notation import ConfigPath, ShapeOf
from regraft.errors import BadInputError, Finding
from regraft.rules.book import Book
from regraft.rules.said import said
from regraft.storage.hub import parse_id
from regraft.storage.json_files import JsonFile, load_json

_SUB_MODELS = {
    "text_config": "language_model",
    "vision_config": "vision_tower",
    "audio_config": "audio_tower",
}
"""What transformers calls the module that belongs to a part of a composite config."""

_COUNTS = re.compile(r"layer|expert|block|head|depth|stage|group")
_SIZES = re.compile(r"(_size|_dim|_rank|_channels|^d_\w+)$")
_MOST_THINGS = 100_000
_LARGEST_SIZE = 2**31

_HEADS = ("lm_head", "score", "classifier", "qa_outputs")


class Weights(Protocol):
    """The tensors of a model by name."""

    def __contains__(self, name: str) -> bool: ...

    def names(self) -> list[str]:
        """The names of all tensors."""
        ...

    def read(self, name: str) -> npt.NDArray[np.generic]:
        """One tensor."""
        ...


def check_sizes(data: Mapping[str, Any], path: str) -> None:
    """Check that a config's types, counts and sizes are such as a model can have, since models are built from them.

    Raises ``BadInputError`` with everything that is not.
    """
    findings = [
        Finding(
            "model-config",
            f"a model type is text, and it is of type {type(value).__name__}",
            where=path,
            key=name,
            fix="give the config.json that belongs to the model",
        )
        for name, value in _types(data)
        if value is not None and not isinstance(value, str)
    ]
    findings += [
        Finding(
            "model-config",
            f"it is {_shorten(number)}, and a model has at most {most}",
            where=path,
            key=name,
            fix="give the config.json that belongs to the model",
        )
        for name, number, most in _numbers(data)
        if number > most
    ]
    if findings:
        raise BadInputError(findings)


def _shorten(number: int) -> str:
    digits = str(number)
    return digits if len(digits) <= 20 else f"{digits[0]}e+{len(digits) - 1}"


def _types(data: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """What a config and those in it say of their model types, by path."""
    for name, value in data.items():
        if name == "model_type":
            yield above + name, value
        elif isinstance(value, Mapping):
            yield from _types(value, f"{above}{name}.")


def _numbers(data: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, int, int]]:
    """The whole numbers that say how many or how large something is: path, number, most."""
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{above}{name}.")
        most = (
            _LARGEST_SIZE if _SIZES.search(name) else _MOST_THINGS if _COUNTS.search(name) else None
        )
        for number in value if isinstance(value, list) else [value]:
            if most is not None and isinstance(number, int) and not isinstance(number, bool):
                yield above + name, number, most


class ModelConfig(Struct, frozen=True):
    """A model's ``config.json`` and the part of it that a rule book speaks of.

    A composite model (a vision-language model, say) has one config inside another; a rule's ``config.x`` is
    looked up in the part whose model type the rule book knows.
    """

    data: Mapping[str, Any]
    path: str
    weights: Weights | None = None
    """The model's tensors, where they are not in files beside its config."""
    architecture: str | None = None
    """The class that the user says it is."""

    @property
    def model_type(self) -> str | None:
        """The model type of the whole model."""
        value = self.data.get("model_type")
        return value if isinstance(value, str) else None

    def architectures(self) -> list[str]:
        """The classes that the config names."""
        names = self.data.get("architectures")
        return [n for n in names if isinstance(n, str)] if isinstance(names, list) else []

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
        return [
            str(p["model_type"]) for _, p in self.parts() if isinstance(p.get("model_type"), str)
        ]

    def part_of(self, model_types: tuple[str, ...]) -> tuple[str, Mapping[str, Any]] | None:
        """The part that has one of the model types, and its path; of several, the language model's."""
        found = [(path, p) for path, p in self.parts() if p.get("model_type") in model_types]
        found.sort(key=lambda pair: not pair[0].endswith("text_config."))
        return found[0] if found else None

    def scope_of(self, model_types: tuple[str, ...]) -> Scope:
        """The scope of a rule book for these model types.

        Inside a bigger model a book speaks of its own sub-model only, and of the whole where it knows that, too.
        A book for any model speaks of the whole.
        """
        if not model_types:
            return Scope(self.data)
        found = self.part_of(model_types)
        if found is None:
            return Scope()
        path, part = found
        below = None if self.model_type in model_types else _SUB_MODELS.get(path.split(".")[-2:][0])
        return Scope(part, below=below)

    def is_composite(self) -> bool:
        """Whether there are configs of other models inside."""
        return len(self.model_types()) > 1


def load_model(path: Path | str | JsonFile) -> ModelConfig:
    """The config of a base model from its folder or its ``config.json``, which may be read already.

    Raises ``BadInputError``.
    """
    if isinstance(path, JsonFile):
        if path.error is not None:
            raise path.error
        return _model(path.data, path.path)
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not path.exists() and parse_id(str(path)) is None:
        fix = "give the folder of the base model, or its config.json"
        raise BadInputError(
            Finding("not-found", "there is no such file or folder", where=str(path), fix=fix)
        )
    if not file.exists():
        raise BadInputError(
            Finding(
                "no-config",
                "there is no config.json of a base model here",
                where=str(path),
                fix="give the folder of the base model, or its config.json" + _how_to_get(path),
            )
        )
    return _model(load_json(file), file)


def _model(data: Mapping[str, Any], file: Path) -> ModelConfig:
    """What a ``config.json`` says of a model, once it is clear that it can be one's."""
    if not isinstance(data.get("model_type"), str):
        raise BadInputError(
            Finding(
                "no-model-type",
                "this is no config of a transformers model: it has no model_type",
                where=str(file),
                fix="give the config.json of the base model, not the adapter's",
            )
        )
    check_sizes(data, str(file))
    return ModelConfig(data, str(file), architecture=said().architecture)


def _how_to_get(path: Path) -> str:
    named = parse_id(str(path))
    return (
        f"; a model of the hub is found after 'hf download {named[0]} config.json'" if named else ""
    )


class Scope(Struct, frozen=True):
    """What a rule book's ``config.x`` and ``shape(x)`` mean here."""

    config: Mapping[str, Any] | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    below: str | None = None
    """A segment that keys must have: the name of the sub-model that the book speaks of."""

    def admits(self, template: str) -> bool:
        """Whether keys of a template belong to the sub-model; heads stand outside and are let in.

        >>> Scope(below="language_model").admits("model.vision_tower.layers.0.norm")
        False
        """
        segments = template.split(".")
        return self.below is None or self.below in segments or segments[0] in _HEADS

    def look_up(self, value: ConfigPath | ShapeOf) -> int | None:
        """The first of the fields that the config has as a whole number; it says nothing of shapes.

        Attention heads share the hidden size where a config says nothing of ``head_dim``.
        """
        if isinstance(value, ShapeOf):
            return None
        for path in value.paths:
            found = self._field(path)
            if found is not None:
                return found
        if value.paths == (("head_dim",),):
            hidden, heads = self._field(("hidden_size",)), self._field(("num_attention_heads",))
            if hidden is not None and heads and hidden % heads == 0:
                return hidden // heads
        return None

    def _field(self, path: tuple[str, ...]) -> int | None:
        node: Any = self.config
        for name in path:
            node = node.get(name) if isinstance(node, Mapping) else None
        return node if isinstance(node, int) and not isinstance(node, bool) else None


class Told(Struct, frozen=True):
    """What something outside knows of a model."""

    book: Book
    evidence: str
    """What told it."""
    notes: tuple[str, ...] = ()
    """What the user should know besides: a class that had to be guessed, a release that was not tested."""
    architecture: str | None = None
    """The class that the model was taken for."""


class TiedNames(Struct, frozen=True):
    """Names of a file that are one tensor in the model."""

    names: tuple[str, ...]
    """The one that the others follow first."""
    heads: frozenset[str] = frozenset()
    """Those of them that are output embeddings: in transformers 4, only the config ties them."""


class Foreign(Protocol):
    """Something outside that knows how a model's layout changed: the installed transformers."""

    def book(
        self,
        model: ModelConfig,
        keys: Sequence[str],
        shapes: Mapping[str, tuple[int, ...]],
        classes: Sequence[str],
        *,
        adapter: bool,
        task: str | None = None,
        spelled: Sequence[str] = (),
    ) -> Told | None:
        """A rule book for a model and what told it; ``None`` where it does not know the model.

        ``keys`` and ``shapes`` are those of the file at hand, ``spelled`` the names that it had before, ``classes``
        what the model may be, the likeliest first; ``adapter`` tells that the names are those of modules, and
        ``task`` what PEFT calls its task.
        """

    def has_class(self, names: Sequence[str]) -> bool | None:
        """Whether one of the names is that of a class of its models; ``None`` where it cannot say."""

    def tied(
        self, model: ModelConfig, keys: Sequence[str], classes: Sequence[str]
    ) -> list[TiedNames] | None:
        """Which of a file's names are one tensor in the model, by its class and its config.

        ``None`` where it does not know the model.
        """
