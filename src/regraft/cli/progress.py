"""How far a command is: a bar on a terminal, else a line every ten seconds, or lines of JSON, on stderr."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Literal

from msgspec import Struct, field

if TYPE_CHECKING:
    from rich.console import Console

Mode = Literal["auto", "plain", "json", "none"]
Tell = Callable[[str, int, int], None]
"""Told a name, how much is done, and how much there is: bytes of a checkpoint, else pieces."""

_PATIENCE = 1.0
"""Seconds before a bar is shown."""
_EVERY = {"plain": 10.0, "json": 1.0}
"""Seconds between lines."""


class State(Struct):
    """How far one piece of work is."""

    verb: str
    source: Path | None = None
    """What is worked on."""
    name: str = ""
    done: int = 0
    total: int = 0
    begun: float = field(default_factory=time.monotonic)

    def tell(self, name: str, done: int, total: int) -> None:
        """Note how far it is."""
        self.name, self.done, self.total = name, done, total

    def as_text(self) -> str:
        """The state in one line.

        >>> State("converting", None, "out", 3, 12, time.monotonic() - 12).as_text()
        'converting out: 3 of 12 (25 %), 12 s'
        """
        from regraft.cli.output import visible
        from regraft.report import show_size

        much = ""
        if self.total > 1:
            show: Callable[[int], str] = show_size if self.in_bytes else str
            share = 100 * self.done // self.total
            much = f"{show(self.done)} of {show(self.total)} ({share} %), "
        name = f" {visible(self.name)}" if self.name else ""
        return f"{self.verb}{name}: {much}{self._seconds:.0f} s"

    def as_json(self) -> str:
        """The state as one line of JSON."""
        told = {"verb": self.verb, "name": self.name, "done": self.done, "total": self.total}
        unit = "bytes" if self.in_bytes else "pieces"
        return json.dumps({"progress": {**told, "unit": unit, "seconds": round(self._seconds, 3)}})

    @property
    def in_bytes(self) -> bool:
        """Whether it is counted in bytes, as work on a checkpoint is; looked up only where something is shown."""
        from regraft.checkpoints.source import is_checkpoint

        return self.source is not None and is_checkpoint(self.source)

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self.begun


@contextmanager
def lines(
    state: State, mode: Literal["plain", "json"], write: Callable[[str], None]
) -> Iterator[Tell]:
    """Write a line every so many seconds, also while nothing is told; as JSON one more at the end."""
    show = state.as_text if mode == "plain" else state.as_json
    over = Event()

    def run() -> None:
        while not over.wait(_EVERY[mode]):
            write(show() + "\n")

    thread = Thread(target=run, name="regraft-progress", daemon=True)
    thread.start()
    try:
        yield state.tell
    finally:
        over.set()
        thread.join()
        if mode == "json":
            write(show() + "\n")


@contextmanager
def bar(state: State, console: Console) -> Iterator[Tell]:
    """Show a bar once the work has taken a while; it goes when the work is done."""
    from threading import Timer

    from rich import progress as rich

    from regraft.cli.output import visible

    amounts: list[rich.ProgressColumn] = [rich.MofNCompleteColumn()]
    if state.in_bytes:
        amounts = [rich.DownloadColumn(), rich.TransferSpeedColumn()]
    shown = rich.Progress(
        rich.SpinnerColumn("line"),
        rich.TextColumn(state.verb + " {task.description}", markup=False),
        rich.BarColumn(),
        *amounts,
        rich.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
        transient=True,
    )
    task = shown.add_task("", total=None)

    def tell(name: str, done: int, total: int) -> None:
        known = total if total > 1 else None
        shown.update(task, description=visible(name), completed=done, total=known)

    timer = Timer(_PATIENCE, shown.start)
    timer.daemon = True
    timer.start()
    try:
        yield tell
    finally:
        timer.cancel()
        timer.join()
        shown.stop()
