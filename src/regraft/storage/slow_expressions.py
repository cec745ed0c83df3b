"""Regular expressions that are quick for `regraft.storage.expressions`, but not for ``re``, which PEFT uses.

The ``regex`` package sees that ``(([a-z.])+)+X`` fits nothing without an X, and answers at once; ``re`` runs for years.
A file with such a pattern would hang whatever loads it, a helper of regraft's included, so ``re`` tries it first, on
the adapter's own names, in a process that can be ended.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable
from functools import lru_cache

from regraft.errors import Finding
from regraft.storage.expressions import SECONDS, expression, too_slow

_MARGIN = 30.0
"""Seconds by the clock beyond the CPU's, for a process that has to wait on a busy machine."""

_TRY = """\
import json, math, re, sys, time
patterns, texts, seconds = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    end = math.ceil(time.process_time() + seconds)
    if hard == resource.RLIM_INFINITY or end < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (end, hard))
except ImportError:
    pass
for number, pattern in enumerate(patterns):
    print(number, flush=True)
    found = re.compile(pattern)
    for text in texts:
        found.fullmatch(text)
print("done", flush=True)
"""


def find_slow(patterns: Iterable[tuple[str, str]], names: Collection[str]) -> list[Finding]:
    """The first of a config's patterns that ``re`` cannot run over the names in time, if there is one.

    ``patterns`` are pairs of a field and a sound pattern. Most are so simple that nothing is tried.
    """
    wanted = [(field, p) for field, p in patterns if not expression(p, field).is_simple]
    if not wanted:
        return []
    # Numbers say nothing here, and layers and experts have the same names but for them.
    texts = tuple(sorted({re.sub(r"\d+", "0", name) for name in names}))
    number = _first_slow(tuple(pattern for _, pattern in wanted), texts)
    if number is None:
        return []
    field, pattern = wanted[number]
    return [too_slow(expression(pattern, field))]


@lru_cache(maxsize=256)
def _first_slow(patterns: tuple[str, ...], texts: tuple[str, ...]) -> int | None:
    """The number of the pattern at which a process of its own ran out of time."""
    # Neither the current folder nor installed packages are on its import path.
    command = [sys.executable, "-I", "-S", "-c", _TRY]
    given = json.dumps([patterns, texts, SECONDS])
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=SECONDS + _MARGIN
        )
        said = done.stdout
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
    begun = said.split()
    return None if not begun or begun[-1] == "done" else int(begun[-1])
