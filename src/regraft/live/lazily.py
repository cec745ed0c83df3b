"""A checkpoint's files as a state dict that is not read yet."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from regraft.arrays.lazy import Lazy
from regraft.checkpoints.gather import Files, Fill, fill_slices
from regraft.checkpoints.moves import Moves, slicer_of
from regraft.checkpoints.slices import strips_of
from regraft.checkpoints.source import Source
from regraft.errors import RegraftError
from regraft.planning.slices import Slicer
from regraft.storage.dtypes import DTYPES


class LazyFiles:
    """Every tensor of some files by name, with its shape and type; what is read of them is read by strips."""

    def __init__(self, source: Source) -> None:
        self.source, self.files = source, Files(source.files)

    def state_dict(self) -> dict[str, Lazy]:
        """The tensors."""
        tensors = self.source.tensors
        return {
            name: Lazy(shape, dtype, row, read=self._read)
            for row, (name, shape, dtype) in enumerate(
                zip(tensors.names, tensors.shapes, tensors.dtypes, strict=True)
            )
        }

    def converted(self, moves: Moves) -> dict[str, Lazy]:
        """What moves make of the tensors, in another layout."""
        slicer = slicer_of(moves, self.source.tensors)
        rows = np.arange(len(self.source.tensors), dtype=np.int64)
        return {
            name: Lazy(shape, dtype, -1, (slicer, name, rows), self._read)
            for name, shape, dtype in zip(moves.names, moves.shapes, moves.dtypes, strict=True)
        }

    def _read(self, tensor: Lazy) -> bytes:
        """All bytes of a tensor."""
        item = max(1, DTYPES[tensor.dtype].bits // 8)
        strips = tensor.cut(None)
        if DTYPES[tensor.dtype].bits % 8:
            slicer = Slicer([tensor.shape])
            slicer.add_whole(["it"], np.zeros(1, dtype=np.int64))
            region = tuple(((0, size),) for size in tensor.shape)
            strips = [
                one.with_sources(np.full(1, tensor.row))
                for one in strips_of(slicer, "it", tensor.shape, tensor.dtype, region)
            ]
        view = np.empty(_size_of(tensor), np.uint8)
        fill_slices([Fill(view, strips, item)], self.source.tensors, self.files)
        return view.tobytes()


def _size_of(tensor: Lazy) -> int:
    """In bytes, padding with them."""
    count = DTYPES[tensor.dtype].bits
    for size in tensor.shape:
        count *= size
    return count // 8


def by_books(lazy: LazyFiles, path: Path) -> dict[str, Lazy] | None:
    """The tensors of a checkpoint of another tool in transformers' layout; ``None`` where it is none of those."""
    # Hardly any load comes here, and these take as long to import as a small model to load.
    from regraft.bridges.transformers.files import InstalledTransformers
    from regraft.bridges.transformers.making import LEFT, RIGHT
    from regraft.checkpoints.prepare import prepare
    from regraft.checkpoints.reads import check_reads

    try:
        ready = prepare(path, RIGHT, foreign=InstalledTransformers())
    except RegraftError:
        return None
    if ready.plan is None or ready.report.source_layout in (LEFT, RIGHT):
        return None
    check_reads(ready.plan, ready.source)
    return lazy.converted(ready.moves)
