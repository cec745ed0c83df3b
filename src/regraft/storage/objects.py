"""Objects in stores beyond this machine: what a store has to do, and asking it until it answers or cannot.

A store is asked for whole answers only: bytes of one version of one object. Whether an answer is whole and of that
version is checked here, for every answer and whatever the store's library says of it.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from regraft.errors import BadInputError, Finding
from regraft.storage.threads import pause

_T = TypeVar("_T")
TRIES = 6
"""How often one request is sent at most."""
PAUSE = 0.1
"""Seconds before the second try; each further one waits about twice as long."""
_STALLED: dict[str, tuple[float, StoreError]] = {}
"""Addresses that were given up because nothing came, and when: who asks next need not wait as long again."""
_LONGEST = 5.0
PATIENCE = 90.0
"""Seconds of tries without an answer after which there is no other one: a server that stalls lets each run out."""
LONGEST_ASKED = 300.0
"""The most seconds that are waited because a store asks for it; the hub counts requests by five minutes."""
_SMALL = 1 << 24

Trouble = Literal[
    "missing", "forbidden", "changed", "no-ranges", "exists", "transient", "busy", "unfit"
]
"""Why a store gave no answer; only what is ``transient`` or ``busy`` is asked for again."""
BUSY = (429, 503)
"""The statuses of answers that may say when to ask again."""


class StoreError(Exception):
    """A store gave no answer."""

    def __init__(self, trouble: Trouble, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.trouble, self.message = trouble, message
        self.wait = wait
        """The seconds after which it wants to be asked again, where it said so."""
        self.tries = 1
        """How often it was asked before it was given up."""


def asked_wait(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """The seconds after which a busy server wants to be asked again, by the headers of its answer.

    It may say so in seconds or as a date (RFC 9110, 10.2.3), which is compared with the answer's own; or, as the hub
    does, in seconds until its count of requests begins anew.

    >>> asked_wait({"Retry-After": "7"})
    7.0
    >>> asked_wait({"RateLimit": '"api";r=0;t=120'})
    120.0
    """
    named = {name.lower(): value.strip() for name, value in headers.items()}
    after = named.get("retry-after", "")
    if re.fullmatch(r"\d{1,9}(\.\d+)?", after):
        return float(after)
    until = _seconds_of(after)
    if until is not None:
        begun = _seconds_of(named.get("date", ""))
        begun = begun if begun is not None else time.time() if now is None else now
        return max(until - begun, 0.0)
    reset = re.search(r";\s*t=(\d{1,9})\b", named.get("ratelimit", ""))
    return float(reset[1]) if reset is not None else None


def _seconds_of(date: str) -> float | None:
    """An HTTP date in seconds since 1970."""
    if not date:
        return None
    from email.utils import parsedate_to_datetime  # slow to import, and seldom wanted

    try:
        return parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


@dataclass(frozen=True, slots=True)
class Found:
    """An object as it was when it was first seen."""

    key: str
    """Relative to the store."""
    size: int
    """In bytes."""
    version: str
    """Its ETag, or what else tells it from another of the same name."""


class Store(Protocol):
    """One folder of objects. Every method is one request, and raises `StoreError`."""

    url: str
    """Without a slash at the end."""
    login: str = "log in the way that the store's own tools do (environment, config files), or ask for access"
    """What somebody does whom the store does not let in."""

    def read(self, key: str, start: int, end: int) -> tuple[Found, Any]:
        """Bytes of an object, and what it is now; fewer where it ends before ``end``, none where it is empty.

        With a negative ``start`` the last bytes.
        """

    def listed(self) -> list[Found] | None:
        """Everything below the folder; ``None`` where the store cannot tell."""

    def put(self, key: str, data: bytes, *, create: bool) -> None:
        """Write a small object as a whole; with ``create`` only where there is none."""

    def stream(self, key: str, parts: Iterator[Any], size: int) -> None:
        """Write an object from parts in order; it can be seen once all are there, and not if one raises."""

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""

    def busy_for(self, key: str) -> float | None:
        """The seconds for which a store, which said that it is busy, wants to be left alone.

        One request, for what the library that speaks to it does not tell; ``None`` where it does not say. Raises
        nothing.
        """
        return None


@dataclass(slots=True)
class Traffic:
    """What went over the network."""

    requests: int = 0
    """Those that read; of those that write, one for each object."""
    read: int = 0
    """Bytes."""
    written: int = 0
    retries: int = 0
    waited: float = 0.0
    """Seconds, of all threads together, because the store asked for it."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(
        self,
        requests: int = 0,
        read: int = 0,
        written: int = 0,
        retries: int = 0,
        waited: float = 0.0,
    ) -> None:
        """Count something; any thread may."""
        with self._lock:
            self.requests += requests
            self.read += read
            self.written += written
            self.retries += retries
            self.waited += waited

    def to_dict(self) -> dict[str, int]:
        """Plain data."""
        names = ("requests", "read", "written", "retries", "waited")
        return {name: round(getattr(self, name)) for name in names}


