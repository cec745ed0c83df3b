"""How many workers write a result, and what their buffers take."""

from __future__ import annotations

import os

from regraft.errors import BadInputError, Finding

_MOST_JOBS = 256
"""What the threads' stacks, the units in flight and the report take."""
_BUFFERS = 3 << 20
"""Bytes of buffers, of all workers together."""
_SMALLEST = 1 << 18


def buffer_size(jobs: int) -> int:
    """Bytes of each of a worker's two buffers."""
    return max(_SMALLEST, _BUFFERS // 2 // jobs)


def buffers(jobs: int, *, streams: bool) -> int:
    """Bytes that the workers' buffers take."""
    if not streams:
        return jobs * 2 * buffer_size(jobs)
    from regraft.checkpoints.stream import memory_of

    return memory_of(jobs)


def count_jobs(jobs: int | None) -> int:
    """How many workers there are; by default one for each core, up to 16.

    Raises ``BadInputError`` for a number that cannot be.
    """
    if jobs is None:
        return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4, 16)
    if jobs < 1:
        raise BadInputError(Finding("bad-jobs", f"at least one worker is needed, not {jobs}"))
    if jobs > _MOST_JOBS:
        message = f"at most {_MOST_JOBS} workers can be had, not {jobs}"
        raise BadInputError(Finding("bad-jobs", message, fix="leave --jobs out, or give fewer"))
    return jobs
