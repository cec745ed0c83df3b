"""Asking something in a process of its own, which answers one question after the other until it is closed."""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock
from typing import Any


class HelperEndedError(Exception):
    """The process ended without an answer."""


@dataclass(slots=True)
class Helper:
    """A Python process that runs ``python -m module``, which calls `answer_all`.

    It is begun when it is first asked, shared by all threads, and ended with this one.
    """

    module: str
    _process: subprocess.Popen[bytes] | None = None
    _owner: int = 0
    _lock: Lock = field(default_factory=Lock)

    @property
    def is_running(self) -> bool:
        """Whether there is a process that waits for questions."""
        return self._process is not None

    def ask(self, question: Any) -> Any:
        """The answer to a question; both are pickled. An exception that is the answer is raised.

        Raises ``HelperEndedError`` where the process died.
        """
        with self._lock:
            answer = self._ask(question)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _ask(self, question: Any) -> Any:
        if self._process is None or self._owner != os.getpid():
            self._begin()
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            pickle.dump(question, process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            self.close()
            raise HelperEndedError(f"it ended with status {process.returncode}") from error

    def _begin(self) -> None:
        self._owner = os.getpid()
        atexit.register(self.close)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
            process.wait()


def answer_all(answer: Callable[[Any], Any], raised: tuple[type[Exception], ...]) -> None:
    """Answer questions from the standard input until there are no more; ``raised`` are answers, too."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            question = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            given = answer(question)
        except raised as error:
            given = error
        pickle.dump(given, out)
        out.flush()
