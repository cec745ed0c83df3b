"""Regular expressions from files of unknown origin, which run in bounded time.

A config names modules by expressions, and one like ``(a+)+b`` would run for years. Python's ``re`` has no way to stop.
The ``regex`` package has, and reads the same language; the few things that it reads otherwise are spelled so that it
reads them as ``re`` does. Genuine files have lookaheads, so engines without backtracking are no choice.
"""

from __future__ import annotations

import re
import threading
import time
import warnings
from functools import lru_cache
from typing import Any

import regex
from msgspec import Struct

from regraft.errors import BadInputError, Finding

SECONDS = 2.0
"""How long all expressions of one file may run beyond what a sound one needs."""
_QUICK = 0.0001
"""What one match may take, in seconds, without being counted: a sound one takes some microseconds."""

_COUNTED = re.compile(r"\{(?:[0-9]+,?[0-9]*|,[0-9]*)\}")
"""What ``re`` reads as a number of times; any other brace is text."""
_INVOLVED = re.compile(r"\)[*+{]|\(\?P=|\\[1-9]")
"""What makes an expression slow: a repeated group, or a reference to one."""
_SHORT = 256


class _Spent(Struct):
    """How long the expressions of the file that is being read have run, on this thread."""

    seconds: float = 0.0
    where: str | None = None


class _Local(threading.local):
    def __init__(self) -> None:
        self.spent = _Spent()


_local = _Local()


def start_file(where: str) -> None:
    """Begin to count anew, for another file; errors name it."""
    _local.spent = _Spent(where=where)


class Expression(Struct, frozen=True, eq=False):
    """One expression, with the meaning that it has for ``re``.

    >>> expression("(?!.*mlp).*q_proj", "target_modules").fullmatch("layers.0.q_proj") is not None
    True
    """

    pattern: str
    field: str
    """The config's field that it stands in; errors name it."""
    is_simple: bool
    """Whether ``re`` is quick with it, if the text is short."""
    _fast: re.Pattern[str]
    _slow: Any

    def match(self, text: str) -> Any:
        """What ``re.match`` finds, or ``None``.

        Raises ``BadInputError`` where it takes too long.
        """
        return self._run("match", text)

    def fullmatch(self, text: str) -> Any:
        """What ``re.fullmatch`` finds; raises as `match` does."""
        return self._run("fullmatch", text)

    def search(self, text: str) -> Any:
        """What ``re.search`` finds; raises as `match` does."""
        return self._run("search", text)

    def _run(self, how: str, text: str) -> Any:
        if self.is_simple and len(text) <= _SHORT:
            return getattr(self._fast, how)(text)
        spent = _local.spent
        left = SECONDS - spent.seconds
        run = getattr(self._slow, how)
        try:
            if left <= 0:
                raise TimeoutError
            begin = time.perf_counter()
            found = run(text, timeout=left)
            if time.perf_counter() - begin > _QUICK:
                # On a busy machine it may have waited only, so it runs again and its own time is counted.
                begin = time.thread_time()
                run(text, timeout=left)
                spent.seconds += max(time.thread_time() - begin - _QUICK, 0.0)
        except TimeoutError:
            spent.seconds = SECONDS
            raise BadInputError(too_slow(self)) from None
        return found


def too_slow(found: Expression) -> Finding:
    """That an expression takes too long."""
    return Finding(
        "slow-pattern",
        f"the regular expression '{found.pattern[:200]}' takes more than {SECONDS:g} seconds, as one does that"
        " repeats what is repeated already",
        where=_local.spent.where,
        key=found.field,
        fix="name the modules one by one, or write it without a repetition inside another",
    )


@lru_cache(maxsize=65536)
def expression(pattern: str, field: str) -> Expression:
    """The expression of a pattern, which stands in a config's ``field``.

    Raises ``BadInputError`` for what is no pattern for ``re``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what other releases may read otherwise
            fast, slow = re.compile(pattern), regex.compile(spell(pattern))
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise BadInputError(
            Finding(
                "config",
                f"'{pattern[:200]}' is no regular expression: {error or type(error).__name__}",
                where=_local.spent.where,
                key=field,
                fix="correct it, or save the adapter again",
            )
        ) from None
    return Expression(pattern, field, _is_simple(pattern), fast, slow)


def is_expression(value: object) -> bool:
    """Whether a value is a pattern for ``re``."""
    try:
        return isinstance(value, str) and expression(value, "") is not None
    except BadInputError:
        return False


def _is_simple(pattern: str) -> bool:
    """Whether an expression repeats twice at most, and neither groups nor what it found before."""
    repeats = sum(pattern.count(mark) for mark in "*+{")
    return repeats <= 2 and _INVOLVED.search(pattern) is None


def spell(pattern: str) -> str:
    r"""A pattern that ``regex`` reads as ``re`` reads this one.

    A brace that counts nothing is text, and would make a fuzzy match; a bracket inside of a set is text, and would
    begin a named class.

    >>> print(spell("a{e<=1}[[:alpha:]]"))
    a\{e<=1}[\[:alpha:]]
    """
    made: list[str] = []
    at, in_set, begun = 0, False, 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            made.append(pattern[at : at + 2])
            at += 2
            continue
        if in_set:
            if char == "]" and at > begun:
                in_set = False
            made.append("\\[" if char == "[" else char)
        elif char == "[":
            in_set = True
            made.append(char)
            if pattern[at + 1 : at + 2] == "^":
                made.append("^")
                at += 1
            begun = at + 1
        elif char == "{":
            counted = _COUNTED.match(pattern, at)
            if counted is None:
                made.append("\\{")
            else:
                made.append("{0,}" if counted[0] == "{,}" else counted[0])
                at += len(counted[0]) - 1
        else:
            made.append(char)
        at += 1
    return "".join(made)
