"""Pairs of files or of state dicts: the same weights before and after a conversion."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np

from regraft.learning.clauses import Config
from regraft.learning.content import Content, Tensor, content_of, open_content

State = Mapping[str, Any]
Source = str | os.PathLike[str] | State


@dataclass(frozen=True, slots=True)
class Pair:
    """The same weights before and after, and the config that goes with them."""

    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    config: Config | None
    where: str
    notes: tuple[str, ...] = ()
    """What is to be said of a book that is learned from it."""
    odd: Mapping[str, str] = field(default_factory=dict)
    """Tensors after that are known to be no layout change, each with the reason."""

    @staticmethod
    def of(before: Source, after: Source, config: Config | None = None) -> Pair:
        """A pair of files, or of state dicts in memory."""
        one, other = _open(before, "before"), _open(after, "after")
        if config is None and not isinstance(before, Mapping):
            config = _config_beside(Path(before))
        if config is None and not isinstance(after, Mapping):
            config = _config_beside(Path(after))
        return Pair(one.tensors, other.tensors, config, one.where)


def _open(source: Source, where: str) -> Content:
    if isinstance(source, Mapping):
        return Content("checkpoint", where, content_of(arrays_of(source), where))
    return open_content(Path(source))


def arrays_of(state: State) -> dict[str, Any]:
    """A state dict as numpy's arrays; torch's tensors without a copy where that can be."""
    arrays = {}
    for key, value in state.items():
        arrays[key] = _array(value) if hasattr(value, "detach") else np.asarray(value)
    return arrays


def _array(tensor: Any) -> Any:
    """A torch tensor as an array, types that numpy has not among them."""
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    plain = tensor.detach().cpu().contiguous()
    if not name.startswith(("bfloat16", "float8")):
        return plain.numpy()
    word = torch.int16 if name == "bfloat16" else torch.uint8
    return plain.view(word).numpy().view(getattr(ml_dtypes, name))


def _config_beside(path: Path) -> Config | None:
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        data = msgspec.json.decode(file.read_bytes())
    except (OSError, msgspec.DecodeError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


__all__ = ["Pair", "Source", "State", "arrays_of"]
