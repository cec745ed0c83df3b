"""A training run's checkpoint as a folder in which its tensors are whole, though no byte of them is written.

The folder has a stand-in for one weights file (`regraft.storage.chunked`), and copies of the small files beside it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from regraft.storage.chunked import ChunkedFile
from regraft.storage.dcp import METADATA, is_dcp, model_of, read_dcp
from regraft.storage.folder import copy_file
from regraft.storage.rank_files import rank_files, read_rank_files
from regraft.storage.stand_ins import NAMES, STAND_INS

_WEIGHTS = (".distcp", ".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_OWN = (METADATA, "metadata.json")
"""What says how it was saved, the second where Megatron-Core did."""
_BELOW = "huggingface"
"""Where verl puts the config and the tokenizer."""
_MOST = 1 << 27
"""Bytes of a file beside the weights that is taken along."""


class Joined:
    """The folder that stands for a checkpoint."""

    def __init__(self, url: str, file: ChunkedFile, left: list[str]) -> None:
        self.url, self.left = url, left
        self.traffic = None
        self._file = file
        above = Path(tempfile.mkdtemp(prefix="regraft-"))
        self.path = above / (Path(url).name or "model")
        self.path.mkdir()
        stand_in = self.path / "model.safetensors"
        stand_in.write_bytes(file.head)
        stand_in.chmod(0o644)
        self._where = os.path.realpath(stand_in)
        STAND_INS[self._where] = file
        NAMES[str(self.path)] = url

    def close(self) -> None:
        """Remove it."""
        self._file.close()
        STAND_INS.pop(self._where, None)
        NAMES.pop(str(self.path), None)
        shutil.rmtree(self.path.parent, ignore_errors=True)


def is_joined(folder: Path) -> bool:
    """Whether a folder holds a checkpoint in parts that can be joined."""
    return bool(rank_files(folder)) or is_dcp(folder)


def join(folder: Path, inside: Path, key: str | None) -> Joined:
    """Make the folder that stands for a distributed checkpoint of torch, or for the files of a run's ranks.

    Args:
        folder: the folder that was named, with a config beside the weights if there is one.
        inside: the folder with the weights, which may be the same.
        key: below which key the model is, where several fit.

    Raises ``BadInputError`` where it cannot be read.
    """
    files = rank_files(inside)
    tensors, other = read_rank_files(files) if files else read_dcp(inside)
    model, left = model_of(tensors, str(inside), key)
    other += sorted(
        path.name for path in inside.glob("*_world_size_*.pt") if path.name[:6] != "model_"
    )
    made = Joined(str(folder), ChunkedFile(inside, model, str(inside)), [*left, *other])
    try:
        below = folder / _BELOW
        for path in sorted(
            [*folder.iterdir(), *(below.iterdir() if files and below.is_dir() else ())]
        ):
            beside = path.is_file() and not path.is_symlink() and path.name not in _OWN
            if beside and path.suffix not in _WEIGHTS and path.stat().st_size <= _MOST:
                copy_file(path, made.path / path.name)
    except BaseException:
        made.close()
        raise
    return made
