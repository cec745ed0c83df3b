"""Writing to the terminal, or to whatever stands in its place."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from regraft.cli.styled import plain_lines
from regraft.storage.stand_ins import NAMES, named

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from regraft.cli.progress import Mode, Tell

_UNBOUNDED = 10_000


@dataclass(frozen=True, slots=True)
class Output:
    """Where a command's words go: results to stdout, messages to stderr."""

    json: bool = False
    quiet: bool = False
    progress: Mode = "auto"
    begun: float = field(default_factory=time.perf_counter, compare=False)

    def text(self, text: str) -> None:
        """Write plain text to stdout."""
        _write(sys.stdout, text)

    def warn(self, text: str) -> None:
        """Write plain text to stderr."""
        _write(sys.stderr, text)

    def data(self, data: Mapping[str, Any], indent: int | None = 2) -> None:
        """Write one JSON document to stdout, with the versions of its form and of regraft, and the seconds so far."""
        import json

        from regraft import __version__
        from regraft.report import SCHEMA_VERSION

        seconds = round(time.perf_counter() - self.begun, 3)
        head = {"schema_version": SCHEMA_VERSION, "regraft": __version__, "seconds": seconds}
        document = {**head, **finite(data)}
        _write(sys.stdout, json.dumps(document, indent=indent, allow_nan=False) + "\n")

    def line(self, data: Mapping[str, Any]) -> None:
        """Write one JSON document of many, on a line of its own."""
        self.data(data, indent=None)

    def show(self, *parts: RenderableType, error: bool = False) -> None:
        """Write what Rich can render, one part below the other; without Rich where plain text is all that is wanted."""
        stream = sys.stderr if error else sys.stdout
        plain = None if _is_painted(stream) else plain_lines(parts, _UNBOUNDED)
        if plain is not None:
            _write(stream, "".join(line + "\n" for line in plain))
            return
        console = _console(stream)
        with console.capture() as captured:
            for part in parts:
                console.print(part)
        text = captured.get()
        if console.color_system is None:
            text = "".join(line.rstrip() + "\n" for line in text.split("\n")[:-1])
        _write(stream, text)

    @property
    def colored(self) -> bool:
        """Whether stdout takes colours."""
        return _has_colors(sys.stdout)

    @property
    def width(self) -> int:
        """How many columns stdout has; as many as it takes where it is no terminal."""
        return _console(sys.stdout).width if _is_painted(sys.stdout) else _UNBOUNDED

    @property
    def is_unbounded(self) -> bool:
        """Whether lines on stdout may be as long as they are: it is no terminal."""
        return not sys.stdout.isatty()

    @contextmanager
    def waiting(self, verb: str, source: Path | None = None) -> Iterator[Tell | None]:
        """Show on stderr how far some work is: as `progress` says, by default a bar on a terminal, else lines."""
        from regraft.cli import progress

        mode: progress.Mode = self.progress
        if mode == "auto":
            terminal = _has_colors(sys.stderr) and _is_terminal(sys.stderr)
            mode = "none" if self.quiet else "auto" if terminal and not self.json else "plain"
        if mode == "none":
            yield None
            return
        state = progress.State(verb, source)
        shown = (
            progress.bar(state, _console(sys.stderr))
            if mode == "auto"
            else progress.lines(state, mode, self.warn)
        )
        with shown as tell:
            tell(source.name if source is not None else "", 0, 0)
            yield tell


def log_to_stderr(*, verbose: bool, quiet: bool) -> None:
    """Let what the library logs go to stderr: warnings, and with ``verbose`` what was decided."""
    import logging

    class Printable(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return visible(super().format(record))

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Printable("%(levelname)s: %(message)s"))
    logger = logging.getLogger("regraft")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING)


def finite(data: Any) -> Any:
    """Plain data with the numbers that JSON does not have as text.

    >>> finite({"error": float("inf"), "ranks": [1, 0.5]})
    {'error': 'Infinity', 'ranks': [1, 0.5]}
    """
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    if isinstance(data, Mapping):
        return {name: finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return data


def visible(text: str) -> str:
    r"""Text with everything that doesn't print (control characters, say) escaped.

    >>> print(visible("a\x1b[31m\nb"))
    a\x1b[31m\nb
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _has_colors(stream: TextIO) -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    return _is_terminal(stream) or bool(os.environ.get("FORCE_COLOR"))


def _is_painted(stream: TextIO) -> bool:
    """Whether what is written there has colours, or is as wide as a terminal."""
    return stream.isatty() or _has_colors(stream)


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    colors = _has_colors(stream)
    return Console(
        file=stream,
        color_system="auto" if colors else None,
        force_terminal=True if colors else None,
        force_jupyter=False,  # what is asked for is the stream, not a notebook's cell
        width=None if stream.isatty() else _UNBOUNDED,
        markup=False,
        emoji=False,
        highlight=False,
    )


def _write(stream: TextIO, text: str) -> None:
    text = named(text) if NAMES else text
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BrokenPipeError:
        silence(stream)
    except OSError:
        silence(stream)
        raise


def silence(stream: TextIO) -> None:
    """Drop what is still buffered; else Python complains about it when it exits."""
    with suppress(OSError, ValueError):
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, stream.fileno())
        os.close(sink)
