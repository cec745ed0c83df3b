"""Writing to the terminal, or to whatever stands in its place."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from regraft.storage.stand_ins import named

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_UNBOUNDED = 10_000
_PATIENCE = 1.0
"""Seconds before progress is shown."""


@dataclass(frozen=True, slots=True)
class Output:
    """Where a command's words go: results to stdout, messages to stderr."""

    json: bool = False
    quiet: bool = False

    def text(self, text: str) -> None:
        """Write plain text to stdout."""
        _write(sys.stdout, text)

    def warn(self, text: str) -> None:
        """Write plain text to stderr."""
        _write(sys.stderr, text)

    def data(self, data: Mapping[str, Any], indent: int | None = 2) -> None:
        """Write one JSON document to stdout, with the version of what it looks like."""
        import json

        from regraft.report import SCHEMA_VERSION

        document = {"schema_version": SCHEMA_VERSION, **finite(data)}
        _write(sys.stdout, json.dumps(document, indent=indent, allow_nan=False) + "\n")

    def line(self, data: Mapping[str, Any]) -> None:
        """Write one JSON document of many, on a line of its own."""
        self.data(data, indent=None)

    def show(self, *parts: RenderableType, error: bool = False) -> None:
        """Write what Rich can render, one part below the other."""
        stream = sys.stderr if error else sys.stdout
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
        return _console(sys.stdout).width

    @contextmanager
    def waiting(
        self, verb: str, source: Path | None = None
    ) -> Iterator[Callable[[str, int, int], None] | None]:
        """Show progress on stderr, on a terminal only, once the work has taken a while.

        Work on a checkpoint is counted in bytes, other work in pieces.
        """
        if self.json or self.quiet or not _has_colors(sys.stderr) or not _is_terminal(sys.stderr):
            yield None
            return
        from threading import Timer

        from rich import progress as rich

        from regraft.checkpoints.source import is_checkpoint

        amounts: list[rich.ProgressColumn] = [rich.MofNCompleteColumn()]
        if source is not None and is_checkpoint(source):
            amounts = [rich.DownloadColumn(), rich.TransferSpeedColumn()]
        bar = rich.Progress(
            rich.SpinnerColumn("line"),
            rich.TextColumn(verb + " {task.description}", markup=False),
            rich.BarColumn(),
            *amounts,
            rich.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=_console(sys.stderr),
            transient=True,
        )
        task = bar.add_task("", total=None)

        def tell(name: str, done: int, total: int) -> None:
            bar.update(
                task,
                description=visible(name),
                completed=done,
                total=total if total > 1 else None,
            )

        timer = Timer(_PATIENCE, bar.start)
        timer.daemon = True
        timer.start()
        try:
            yield tell
        finally:
            timer.cancel()
            timer.join()
            bar.stop()


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


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    colors = _has_colors(stream)
    return Console(
        file=stream,
        color_system="auto" if colors else None,
        force_terminal=True if colors else None,
        width=None if stream.isatty() else _UNBOUNDED,
        markup=False,
        emoji=False,
        highlight=False,
    )


def _write(stream: TextIO, text: str) -> None:
    text = named(text)
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
