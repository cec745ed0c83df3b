"""Replacing attributes of other libraries for a while, and putting them back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from regraft.errors import Finding, RefusedError


@dataclass(frozen=True, slots=True)
class Patch:
    """One attribute of a module or class, and what makes the replacement from the original."""

    owner: Any
    name: str
    make: Callable[[Any], Any]

    @property
    def label(self) -> str:
        """The attribute for people."""
        return f"{getattr(self.owner, '__module__', '')}.{self.owner.__name__}.{self.name}".lstrip(
            "."
        )

    def current(self) -> Any:
        """What stands there now, a class method as such."""
        return vars(self.owner).get(self.name)


@dataclass(slots=True)
class Patches:
    """Patches that go on together with the first user and come off with the last; any thread may be one."""

    patches: Sequence[Patch]
    users: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _set: list[tuple[Patch, Any, Any]] = field(default_factory=list)
    """Each patch with the original and the replacement."""

    def add_user(self) -> None:
        """Put the patches on, if this is the first user."""
        with self._lock:
            self.users += 1
            if self.users > 1:
                return
            for patch in self.patches:
                original = patch.current()
                made = patch.make(original)
                setattr(patch.owner, patch.name, made)
                self._set.append((patch, original, made))

    def drop_user(self) -> None:
        """Take the patches off, if this was the last user.

        Raises ``RefusedError`` where another has replaced an attribute since; then all stays as it is.
        """
        with self._lock:
            if self.users == 0:
                return
            if self.users == 1:
                odd = [patch for patch, _, made in self._set if patch.current() is not made]
                if odd:
                    raise RefusedError(
                        Finding(
                            "hooked-over",
                            "another library replaced it since, so it cannot be put back as it was",
                            key=patch.label,
                            fix="undo what that library did first",
                        )
                        for patch in odd
                    )
                for patch, original, _ in self._set:
                    setattr(patch.owner, patch.name, original)
                self._set.clear()
            self.users -= 1
