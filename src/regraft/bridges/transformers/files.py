"""Rule books for files: the model is built from its config without weights, then imported."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regraft.errors import BadInputError, Finding
from regraft.plan.model import ModelConfig
from regraft.rules.book import Book


@dataclass(slots=True)
class InstalledTransformers:
    """What the installed transformers knows of models. It is imported when it is first asked."""

    _made: dict[tuple[str, str], Any] = field(default_factory=dict)

    def book(
        self,
        model: ModelConfig,
        keys: Sequence[str],
        shapes: Mapping[str, tuple[int, ...]],
        classes: Sequence[str],
        *,
        adapter: bool,
    ) -> tuple[Book, str] | None:
        """The rule book for a model by its config; ``None`` without transformers, or where that has no such model.

        Of several classes the one is taken where most keys land.

        Raises ``BadInputError`` where the model cannot be built from its config.
        """
        try:
            import transformers
        except ImportError:
            return None
        config = self._config(model)
        if config is None:
            return None
        found = []
        for name in self._classes(config, classes):
            imported = self._imported(model, config, name)
            found.append((sum(imported.lands(keys)), imported))
        best = max(found, key=lambda pair: pair[0], default=None)
        if best is None:
            return None
        imported = best[1]
        told = f"transformers {transformers.__version__} has a registry for {imported.name}"
        return imported.book(keys, shapes, adapter=adapter), told

    def _config(self, model: ModelConfig) -> Any:
        from transformers import CONFIG_MAPPING, AutoConfig

        if model.model_type not in CONFIG_MAPPING:
            return None
        data = dict(model.data)
        kind = data.pop("model_type")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return AutoConfig.for_model(kind, **data)
        except Exception as error:
            raise _unusable(model, f"transformers does not take the config: {error}") from error

    def _classes(self, config: Any, classes: Sequence[str]) -> list[str]:
        """Classes of the model that there are; its base model where none is named."""
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

        names = [n for n in dict.fromkeys(classes) if hasattr(transformers, n)]
        base = MODEL_MAPPING_NAMES.get(config.model_type)
        bases = [base] if isinstance(base, str) else list(base or ())
        return names or [n for n in bases if hasattr(transformers, n)]

    def _imported(self, model: ModelConfig, config: Any, name: str) -> Any:
        import torch
        import transformers

        from regraft.bridges.transformers.imported import import_model
        from regraft.names.live import skeleton_of

        if (model.path, name) not in self._made:
            try:
                with warnings.catch_warnings(), torch.device("meta"):
                    warnings.simplefilter("ignore")
                    built = getattr(transformers, name)(config)
            except Exception as error:
                raise _unusable(model, f"{name} cannot be built from it: {error}") from error
            self._made[model.path, name] = import_model(skeleton_of(built))
        return self._made[model.path, name]


def _unusable(model: ModelConfig, message: str) -> BadInputError:
    return BadInputError(
        Finding(
            "model-config",
            message,
            where=model.path,
            fix="give the config.json that belongs to the model, or another release of transformers",
        )
    )
