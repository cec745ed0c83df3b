"""How much memory a process takes."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def resident() -> int:
    """The process's resident memory now, in bytes; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return peak()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """The most it ever was, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
