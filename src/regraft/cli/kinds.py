"""The kinds of errors: how programs know them, what people read, and the exit status."""

from __future__ import annotations

from dataclasses import dataclass

from regraft.errors import (
    AmbiguousError,
    BadInputError,
    NotEqualError,
    RefusedError,
    RegraftError,
    UnmatchedKeysError,
)

DONE, BAD_INPUT, USAGE, REFUSED, NO, BUG, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 4, 70, 130, 143


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of error."""

    name: str
    title: str
    status: int


INTERNAL = Kind("internal", "a bug in regraft", BUG)
_KINDS: tuple[tuple[type[RegraftError], Kind], ...] = (
    (UnmatchedKeysError, Kind("unmatched-keys", "nothing explains these keys", BAD_INPUT)),
    (AmbiguousError, Kind("ambiguous", "more than one reading fits", BAD_INPUT)),
    (BadInputError, Kind("bad-input", "bad input", BAD_INPUT)),
    (NotEqualError, Kind("not-equal", "not equal", NO)),
    (RefusedError, Kind("refused", "refused, because there is no exact image", REFUSED)),
)


def kind_of(error: RegraftError) -> Kind:
    """The kind of an error."""
    return next((kind for of, kind in _KINDS if isinstance(error, of)), INTERNAL)
