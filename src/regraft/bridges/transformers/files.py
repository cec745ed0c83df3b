"""Rule books for files: the model is built from its config without weights, then imported."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct, field

from regraft.bridges.transformers.symbolic import put
from regraft.checkpoints.config import V5, convert_config
from regraft.errors import AmbiguousError, BadInputError, Finding
from regraft.planning.model import ModelConfig, TiedNames, Told

if TYPE_CHECKING:
    from regraft.bridges.helper import Helper
    from regraft.bridges.transformers.choosing import Guessed
    from regraft.bridges.transformers.imported import Imported
    from regraft.bridges.transformers.tying import Ties


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
        spelled: Sequence[str] = (),
    ) -> Told | None:
        """The rule book for a model by its config; ``None`` without transformers, or where that has no such model.

        Of several classes the one is taken where most keys land. Where none is named that there is, it is guessed.

        Raises ``BadInputError`` where the model cannot be built from its config, ``AmbiguousError`` where its class
        has to be guessed and several lead to different results.
        """
        question = _Question(
            model, list(keys), dict(shapes), list(classes), adapter, task, spelled=list(spelled)
        )
        found: Told | None = _ask(question)
        return found

    def has_class(self, names: Sequence[str]) -> bool | None:
        """Whether transformers has a class of one of the names; ``None`` without transformers."""
        found: bool | None = _ask(
            _Question(ModelConfig({}, ""), [], {}, list(names), adapter=False, about="class")
        )
        return found

    def tied(
        self, model: ModelConfig, keys: Sequence[str], classes: Sequence[str]
    ) -> list[TiedNames] | None:
        """Which of a file's names are one tensor in the model; see `planning.model.Foreign`.

        Raises ``BadInputError`` where the model cannot be built from its config.
        """
        found: list[TiedNames] | None = _ask(
            _Question(model, list(keys), {}, list(classes), adapter=False, about="ties")
        )
        return found


def _ask(question: _Question) -> Any:
    """The answer of the installed transformers, here where it is imported; ``None`` where it is not installed."""
    if find_spec("transformers") is None or find_spec("torch") is None:
        return None
    if "transformers" in sys.modules:
        return answer(question)
    from regraft.bridges.helper import HelperEndedError

    try:
        return _there().ask(question)
    except HelperEndedError as error:
        message = f"the process that asks transformers failed: {error}"
        raise _unusable(question.model, message) from error


class _Question(Struct, frozen=True):
    model: ModelConfig
    keys: list[str]
    shapes: dict[str, tuple[int, ...]]
    classes: list[str]
    adapter: bool
    task: str | None = None
    about: Literal["book", "ties", "class"] = "book"
    """A rule book; which of the names are tied; whether there is one of the classes."""
    spelled: list[str] = field(default_factory=list)
    """Names that the file had before."""


class _InProcess(Struct):
    _made: dict[tuple[str, str], Any] = field(default_factory=dict)
    _ties: dict[tuple[str, str], Ties] = field(default_factory=dict)
    """Of what was made, which of its tensors are one."""

    def answer(self, question: _Question) -> Told | None:
        """What transformers says, in this process."""
        import transformers

        from regraft.bridges.transformers.registry import newer_than_tested

        config = self._config(question.model)
        if config is None:
            return None
        chosen = self.choose(question, config)
        if chosen is None:
            return None
        imported, guessed = chosen
        told = f"transformers {transformers.__version__} has a registry for {imported.name}"
        told += f", a class that was guessed: {guessed.why}" if guessed is not None else ""
        book = imported.book(
            question.keys, question.shapes, adapter=question.adapter, spelled=question.spelled
        )
        notes = [newer_than_tested(), guessed.note(question.model) if guessed is not None else None]
        return Told(book, told, tuple(note for note in notes if note), imported.name)

    def tied(self, question: _Question) -> list[TiedNames] | None:
        """Which of a file's names are tied, by the text model's config as transformers 4 reads it."""
        config = self._config(question.model)
        chosen = None
        with suppress(AmbiguousError):
            chosen = self.choose(question, config) if config is not None else None
        if chosen is None:
            return None
        imported = chosen[0]
        held = imported.held
        name = imported.name if held is None else held.classes[0]
        ties = self._ties[_made_from(question.model, name)]
        if held is not None:
            ties = ties.below(held.path)
        groups: dict[str, list[str]] = {}
        heads: set[str] = set()
        for own, keys in _spelled(imported, question.keys).items():
            first = ties.owners.get(own, own)
            group = groups.setdefault(first, [])
            group[:] = [*keys, *group] if own == first else [*group, *keys]
            if own in ties.heads:
                heads.update(keys)
        found = [tuple(group) for group in groups.values() if len(group) > 1]
        return [TiedNames(names, frozenset(heads.intersection(names))) for names in found]

    def choose(self, question: _Question, config: Any) -> tuple[Any, Guessed | None] | None:
        """The class of a model, and how it was guessed where none of transformers' is named."""
        from regraft.bridges.transformers.building import known_classes
        from regraft.bridges.transformers.choosing import (
            check_architecture,
            classes_of_task,
            find_held,
            guess,
        )

        model = question.model
        check_architecture(model)
        asked = [model.architecture]
        if model.architecture is None:
            asked = [*question.classes, *classes_of_task(model, question.task)]
        imported, most = None, -1
        for name in known_classes(model, asked):
            candidate = self._imported(model, config, name)
            count = sum(candidate.lands(question.keys))
            if count > most:
                imported, most = candidate, count
            if count == len(question.keys):
                break
        named = known_classes(model, question.classes)
        if imported is not None and model.architecture is not None and not named:
            held = find_held(model, [imported], question.keys, adapter=question.adapter)
            if held is not None:
                return held.imported, held
        if imported is not None:
            return imported, None
        guessed = guess(
            model,
            question.keys,
            lambda name: self._imported(model, config, name),
            adapter=question.adapter,
            task=question.task,
        )
        return (guessed.imported, guessed) if guessed is not None else None

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

    def _imported(self, model: ModelConfig, config: Any, name: str) -> Any:
        from regraft.bridges.transformers.building import build, model_class
        from regraft.bridges.transformers.imported import import_model
        from regraft.bridges.transformers.tying import ties_of
        from regraft.names.live import skeleton_of

        made = _made_from(model, name)
        if made not in self._made:
            try:
                built = build(model_class(name), config)
            except Exception as error:
                raise _unusable(model, f"{name} cannot be built from it: {error}") from error
            self._made[made] = import_model(skeleton_of(built))
            self._ties[made] = ties_of(built, config)
        return self._made[made]


