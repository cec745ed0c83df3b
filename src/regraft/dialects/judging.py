"""What a tool would do with an adapter's files as they are: what judges are given, and what they answer.

A dialect whose tool loads adapters has ``readers``, a tuple of `ToolReader`; ``regraft check --for NAME`` asks the one
of that name. A judge looks at the files and not at what regraft makes of them, as the tool would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct, field

from regraft.adapters.form import Array
from regraft.dialects.base import dialects
from regraft.planning.model import ModelConfig

LOADED, IGNORED, FAILS = "loaded", "ignored", "fails"
WRONG_SCALE, WRONG_VALUES = "wrong-scale", "wrong-values"
UNKNOWN = "unknown"
OUTCOMES = {
    LOADED: "loaded",
    IGNORED: "ignored",
    FAILS: "not loaded",
    WRONG_SCALE: "with a wrong scale",
    WRONG_VALUES: "with other values",
    UNKNOWN: "not known without the base",
}
"""What can become of a module's LoRA, in words after a number; a check says it in the same ones."""
VERDICTS = {
    "full": "Full effect",
    "unknown": "Not known",
    "partial": "A part of it",
    "none": "No effect",
    "fails": "It fails",
    "wrong-scale": "Wrong effect",
}
"""What a tool makes of all of it, as the terminal and the page say it."""


class Files(Struct, frozen=True):
    """An adapter's files, as a tool that is pointed at them finds them."""

    src: Path
    """What was given: a folder, or one file."""
    config: Mapping[str, Any] | None
    """``adapter_config.json``, where there is one."""
    tensors: Mapping[str, Array]
    """Of ``adapter_model.safetensors`` or the file that was given, by their names there."""
    dialect: str
    """The dialect that regraft takes it for."""
    model: ModelConfig | None = None
    """The config of the base, where it is known."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    family: str | None = None
    """The family of the base, where it was said."""
    told: tuple[str, ...] = ()
    """The model types of the base that the files themselves tell."""

    @property
    def types(self) -> list[str]:
        """The model types of the base and its parts, as far as they are known."""
        return self.model.model_types() if self.model is not None else list(self.told)

    @property
    def folder(self) -> Path:
        """The folder that they are in."""
        return self.src if self.src.is_dir() else self.src.parent


class Outcome(Struct, frozen=True):
    """What becomes of one module's LoRA."""

    key: str
    """The module, as the file names it."""
    outcome: str
    """One of `OUTCOMES`."""
    reason: str = ""


class Judgement(Struct):
    """What a tool does with all of a file."""

    targets: list[Outcome] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Why it loads nothing of it."""
    notes: list[str] = field(default_factory=list)

    def add(self, keys: Sequence[str] | str, outcome: str, reason: str = "") -> None:
        """Say the same of some modules."""
        for key in [keys] if isinstance(keys, str) else keys:
            self.targets.append(Outcome(key, outcome, reason))

    @property
    def verdict(self) -> str:
        """``full``, ``partial``, ``none``, ``fails`` or ``wrong-scale``.

        >>> Judgement([Outcome("q_proj", LOADED), Outcome("v_proj", IGNORED)]).verdict
        'partial'
        """
        found = {target.outcome for target in self.targets}
        if self.failures or FAILS in found:
            return "fails"
        if not found or found == {IGNORED}:
            return "none"
        if found & {WRONG_SCALE, WRONG_VALUES}:
            return "wrong-scale"
        return "partial" if IGNORED in found else "full"


class ToolReader(Protocol):
    """What is known of how one tool loads adapters."""

    @property
    def tool(self) -> str:
        """What users call it (``--for``)."""
        ...

    @property
    def versions(self) -> Sequence[str]:
        """The releases that are known, the newest last."""
        ...

    @property
    def basis(self) -> str:
        """Where it is known from: ``run``, ``its functions, run`` or ``its source``."""
        ...

    @property
    def to(self) -> str:
        """The dialect to convert to for it."""
        ...

    def judge(self, files: Files, version: str) -> Judgement:
        """What it would do. Raises what opening the files raises."""
        ...


def tool_readers() -> dict[str, ToolReader]:
    """The tools that are known, by name."""
    return {reader.tool: reader for reader in _readers()}


def is_tool(name: str) -> bool:
    """Whether a name, with ``@VERSION`` or without, is a tool's that loads adapters."""
    return name.partition("@")[0] in tool_readers()


def _readers() -> Iterator[ToolReader]:
    for dialect in dialects().values():
        yield from getattr(dialect, "readers", ())


__all__ = [
    "FAILS",
    "IGNORED",
    "LOADED",
    "OUTCOMES",
    "UNKNOWN",
    "VERDICTS",
    "WRONG_SCALE",
    "WRONG_VALUES",
    "Files",
    "Judgement",
    "Outcome",
    "ToolReader",
    "is_tool",
    "tool_readers",
]
