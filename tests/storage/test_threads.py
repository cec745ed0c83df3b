"""Waits that end when the work does."""

import threading
import time

import pytest

from regraft.storage.threads import Pool, pause, stopped_by


def test_a_wait_of_its_own_is_waited():
    assert pause(0.001)


def test_an_error_ends_all_waits():
    begun, went_on = time.monotonic(), []

    def work():
        with Pool(1, "inner") as inner:
            inner.submit(lambda: went_on.append(pause(60))).result()

    with pytest.raises(KeyboardInterrupt), Pool(2, "outer") as outer:
        outer.submit(work)
        outer.submit(lambda: went_on.append(pause(60)))
        raise KeyboardInterrupt
    assert time.monotonic() - begun < 5
    assert not any(went_on)


def test_a_wait_ends_with_an_event():
    stop = threading.Event()
    with stopped_by(stop):
        assert pause(0.001)
        stop.set()
        assert not pause(60)
    assert pause(0.001)
