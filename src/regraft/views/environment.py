"""What regraft runs on, for bug reports."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version

import regraft
from regraft.shown import Shown

PACKAGES = (
    "click",
    "ml-dtypes",
    "msgspec",
    "numpy",
    "regex",
    "rich",
    "tomlkit",
    "safetensors",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "diffusers",
    "gguf",
    "vllm",
)
"""The core's dependencies, and libraries whose files or classes regraft deals with."""
_GROUPS = ("regraft.books", "regraft.dialects")
_PREFIXES = ("REGRAFT_", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "NO_COLOR")


@dataclass(frozen=True, slots=True, repr=False)
class Environment(Shown):
    """Versions and settings that regraft's results may depend on."""

    regraft: str
    python: str
    """Its implementation and version."""
    platform: str
    packages: dict[str, str | None]
    """The version of each, ``None`` where it is not installed."""
    variables: list[str]
    """Environment variables that are set and that regraft or its libraries read; their values are not shown."""
    plugins: list[str]
    """Installed packages that bring rule books or dialects, with their versions."""


def environment() -> Environment:
    """Look at what is installed, without importing it.

    >>> environment().packages["numpy"] is not None
    True
    """
    return Environment(
        regraft.__version__,
        f"{platform.python_implementation()} {platform.python_version()}",
        f"{sys.platform} {platform.machine()}",
        {name: _version(name) for name in PACKAGES},
        sorted(name for name in os.environ if name.startswith(_PREFIXES)),
        sorted(set(_plugins())),
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _plugins() -> Iterable[str]:
    for group in _GROUPS:
        for entry in entry_points(group=group):
            if entry.dist is not None:
                yield f"{entry.dist.name} {entry.dist.version}"
