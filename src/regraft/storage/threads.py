"""Threads that work together, and waits of theirs that end when the work does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType

_own = threading.local()
_LOOK = 0.5
"""After how many seconds of a wait is looked whether it goes on."""


def _stops() -> tuple[threading.Event, ...]:
    """What ends the waits of the calling thread."""
    return getattr(_own, "stops", ())


def pause(seconds: float) -> bool:
    """Wait; whether the thread may go on. The wait ends early, and it may not, once its work is stopped."""
    stops = _stops()
    if not stops:
        time.sleep(seconds)
        return True
    until = time.monotonic() + seconds
    while not any(stop.is_set() for stop in stops):
        left = until - time.monotonic()
        if left <= 0:
            return True
        stops[0].wait(min(left, _LOOK))
    return False


@contextmanager
def stopped_by(stop: threading.Event) -> Iterator[None]:
    """Let the calling thread's waits end with an event too, for as long as the block lasts."""
    before = _stops()
    _own.stops = (stop, *before)
    try:
        yield
    finally:
        _own.stops = before


class Pool(ThreadPoolExecutor):
    """Some threads; a context manager whose block, where it ends by an error, waits for none that waits."""

    def __init__(self, count: int, name: str) -> None:
        self.stop = threading.Event()
        stops = (self.stop, *_stops())
        super().__init__(count, name, initializer=setattr, initargs=(_own, "stops", stops))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.stop.set()
        self.shutdown(cancel_futures=kind is not None)
