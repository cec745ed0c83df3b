"""One load at a time into one model: PEFT changes a model's layers in many steps, and undoing compares with before."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

_locks: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_guard = threading.Lock()
_other = threading.RLock()
"""For what cannot be referred to weakly."""


@contextmanager
def alone_with(model: Any) -> Iterator[None]:
    """Keep other threads from loading into a model, or into what holds it, meanwhile.

    A thread may enter it again. Of a holder and the model in it, the holder is entered first.
    """
    with _guard:
        try:
            lock = _locks.setdefault(model, threading.RLock())
        except TypeError:
            lock = _other
    with lock:
        yield
