"""Trying what stock transformers makes of a checkpoint: it loads it onto the meta device, without reading the data."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from regraft.bridges.helper import Helper, HelperEndedError
from regraft.checkpoints.source import open_checkpoint
from regraft.errors import BadInputError, Finding
from regraft.planning.model import ModelConfig

_THERE = Helper(__name__, "attempt")


@dataclass(frozen=True, slots=True)
class Loading:
    """A checkpoint that is to be tried."""

    model: ModelConfig
    folder: str


@dataclass(slots=True)
class Loaded:
    """What came of it."""

    versions: str
    model_class: str
    guessed: str | None = None
    """How the class was guessed, where the config names none that there is."""
    error: str | None = None
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    """Tensors of the model whose shape is another in the checkpoint."""
    failed: list[str] = field(default_factory=list)
    """Conversions that failed, in transformers' words."""
    tensors: list[str] = field(default_factory=list)
    """All tensors of the model."""


def is_there() -> bool:
    """Whether transformers and torch are installed."""
    return find_spec("transformers") is not None and find_spec("torch") is not None


def try_checkpoint(question: Loading) -> Loaded:
    """Try a checkpoint, in a process of its own unless transformers is imported.

    Raises ``BadInputError`` where the model cannot be built.
    """
    if "transformers" in sys.modules:
        return attempt(question)
    try:
        found: Loaded = _THERE.ask(question)
    except HelperEndedError as error:
        raise BadInputError(
            Finding(
                "model-config",
                f"the process that tries the checkpoint failed: {error}",
                where=question.model.path,
                fix="give the config.json that belongs to the model",
            )
        ) from error
    return found


def attempt(question: Loading) -> Loaded:
    """Try a checkpoint in this process."""
    import transformers

    from regraft.bridges.transformers.blank import build_blank, classes_of
    from regraft.bridges.transformers.building import isolated, make_config, model_class

    folder = Path(question.folder)
    names, guessed = classes_of(question.model, None, lambda: open_checkpoint(folder).tensors.names)
    if not names:
        raise BadInputError(
            Finding(
                "unknown-model",
                f"the installed transformers has no model of the type {question.model.model_type!r}",
                where=question.model.path,
                fix="install a transformers that has it",
            )
        )
    loaded = Loaded(f"transformers {transformers.__version__}", names[0], guessed)
    loaded.tensors = list(build_blank(question.model, names[0]).state_dict())
    config = make_config(str(question.model.model_type), question.model.data)
    with _quiet(), isolated(), tempfile.TemporaryDirectory(prefix="regraft-") as empty:
        try:
            _, info = model_class(names[0]).from_pretrained(
                question.folder,
                config=config,
                device_map="meta",
                output_loading_info=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                cache_dir=empty,
            )
        except Exception as error:
            loaded.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return loaded
    loaded.missing = sorted(info["missing_keys"])
    loaded.unexpected = sorted(info["unexpected_keys"])
    loaded.mismatched = sorted(_key(entry) for entry in info["mismatched_keys"])
    loaded.failed = [" ".join(str(text).split()) for text in info.get("error_msgs") or ()]
    failed: Any = info.get("conversion_errors") or {}
    loaded.failed += [f"{key}: {' '.join(str(text).split())}" for key, text in failed.items()]
    return loaded


def _key(entry: Any) -> str:
    return str(entry if isinstance(entry, str) else entry[0])


@contextmanager
def _quiet() -> Iterator[None]:
    import transformers

    words: Any = transformers.utils.logging
    level, bars = words.get_verbosity(), words.is_progress_bar_enabled()
    words.set_verbosity(logging.CRITICAL)
    words.disable_progress_bar()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        words.set_verbosity(level)
        if bars:
            words.enable_progress_bar()


@contextmanager
def as_a_folder(path: Path) -> Iterator[str]:
    """A folder in which transformers finds a checkpoint that may be one file."""
    if path.is_dir():
        yield str(path)
        return
    with tempfile.TemporaryDirectory(prefix="regraft-") as folder:
        name = "model.safetensors" if path.suffix == ".safetensors" else "pytorch_model.bin"
        (Path(folder) / name).symlink_to(path.resolve())
        yield folder
