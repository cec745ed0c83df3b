"""Results in the terminal's words, for ``print`` and for notebooks."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from regraft.cli.forms import show
from regraft.cli.output import Output
from regraft.storage.stand_ins import named

if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDE = 10_000
_NOTEBOOK = 110
"""Columns of a notebook's cell; longer names are broken at their dots."""
_FRAME = '<pre style="font-family: monospace; line-height: 1.35; overflow-x: auto">{code}</pre>'


class _Kept(Output):
    """An output that keeps what it is given in a console."""

    __slots__ = ("console",)

    def __init__(self, console: Console) -> None:
        super().__init__()
        object.__setattr__(self, "console", console)

    console: Console

    def text(self, text: str) -> None:
        self.console.print(Text(named(text)), end="")

    def warn(self, text: str) -> None:
        self.text(text)

    def show(self, *parts: RenderableType, error: bool = False) -> None:
        for part in parts:
            self.console.print(part)

    @property
    def colored(self) -> bool:
        return self.console.color_system is not None

    @property
    def width(self) -> int:
        return self.console.width


def text_of(result: object) -> str:
    """What the command prints of a result, without colours; as wide as the terminal if there is one."""
    file = io.StringIO()
    width = None if sys.stdout is not None and sys.stdout.isatty() else _WIDE
    console = Console(
        file=file,
        color_system=None,
        width=width,
        force_jupyter=False,
        markup=False,
        highlight=False,
    )
    show(_Kept(console), result)
    return "\n".join(line.rstrip() for line in named(file.getvalue()).rstrip("\n").split("\n"))


def html_of(result: object) -> str:
    """The same with its colours, as HTML for a notebook's cell."""
    console = Console(
        file=io.StringIO(),
        record=True,
        width=_NOTEBOOK,
        color_system="truecolor",
        force_terminal=True,
        force_jupyter=False,
        markup=False,
        highlight=False,
    )
    show(_Kept(console), result)
    return named(console.export_html(inline_styles=True, code_format=_FRAME))
