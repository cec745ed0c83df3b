"""Trying what stock PEFT makes of an adapter: it loads the files into a blank model, and what landed is compared.

``PeftModel.from_pretrained`` runs as it is installed, nothing of it is replaced. What should have landed is known from
the same model with the adapter as regraft converts and loads it. In a process of its own, unless PEFT is imported.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from regraft.bridges.helper import Helper, HelperEndedError
from regraft.bridges.transformers.release import installed_layout
from regraft.errors import BadInputError, Finding
from regraft.planning.model import ModelConfig

_THERE = Helper(__name__, "attempt")


@dataclass(frozen=True, slots=True)
class Trial:
    """What is to be tried."""

    model: ModelConfig
    named: str | None
    """The class that the adapter names."""
    folder: str
    """The adapter as it is, as PEFT finds it."""
    wanted: str | None
    """The same in the layout that the installed transformers has; ``None`` where there is no such thing."""
    remedies: tuple[str, ...] = ()
    """Folders that may do instead; each is tried, if the adapter as it is will not do."""
    names: tuple[str, ...] = ()
    """The names of the base that it adapts, which tell the class where none is named."""
    task: str | None = None
    """The task that it was trained for, as PEFT calls it."""


@dataclass(frozen=True, slots=True)
class Landing:
    """What became of one thing that an adapter changes."""

    key: str
    """The base tensor, or the tensor of the adapter."""
    outcome: str
    """``lands``, ``dropped``, ``scaled``, ``differs``, ``extra``, ``uncalled`` or ``fails``."""
    rank: int | None = None
    """The rank that a LoRA has there."""
    scale: float | None = None
    factor: float | None = None
    """How many times too large its effect is, where only that is wrong."""
    dead: bool = False
    """Whether it changes nothing, because B is zero."""
    detail: str = ""


@dataclass(slots=True)
class Tried:
    """What came of it."""

    versions: str
    """What it was tried with."""
    model_class: str
    guessed: str | None = None
    """How the class was guessed, where none is named that there is."""
    error: str | None = None
    """What PEFT raised."""
    landings: list[Landing] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What PEFT said."""
    unwanted: str | None = None
    """Why what should land cannot be told."""
    remedy: str | None = None
    """The first folder that loads rightly."""

    @property
    def right(self) -> bool:
        """Whether all of it landed, and nothing else."""
        return (
            self.error is None
            and self.unwanted is None
            and bool(self.landings)
            and all(landing.outcome == "lands" for landing in self.landings)
        )


@dataclass(slots=True)
class StockPeft:
    """The installed PEFT, unless it is not there."""

    helper: Helper = field(default_factory=lambda: _THERE)
    """The process that tries."""

    @property
    def is_there(self) -> bool:
        """Whether transformers, torch and PEFT are installed."""
        return all(find_spec(name) is not None for name in ("peft", "torch", "transformers"))

    def layout(self) -> str:
        """The layout of models in the installed transformers."""
        return installed_layout()

    def attempt(self, trial: Trial) -> Tried:
        """Try an adapter.

        Raises ``BadInputError`` where the model cannot be built.
        """
        if "peft" in sys.modules and not _is_hooked():
            return attempt(trial)
        try:
            found: Tried = self.helper.ask(trial)
        except HelperEndedError as error:
            raise BadInputError(
                Finding(
                    "model-config",
                    f"the process that tries the adapter in a blank model failed: {error}",
                    where=trial.model.path,
                    fix="give the config.json that belongs to the model, or free memory",
                )
            ) from error
        return found


def _is_hooked() -> bool:
    """Whether ``regraft.installed`` has replaced PEFT's functions in this process."""
    hook: Any = sys.modules.get("regraft.bridges.peft.hook")
    return hook is not None and hook.is_installed()


def attempt(trial: Trial) -> Tried:
    """Try an adapter in this process."""
    from regraft.bridges.transformers.building import isolated

    with isolated():
        return _attempt(trial)