@dataclass(frozen=True, slots=True, eq=False)
class Client:
    """A store that is asked again where that may help, and whose traffic is counted.

    Every method raises ``BadInputError`` where no answer can be had.
    """

    store: Store
    traffic: Traffic = field(default_factory=Traffic)

    def where(self, key: str) -> str:
        """An object's address."""
        return f"{self.store.url}/{key}" if key else self.store.url

    def first(self, key: str, count: int) -> tuple[Found, memoryview] | None:
        """The first bytes of an object, and what it is; ``None`` where it is not there."""

        def once() -> tuple[Found, Any]:
            found, data = self.store.read(key, 0, count)
            if len(data) != min(count, found.size):
                message = f"{len(data)} of {min(count, found.size)} bytes came"
                raise StoreError("transient", message)
            return found, data

        try:
            found, data = self.ask(key, once)
        except StoreError as error:
            if error.trouble == "missing":
                return None
            raise self.failed(key, error) from None
        return found, self._counted(data)

    def read(self, found: Found, start: int, end: int) -> memoryview:
        """Bytes of an object that was seen before, exactly those; of one that is still the same."""

        def once() -> Any:
            now, data = self.store.read(found.key, start, end)
            if now != found:
                how = "another version" if now.size == found.size else f"{now.size} bytes"
                raise StoreError("changed", f"it is {how} now, and was {found.size} bytes")
            if len(data) != end - start:
                raise StoreError("transient", f"{len(data)} of {end - start} bytes came")
            return data

        try:
            return self._counted(self.ask(found.key, once))
        except StoreError as error:
            raise self.failed(found.key, error) from None

    def listed(self) -> list[Found] | None:
        """Everything below the folder; ``None`` where the store cannot tell."""
        try:
            return self.ask("", self.store.listed)
        except StoreError as error:
            raise self.failed("", error) from None

    def put(self, key: str, data: bytes, *, create: bool = False) -> None:
        """Write a small object as a whole; with ``create`` only where there is none."""
        try:
            self.ask(key, lambda: self.store.put(key, data, create=create))
        except StoreError as error:
            # A put whose answer was lost is sent again, and finds what it wrote itself.
            if error.trouble != "exists" or not self._holds(key, data):
                raise self.failed(key, error) from None
        self.traffic.add(written=len(data))

    def _holds(self, key: str, data: bytes) -> bool:
        found = self.first(key, len(data) + 1)
        return found is not None and found[1] == data

    def create(self, key: str, data: bytes) -> bytes:
        """Write a small object where there is none; what is there then, which somebody else may have written."""
        try:
            self.ask(key, lambda: self.store.put(key, data, create=True))
        except StoreError as error:
            if error.trouble != "exists":
                raise self.failed(key, error) from None
            found = self.first(key, _SMALL)
            return data if found is None else bytes(found[1])
        self.traffic.add(written=len(data))
        return data

    def stream(self, key: str, parts: Iterator[Any], size: int) -> None:
        """Write an object from parts in order. Its parts are sent again by the store's library."""
        self.traffic.add(requests=1)
        try:
            self.store.stream(key, parts, size)
        except StoreError as error:
            raise self.failed(key, error) from None
        self.traffic.add(written=size)

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        try:
            self.ask(key, lambda: self.store.delete(key))
        except StoreError as error:
            if error.trouble != "missing":
                raise self.failed(key, error) from None

    def _counted(self, data: Any) -> memoryview:
        view = memoryview(data)
        self.traffic.add(read=view.nbytes)
        return view

    def ask(self, key: str, once: Callable[[], _T]) -> _T:
        """Ask until there is an answer, or none can be had; each try is counted.

        A store that is busy is left alone for as long as it asks. Raises `StoreError`.
        """
        address, tried = self.where(key), 0.0
        if address in _STALLED and time.monotonic() - _STALLED[address][0] < PATIENCE:
            raise _STALLED[address][1]
        for attempt in range(TRIES):
            begin = time.monotonic()
            self.traffic.add(requests=1, retries=int(attempt > 0))
            try:
                return once()
            except StoreError as error:
                error.tries = attempt + 1
                tried += time.monotonic() - begin
                last = attempt + 1 == TRIES or tried > PATIENCE
                if error.trouble not in ("transient", "busy") or last:
                    if tried > PATIENCE:
                        _STALLED[address] = time.monotonic(), error
                    raise
                asked = self._asked_wait(key, error)
                # Never all threads at the same moment.
                own = min(PAUSE * 2**attempt, _LONGEST) * (0.5 + random.random())
                if not pause(asked + own):
                    raise
                self.traffic.add(waited=asked)
        raise AssertionError("a last try returns or raises")

    def _asked_wait(self, key: str, error: StoreError) -> float:
        """The seconds for which a store asks to be left alone; 0 where it does not.

        Raises `StoreError` where that is longer than anybody should wait without knowing.
        """
        asked = error.wait
        if asked is None and error.trouble == "busy":
            self.traffic.add(requests=1)
            asked = self.store.busy_for(key)
        if asked is not None and asked > LONGEST_ASKED:
            raise StoreError("busy", error.message, asked)
        return asked or 0.0

    def failed(self, key: str, error: StoreError) -> BadInputError:
        """The error for a request that was given up."""
        where = self.where(key)
        if error.trouble == "changed":
            message = f"the file changed while it was read: {error.message}"
            fix = "run again when nothing else writes to it"
            return BadInputError(Finding("file-changed", message, where=where, fix=fix))
        if error.trouble == "missing":
            nowhere = re.search("NoSuchBucket|ContainerNotFound", error.message)
            message = "there is no such bucket" if nowhere else "there is nothing at it"
            fix = "check the address" + (", or make the bucket first" if nowhere else "")
            return BadInputError(Finding("missing-file", message, where=where, fix=fix))
        if error.trouble == "forbidden":
            message = f"the store lets nobody in without the right credentials: {error.message}"
            return BadInputError(
                Finding("store-denied", message, where=where, fix=self.store.login)
            )
        if error.trouble == "no-ranges":
            message = "the server sends whole files only, where a part was asked for"
            fix = "download the files, and give the folder; or use a server that answers Range"
            return BadInputError(Finding("no-ranges", message, where=where, fix=fix))
        if error.trouble == "exists":
            fix = "pass --overwrite, or choose another place"
            return BadInputError(
                Finding("destination-exists", "it exists already", where=where, fix=fix)
            )
        if error.trouble == "unfit":
            return BadInputError(Finding("bad-address", error.message, where=where))
        if error.wait is not None and error.wait > LONGEST_ASKED:
            message = (
                f"the store is busy, and asks to be left alone for {error.wait:.0f} s, longer than the"
                f" {LONGEST_ASKED:.0f} s that are waited: {error.message}"
            )
            fix = "run it again after that time, with fewer --jobs where it counts requests"
            return BadInputError(Finding("store-failed", message, where=where, fix=fix))
        message = f"no answer in {error.tries} tries: {error.message}"
        fix = "check the network and the address, and run it again"
        return BadInputError(Finding("store-failed", message, where=where, fix=fix))
