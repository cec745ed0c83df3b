"""How much memory a process takes."""

from __future__ import annotations

import sys
from pathlib import Path


def resident() -> int:
    """The process's resident memory now, in bytes; 0 where the system does not tell."""
    return _status("VmRSS") or peak()


def peak() -> int:
    """The most it ever was, in bytes; 0 where the system does not tell."""
    # Linux's getrusage counts what the process was before it became this program.
    most = _status("VmHWM")
    if most:
        return most
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = (line.split() for line in lines if line.startswith(f"{name}:"))
    return next((int(parts[1]) * 1024 for parts in found), 0)
