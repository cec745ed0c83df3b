"""Reading single tensors of a checkpoint: one file, or shards with an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from regraft.errors import BadInputError, Finding
from regraft.storage.folder import load_json
from regraft.storage.safetensors import open_tensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a model's folder by name; a shard is opened when one of its tensors is asked for."""

    def __init__(self, folder: Path, shards: dict[str, str]) -> None:
        self.folder = folder
        self._shards = shards
        self._open: dict[str, dict[str, npt.NDArray[Any]]] = {}

    @staticmethod
    def find(folder: Path) -> Checkpoint | None:
        """The checkpoint in a folder; ``None`` where there is none.

        Raises ``BadInputError`` for an index that is none.
        """
        index = folder / INDEX
        if index.is_file():
            names = load_json(index).get("weight_map")
            if not isinstance(names, dict) or not all(
                isinstance(shard, str) and Path(shard).name == shard for shard in names.values()
            ):
                raise BadInputError(
                    Finding(
                        "index",
                        "its weight_map does not name files of this folder",
                        where=str(index),
                    )
                )
            return Checkpoint(folder, names)
        single = folder / SINGLE
        if not single.is_file():
            return None
        tensors = open_tensors(single)
        found = Checkpoint(folder, dict.fromkeys(tensors, SINGLE))
        found._open[SINGLE] = tensors
        return found

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._shards)

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def read(self, name: str) -> npt.NDArray[np.generic]:
        """One tensor, as a view on its file."""
        shard = self._shards[name]
        if shard not in self._open:
            self._open[shard] = open_tensors(self.folder / shard)
        return self._open[shard][name]
