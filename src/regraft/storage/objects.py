"""Objects in stores beyond this machine: what a store has to do, and asking it until it answers or cannot.

A store is asked for whole answers only: bytes of one version of one object. Whether an answer is whole and of that
version is checked here, for every answer and whatever the store's library says of it.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from regraft.errors import BadInputError, Finding

_T = TypeVar("_T")
TRIES = 6
"""How often one request is sent at most."""
PAUSE = 0.1
"""Seconds before the second try; each further one waits about twice as long."""
_LONGEST = 5.0
_SMALL = 1 << 24

Trouble = Literal["missing", "forbidden", "changed", "no-ranges", "exists", "transient", "unfit"]
"""Why a store gave no answer; only what is ``transient`` is asked for again."""


class StoreError(Exception):
    """A store gave no answer."""

    def __init__(self, trouble: Trouble, message: str) -> None:
        super().__init__(message)
        self.trouble, self.message = trouble, message


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


@dataclass(slots=True)
class Traffic:
    """What went over the network."""

    requests: int = 0
    """Those that read; of those that write, one for each object."""
    read: int = 0
    """Bytes."""
    written: int = 0
    retries: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, requests: int = 0, read: int = 0, written: int = 0, retries: int = 0) -> None:
        """Count something; any thread may."""
        with self._lock:
            self.requests += requests
            self.read += read
            self.written += written
            self.retries += retries

    def to_dict(self) -> dict[str, int]:
        """Plain data."""
        names = ("requests", "read", "written", "retries")
        return {name: getattr(self, name) for name in names}


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
            raise self.failed(key, error) from None
        self.traffic.add(written=len(data))

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

        Raises `StoreError`.
        """
        for attempt in range(TRIES):
            self.traffic.add(requests=1, retries=int(attempt > 0))
            try:
                return once()
            except StoreError as error:
                if error.trouble != "transient" or attempt + 1 == TRIES:
                    raise
            time.sleep(min(PAUSE * 2**attempt, _LONGEST) * (0.5 + random.random()))
        raise AssertionError("a last try returns or raises")

    def failed(self, key: str, error: StoreError) -> BadInputError:
        """The error for a request that was given up."""
        where = self.where(key)
        if error.trouble == "changed":
            message = f"the file changed while it was read: {error.message}"
            fix = "run again when nothing else writes to it"
            return BadInputError(Finding("file-changed", message, where=where, fix=fix))
        if error.trouble == "missing":
            fix = "check the address"
            return BadInputError(
                Finding("missing-file", "there is nothing at it", where=where, fix=fix)
            )
        if error.trouble == "forbidden":
            message = f"the store lets nobody in without the right credentials: {error.message}"
            fix = (
                "log in the way that the store's own tools do (aws configure, gcloud auth, az login,"
                " hf auth login), or ask for access"
            )
            return BadInputError(Finding("store-denied", message, where=where, fix=fix))
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
        message = f"no answer in {TRIES} tries: {error.message}"
        fix = "check the network and the address, and run it again"
        return BadInputError(Finding("store-failed", message, where=where, fix=fix))