def _attempt(trial: Trial) -> Tried:
    import peft
    import transformers

    from regraft.bridges.peft.landed import compare_states

    name, build, guessed = _choose(trial)
    tried = Tried(
        f"transformers {transformers.__version__} with PEFT {peft.__version__}", name, guessed
    )
    state, tried.error, tried.warnings = _load_stock(build(), trial.folder)
    if trial.wanted is None:
        return tried
    try:
        want = _load_wanted(build(), trial.wanted)
    except Exception as error:  # PEFT's own checks raise what they like
        tried.unwanted = _said(error)
        return tried
    if state is not None:
        tried.landings = compare_states(state, want)
    if not tried.right:
        for folder in trial.remedies:
            other, problem, _ = _load_stock(build(), folder)
            if problem is None and all(
                landing.outcome == "lands" for landing in compare_states(other, want)
            ):
                tried.remedy = folder
                break
    return tried


def _choose(trial: Trial) -> tuple[str, Callable[[], Any], str | None]:
    """The class that most of the adapter is for, what builds it, and how it was guessed where none is named."""
    from regraft.bridges.peft.holders import strangers
    from regraft.bridges.transformers.blank import build_blank, classes_of

    names, guessed = classes_of(
        trial.model, trial.named, lambda: trial.names, adapter=True, task=trial.task
    )
    if not names:
        raise BadInputError(
            Finding(
                "unknown-model",
                f"the installed transformers has no model of the type {trial.model.model_type!r}",
                where=trial.model.path,
                fix="install a transformers that has it",
            )
        )
    best, least = names[0], None
    if len(names) > 1 and trial.wanted is not None:
        adapter = _open(trial.wanted)
        for name in names:
            odd = len(strangers(build_blank(trial.model, name), adapter))
            if least is None or odd < least:
                best, least = name, odd
    return best, lambda: build_blank(trial.model, best), guessed


def _open(folder: str) -> Any:
    from regraft.bridges.peft.known import Adapter, to_torch
    from regraft.dialects.peft.source import open_adapter
    from regraft.report import AdapterReport

    source = open_adapter(Path(folder), Path(folder))
    tensors = {name: to_torch(tensor) for name, tensor in source.tensors.items()}
    report = AdapterReport("", source.peft_type, "", "", [])
    return Adapter(source.config, tensors, source.where, report)


def _load_wanted(base: Any, folder: str) -> Any:
    from peft import PeftModel

    from regraft.bridges.peft.holders import Place
    from regraft.bridges.peft.landed import marks_of, read_state
    from regraft.bridges.peft.load import load_by_peft

    marks = marks_of(base)
    with _quiet():
        model = load_by_peft(
            base,
            base,
            Place("", base, None),
            _open(folder),
            lambda path: PeftModel.from_pretrained(base, path),
        )
    return read_state(model, marks)


def _load_stock(base: Any, folder: str) -> tuple[Any, str | None, list[str]]:
    """What landed, what was raised, and what was said."""
    from peft import PeftModel

    from regraft.bridges.peft.landed import marks_of, read_state

    marks = marks_of(base)
    with _quiet() as said:
        try:
            model = PeftModel.from_pretrained(base, folder)
        except Exception as error:
            return None, _said(error), said
    return read_state(model, marks), None, said


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep warnings and log messages from the screen, and list them."""
    said: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(" ".join(record.getMessage().split()))

    keeper = Keeper(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("peft", "transformers")]
    before = [(logger, logger.propagate, logger.handlers[:]) for logger in loggers]
    for logger in loggers:
        logger.handlers[:] = [keeper]
        logger.propagate = False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
        said += [
            " ".join(str(w.message).split()) for w in caught if issubclass(w.category, UserWarning)
        ]
    finally:
        for logger, propagate, handlers in before:
            logger.propagate, logger.handlers[:] = propagate, handlers


@contextmanager
def as_peft_finds_it(weights: Path, config: Path) -> Iterator[str]:
    """A folder in which PEFT finds an adapter, whatever its weights file is called."""
    with tempfile.TemporaryDirectory(prefix="regraft-") as folder:
        for path, name in (
            (weights, f"adapter_model{weights.suffix}"),
            (config, "adapter_config.json"),
        ):
            (Path(folder) / name).symlink_to(path.resolve())
        yield folder
