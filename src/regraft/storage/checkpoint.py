"""Reading single tensors of a checkpoint: one file, or shards with an index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from regraft.errors import BadInputError, Finding, RegraftError
from regraft.storage.header import Header, read_header
from regraft.storage.json_files import load_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_AGAIN = "download the index again"


def names_beside(config: Path) -> list[str]:
    """The names of the weights beside a config; none where there are none that can be read."""
    try:
        weights = Checkpoint.find(config.parent)
    except (RegraftError, OSError, ValueError):
        return []
    return weights.names() if weights is not None else []


class Checkpoint:
    """The tensors of a model's folder by name; a shard is opened when one of its tensors is asked for."""

    def __init__(self, folder: Path, shards: dict[str, str]) -> None:
        self.folder = folder
        self._shards = shards
        self._open: dict[str, Header] = {}

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
        header = read_header(single)
        found = Checkpoint(folder, dict.fromkeys(header.tensors, SINGLE))
        found._open[SINGLE] = header
        return found

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._shards)

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def read(self, name: str) -> npt.NDArray[np.generic]:
        """One tensor.

        Raises ``BadInputError``.
        """
        shard = self._shards[name]
        if shard not in self._open:
            self._open[shard] = read_header(self.folder / shard)
        header = self._open[shard]
        if name not in header.tensors:
            message = f"the index says that it is in {shard}, and it is not"
            raise BadInputError(
                Finding("index", message, where=str(self.folder / INDEX), key=name, fix=_AGAIN)
            )
        from regraft.storage.safetensors import (
            read_tensor,  # names are asked for more often than numbers
        )

        return read_tensor(self.folder / shard, header, name)
