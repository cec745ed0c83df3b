"""Asking something in a process of its own, which answers one question after the other until it is closed.

The process imports torch, transformers and PEFT, and it is told of files of unknown origin. So it starts isolated
(``python -I``): no folder of the caller's is on its import path that is there only because the caller stands in it,
and it cannot open a connection. It has a time limit, and what it writes to its standard error is kept for the report
of its death.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from threading import Lock, Timer
from typing import IO, Any

from msgspec import Struct, field

from regraft.errors import RegraftError
from regraft.import_path import import_path

SECONDS = 600.0
"""How long one answer may take, unless ``REGRAFT_HELPER_SECONDS`` says another number."""
_SHOWN_LINES, _SHOWN_BYTES = 5, 4000
_PACKAGE = Path(__file__).resolve().parents[1]

# The package is loaded from its own file: where it stands need not be on the import path.
_START = """\
import json, sys
package, module, function, path = sys.argv[1:]
sys.path[:] = json.loads(path)
from importlib import import_module, util
spec = util.spec_from_file_location(
    "regraft", package + "/__init__.py", submodule_search_locations=[package])
sys.modules["regraft"] = util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["regraft"])
import_module("regraft.bridges.helper").answer_all(module, function)
"""

_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
}
_CONNECTING = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")


class HelperEndedError(Exception):
    """The process ended without an answer."""


class Helper(Struct):
    """A Python process that answers with ``function`` of ``module``.

    It is begun when it is first asked, shared by all threads, and ended with this one.
    """

    module: str
    function: str
    _process: subprocess.Popen[bytes] | None = None
    _said: IO[bytes] | None = None
    _owner: int = 0
    _lock: Lock = field(default_factory=Lock)

    @property
    def is_running(self) -> bool:
        """Whether there is a process that waits for questions."""
        return self._process is not None

    def ask(self, question: Any) -> Any:
        """The answer to a question; both are pickled. An exception that is the answer is raised.

        Raises ``HelperEndedError`` where the process died or took too long.
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
        seconds = _limit()
        late: list[bool] = []

        def stop() -> None:
            late.append(True)
            process.kill()

        timer = Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            pickle.dump(question, process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            said = self._last_words()
            self.close()
            how = (
                f"it had no answer after {seconds:g} seconds"
                if late
                else f"it ended with status {process.returncode}"
            )
            raise HelperEndedError(how + said) from error
        except BaseException:
            # Between question and answer, nobody would know whose answer comes next.
            process.kill()
            self.close()
            raise
        finally:
            timer.cancel()

    def _begin(self) -> None:
        self._owner = os.getpid()
        atexit.register(self.close)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        path = json.dumps(import_path())
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _START, str(_PACKAGE), self.module, self.function, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, **_OFFLINE},
        )

    def _last_words(self) -> str:
        """The last lines that the process wrote to its standard error."""
        process = self._process
        if process is not None:
            # Its pipe is closed or broken; it is about to end, and may still be writing why.
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
        if self._said is None:
            return ""
        size = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(size - _SHOWN_BYTES, 0))
        lines = self._said.read(_SHOWN_BYTES).decode(errors="replace").splitlines()
        lines = [line.strip() for line in lines if line.strip()][-_SHOWN_LINES:]
        return f"; its last words: {' | '.join(lines)}" if lines else ""

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        said, self._said = self._said, None
        if said is not None:
            said.close()
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        if self._owner != os.getpid():
            return  # a fork's copy: the process belongs to the parent
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answer_all(module: str, function: str) -> None:
    """Answer questions from the standard input until there are no more; regraft's errors are answers, too."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.addaudithook(_stay_offline)
    answer = getattr(import_module(module), function)
    while True:
        try:
            question = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            given = answer(question)
        except RegraftError as error:
            given = error
        pickle.dump(given, out)
        out.flush()


def _stay_offline(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _CONNECTING:
        raise OSError(f"regraft's helper does not use the network ({event})")


def _limit() -> float:
    try:
        seconds = float(os.environ["REGRAFT_HELPER_SECONDS"])
    except (KeyError, ValueError):
        return SECONDS
    return seconds if seconds > 0 else SECONDS
