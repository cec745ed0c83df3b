"""What somebody said that holds for all of a call, in this thread: which rule books, which model, which way.

It is asked deep inside, where books are looked up, a config is read, or a way is chosen, and belongs to none of the
values that are handed on until there. So it is one value beside them, and not one for each that asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from regraft.rules.book import Book


class Said(Struct, frozen=True, kw_only=True):
    """What was said; what is empty was not."""

    books: tuple[Book, ...] = ()
    """The books that stand in for the library."""
    family: str | None = None
    """The model type whose books alone may speak."""
    architecture: str | None = None
    """The class that every config is taken for, and of none for what it says."""
    via: tuple[str, ...] = ()
    """Layouts on the way: of several ways that are as short, those are taken that go over them."""


_SAID: ContextVar[Said] = ContextVar("said", default=Said())  # noqa: B039 (it is frozen)


def said() -> Said:
    """What holds now."""
    return _SAID.get()


@contextmanager
def saying(
    *,
    books: Sequence[Book] = (),
    family: str | None = None,
    architecture: str | None = None,
    via: Sequence[str] = (),
) -> Iterator[None]:
    """Let something hold as long as this lasts; what is empty leaves what was said before.

    >>> with saying(family="mixtral"), saying(via=["transformers-v5"]):
    ...     print(said().family, said().via)
    mixtral ('transformers-v5',)
    """
    before = _SAID.get()
    token = _SAID.set(
        Said(
            books=tuple(books) or before.books,
            family=family or before.family,
            architecture=architecture or before.architecture,
            via=tuple(via) or before.via,
        )
    )
    try:
        yield
    finally:
        _SAID.reset(token)