def _made_from(model: ModelConfig, name: str) -> tuple[str, str]:
    """What a model of a class was made from."""
    return json.dumps(dict(model.data), sort_keys=True, default=str), name


def _spelled(imported: Imported, keys: Sequence[str]) -> dict[str, list[str]]:
    """The file's keys of each tensor of the model; none of a tensor that is put together from several."""
    found: dict[str, list[str]] = {}
    joined: set[str] = set()
    for rows, landed in imported.landings(keys):
        if landed is not None:
            for number, row in zip(rows.ids.tolist(), rows.numbers.tolist(), strict=True):
                own = put(landed.key, row)
                found.setdefault(own, []).append(keys[number])
                if landed.hit is not None:
                    joined.add(own)
    return {own: old for own, old in found.items() if own not in joined or len(old) == 1}


def class_by_names(
    model: ModelConfig, keys: Sequence[str], *, adapter: bool, task: str | None = None
) -> tuple[str, str] | None:
    """The class of a model whose config names none that there is, and how it was guessed, in this process.

    Raises ``AmbiguousError`` where the names fit several, with different results.
    """
    config = _HERE._config(model)
    if config is None:
        return None
    question = _Question(model, list(keys), {}, [], adapter, task)
    chosen = _HERE.choose(question, config)
    if chosen is None or chosen[1] is None:
        return None
    return chosen[0].name, chosen[1].note(model)


def _unusable(model: ModelConfig, message: str) -> BadInputError:
    return BadInputError(
        Finding(
            "model-config",
            message,
            where=model.path,
            fix="give the config.json that belongs to the model, or another release of transformers",
        )
    )


def answer(question: _Question) -> Told | list[TiedNames] | bool | None:
    """What the installed transformers says, in this process."""
    if question.about == "class":
        from regraft.bridges.transformers.building import model_class

        return any(model_class(name) is not None for name in question.classes)
    return _HERE.tied(question) if question.about == "ties" else _HERE.answer(question)


@cache
def _there() -> Helper:
    """The process that is asked; few conversions need one."""
    from regraft.bridges.helper import Helper

    return Helper(__name__, "answer")


_HERE = _InProcess()
