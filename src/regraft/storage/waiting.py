"""Arrays that are done and wait in a file of their own, so that they take no memory."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_SEGMENT = 256 << 20
"""Bytes of the file that are mapped together; nothing is stored where nothing was put."""
_ALIGNED = 64


class Waiting:
    """A file without a name in a folder; it is gone with the process, or when nothing looks at its arrays."""

    def __init__(self, folder: Path) -> None:
        self._folder = next(x for x in (folder, *folder.parents) if x.is_dir())
        self._file: Any = None
        self._mapped: mmap.mmap | None = None
        self._start = self._used = self._size = 0

    def put(self, array: Array) -> Array:
        """The same array, to be read from the file."""
        if not array.size:
            return array
        if self._mapped is None or self._used + array.nbytes > self._size:
            self._add_segment(array.nbytes)
        assert self._mapped is not None
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        at = self._start + self._used
        while data:
            done = os.pwrite(self._file.fileno(), data, at)
            data, at = data[done:], at + done
        made = np.frombuffer(self._mapped, array.dtype, array.size, self._used)
        self._used += -(-array.nbytes // _ALIGNED) * _ALIGNED
        return made.reshape(array.shape)

    def _add_segment(self, least: int) -> None:
        if self._file is None:
            import tempfile  # slow to import, and few files are written

            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - it lives as long as this
        self._start += self._size
        self._size = -(-max(_SEGMENT, least) // mmap.ALLOCATIONGRANULARITY)
        self._size *= mmap.ALLOCATIONGRANULARITY
        self._file.truncate(self._start + self._size)
        self._mapped = mmap.mmap(
            self._file.fileno(), self._size, access=mmap.ACCESS_READ, offset=self._start
        )
        self._used = 0


def forget(array: Array) -> None:
    """Let the pages of an array that waits in a file leave memory; they come back when it is read."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    owner = owner.obj if isinstance(owner, memoryview) else owner
    if isinstance(owner, mmap.mmap) and not array.flags.writeable and hasattr(owner, "madvise"):
        owner.madvise(mmap.MADV_DONTNEED)
