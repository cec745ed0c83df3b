"""Having the system begin to write what is in its cache, so that little is left when it must be on disk."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

_WRITE = 2
"""``SYNC_FILE_RANGE_WRITE``: begin, and do not wait. Source: ``man 2 sync_file_range``."""


def _find() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


_sync_file_range = _find()


def begin_writing(file: int, at: int, size: int) -> None:
    """Begin to write a part of an open file to disk; where the system cannot, nothing happens."""
    if _sync_file_range is not None and size > 0:
        _sync_file_range(file, at, size, _WRITE)
