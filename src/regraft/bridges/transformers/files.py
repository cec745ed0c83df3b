"""Rule books for files: the model is built from its config without weights, then imported."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from regraft.bridges.helper import Helper, HelperEndedError
from regraft.checkpoints.config import V5, convert_config
from regraft.errors import BadInputError, Finding
from regraft.planning.model import ModelConfig, Told


class InstalledTransformers:
    """What the installed transformers knows of models.

    It is asked in a process of its own, unless it is imported already: torch and transformers take some hundred
    megabytes, and a conversion of files needs none of it.
    """

    def book(
        self,
        model: ModelConfig,
        keys: Sequence[str],
        shapes: Mapping[str, tuple[int, ...]],
        classes: Sequence[str],
        *,
        adapter: bool,
        task: str | None = None,
    ) -> Told | None:
        """The rule book for a model by its config; ``None`` without transformers, or where that has no such model.

        Of several classes the one is taken where most keys land.

        Raises ``BadInputError`` where the model cannot be built from its config.
        """
        if find_spec("transformers") is None or find_spec("torch") is None:
            return None
        question = _Question(model, list(keys), dict(shapes), list(classes), adapter)
        if "transformers" in sys.modules:
            return _HERE.answer(question)
        try:
            found: Told | None = _THERE.ask(question)
        except HelperEndedError as error:
            message = f"the process that asks transformers failed: {error}"
            raise _unusable(model, message) from error
        return found


@dataclass(frozen=True, slots=True)
class _Question:
    model: ModelConfig
    keys: list[str]
    shapes: dict[str, tuple[int, ...]]
    classes: list[str]
    adapter: bool


@dataclass(slots=True)
class _InProcess:
    _made: dict[tuple[str, str], Any] = field(default_factory=dict)

    def answer(self, question: _Question) -> Told | None:
        """What transformers says, in this process."""
        import transformers

        from regraft.bridges.transformers.registry import newer_than_tested

        config = self._config(question.model)
        if config is None:
            return None
        imported, most = None, -1
        for name in self._classes(question.model, config, question.classes):
            candidate = self._imported(question.model, config, name)
            count = sum(candidate.lands(question.keys))
            if count > most:
                imported, most = candidate, count
            if count == len(question.keys):
                break
        if imported is None:
            return None
        told = f"transformers {transformers.__version__} has a registry for {imported.name}"
        book = imported.book(question.keys, question.shapes, adapter=question.adapter)
        newer = newer_than_tested()
        return Told(book, told, () if newer is None else (newer,), imported.name)

    def _config(self, model: ModelConfig) -> Any:
        from transformers import CONFIG_MAPPING

        from regraft.bridges.transformers.building import make_config

        if model.model_type not in CONFIG_MAPPING:
            return None
        data, _ = convert_config(model.data, V5)
        try:
            return make_config(str(data["model_type"]), data)
        except Exception as error:
            raise _unusable(model, f"transformers does not take the config: {error}") from error

    def _classes(self, model: ModelConfig, config: Any, classes: Sequence[str]) -> list[str]:
        """Classes of the model that there are; where none is named, all that go with its model type, the base first."""
        from transformers.models.auto import modeling_auto

        from regraft.bridges.transformers.building import known_classes, model_class

        names = known_classes(model, classes)
        if names:
            return names
        tables = [n for n in vars(modeling_auto) if n.startswith("MODEL_") and n.endswith("_NAMES")]
        for table in sorted(tables, key=lambda n: n != "MODEL_MAPPING_NAMES"):
            found = getattr(modeling_auto, table).get(config.model_type) or ()
            names += [found] if isinstance(found, str) else found
        return [n for n in dict.fromkeys(names) if model_class(n) is not None]

    def _imported(self, model: ModelConfig, config: Any, name: str) -> Any:
        from regraft.bridges.transformers.building import build, model_class
        from regraft.bridges.transformers.imported import import_model
        from regraft.names.live import skeleton_of

        made = json.dumps(dict(model.data), sort_keys=True, default=str), name
        if made not in self._made:
            try:
                built = build(model_class(name), config)
            except Exception as error:
                raise _unusable(model, f"{name} cannot be built from it: {error}") from error
            self._made[made] = import_model(skeleton_of(built))
        return self._made[made]


def _unusable(model: ModelConfig, message: str) -> BadInputError:
    return BadInputError(
        Finding(
            "model-config",
            message,
            where=model.path,
            fix="give the config.json that belongs to the model, or another release of transformers",
        )
    )


def answer(question: _Question) -> Told | None:
    """What the installed transformers says, in this process."""
    return _HERE.answer(question)


_HERE, _THERE = _InProcess(), Helper(__name__, "answer")
