"""Which dialects there are, and which of them a path is in. Nothing is imported before a dialect is asked for.

Those of installed packages come through the entry point ``regraft.dialects`` (a name, and an object or a class).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from regraft.errors import AmbiguousError, BadInputError, Choice, Finding
from regraft.import_path import entry_points_of

if TYPE_CHECKING:
    from regraft.dialects.base import Dialect


class Evidence(Struct, frozen=True):
    """Why a file is taken for one of a dialect."""

    certain: bool
    """Whether nothing else can be meant; otherwise it gives way to a dialect that is certain."""
    why: str


_BUILT_IN = {
    "ai-toolkit": "regraft.dialects.image.dialect:AI_TOOLKIT",
    "bfl": "regraft.dialects.image.dialect:BFL",
    "comfyui": "regraft.dialects.image.dialect:COMFYUI",
    "diffusers": "regraft.dialects.image.dialect:DIFFUSERS",
    "gguf": "regraft.dialects.gguf:GGUF",
    "kohya": "regraft.dialects.image.dialect:KOHYA",
    "litgpt": "regraft.dialects.litgpt:LITGPT",
    "megatron-bridge": "regraft.dialects.megatron_bridge:MEGATRON_BRIDGE",
    "mlx": "regraft.dialects.mlx:MLX",
    "nemo": "regraft.dialects.nemo:NEMO",
    "onetrainer": "regraft.dialects.image.dialect:ONETRAINER",
    "peft": "regraft.dialects.peft.dialect:PEFT",
    "peft-image": "regraft.dialects.image.dialect:PEFT_IMAGE",
    "sglang": "regraft.dialects.sglang:SGLANG",
    "skyrl": "regraft.dialects.skyrl:SKYRL",
    "tinker": "regraft.dialects.tinker:TINKER",
    "torchtune": "regraft.dialects.torchtune:TORCHTUNE",
    "unsloth": "regraft.dialects.unsloth:UNSLOTH",
    "unsloth-grouped": "regraft.dialects.unsloth:UNSLOTH_GROUPED",
    "vllm": "regraft.dialects.vllm:VLLM",
    "xlabs": "regraft.dialects.image.dialect:XLABS",
}

IMAGE = frozenset(
    name for name, place in _BUILT_IN.items() if place.startswith("regraft.dialects.image.")
)
"""Dialects of image and video models."""

_ALONE = IMAGE - {"peft-image"}
"""Dialects whose files never have an ``adapter_config.json`` beside them; where there is one, they are not asked."""


_FILES = {
    "gguf": ".gguf",
    "litgpt": ".pth.lora",
    "mlx": "adapters.safetensors",
    "torchtune": "adapter_model.pt",
}
"""How files of a dialect are called that are in a folder; where none is, it is not imported to be asked."""


class _Registry(Mapping[str, "Dialect"]):
    """Dialects by name, each imported when it is asked for."""

    def __init__(self, places: Mapping[str, Any]) -> None:
        self._places = dict(places)
        self._made: dict[str, Dialect] = {}

    def __getitem__(self, name: str) -> Dialect:
        if name not in self._made:
            place = self._places[name]
            if isinstance(place, str):
                module, _, attribute = place.partition(":")
                place = getattr(import_module(module), attribute)
            elif hasattr(place, "load"):
                place = place.load()
            self._made[name] = place() if isinstance(place, type) else place
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def also(self, dialect: Dialect) -> _Registry:
        """The same with a dialect more, or in another's place."""
        return _Registry({**self._places, dialect.name: dialect})


@lru_cache(maxsize=1)
def _installed() -> _Registry:
    """The built-in dialects, then those of installed packages."""
    places: dict[str, Any] = dict(_BUILT_IN)
    for entry in entry_points_of("regraft.dialects"):
        if entry.name in places:
            raise BadInputError(
                Finding(
                    "option",
                    f"the installed package {entry.value!r} brings a dialect {entry.name!r}, and there is one already",
                    fix="uninstall one of them",
                )
            )
        places[entry.name] = entry
    return _Registry(places)


_ADDED: ContextVar[_Registry | None] = ContextVar("added", default=None)


@contextmanager
def registered(dialect: Dialect) -> Iterator[None]:
    """Let there be a dialect more, in this thread, as long as this lasts."""
    token = _ADDED.set((_ADDED.get() or _installed()).also(dialect))
    try:
        yield
    finally:
        _ADDED.reset(token)


def dialects() -> Mapping[str, Dialect]:
    """All dialects by name."""
    return _ADDED.get() or _installed()


def dialect_of(src: Path) -> Dialect:
    """The dialect that a path is written in; PEFT's where none recognises it, so that its errors are seen.

    Raises ``AmbiguousError`` where more than one is certain.
    """
    found = sniffed(src)
    certain = [name for name, told in found.items() if told.certain]
    if len(certain) > 1:
        raise AmbiguousError(
            Finding(
                "which-dialect",
                "it may be of several dialects",
                where=str(src),
                fix="say which it is with --from",
                choices=tuple(Choice(name, found[name].why) for name in certain),
            )
        )
    chosen = certain or list(found) or ["peft"]
    return dialects()[chosen[0]]


def sniffed(src: Path) -> dict[str, Evidence]:
    """The dialects that recognise a path as theirs, by name, with why."""
    from regraft.dialects.tool_files import looking_once

    left_out = _left_out(src)
    known = dialects()
    with looking_once():
        asked = {name: known[name].sniff(src) for name in known if name not in left_out}
    return {name: told for name, told in asked.items() if told is not None}


def _left_out(src: Path) -> frozenset[str]:
    """Built-in dialects that a path cannot be of, by the names of the files that are there."""
    if not src.is_dir():
        return _ALONE if (src.parent / "adapter_config.json").is_file() else frozenset()
    files = [path.name for path in src.iterdir()]
    missing = {name for name, end in _FILES.items() if not any(f.endswith(end) for f in files)}
    return (_ALONE if "adapter_config.json" in files else frozenset()) | missing


__all__ = ["Evidence", "dialect_of", "dialects", "registered", "sniffed"]
