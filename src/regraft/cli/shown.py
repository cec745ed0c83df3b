"""Results in the terminal's words, for ``print`` and for notebooks."""

from __future__ import annotations

import io
import sys
from functools import singledispatch
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from regraft.checking.certificate import AdapterVerification
from regraft.checking.for_tool import ToolCheck
from regraft.checking.verdict import Check
from regraft.checkpoints.inspect import CheckpointInspection
from regraft.checkpoints.verify import Verification
from regraft.cli.check_words import show_check, show_tool
from regraft.cli.checkpoint_words import (
    show_checkpoint,
    show_inspected_checkpoint,
    show_verification,
)
from regraft.cli.diff import show_diff
from regraft.cli.explain import show_explanation
from regraft.cli.image_words import show_image, show_images
from regraft.cli.output import Output
from regraft.cli.words import show_adapter_verification, show_inspection, show_report
from regraft.dialects.image.inspect import ImageFolder, ImageSummary
from regraft.dialects.peft.inspect import Inspection
from regraft.explaining.diff import Diff
from regraft.explaining.explanation import Explanation
from regraft.report import Report
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
    _show(result, _Kept(console))
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
    _show(result, _Kept(console))
    return named(console.export_html(inline_styles=True, code_format=_FRAME))


@singledispatch
def _show(result: object, out: Output) -> None:
    raise TypeError(f"nothing is known of how to show a {type(result).__name__}")


@_show.register
def _(result: Report, out: Output) -> None:
    if result.checkpoint is not None:
        show_checkpoint(out, result, result.checkpoint)
    else:
        show_report(out, result)


_show.register(Inspection, lambda result, out: show_inspection(out, result))
_show.register(CheckpointInspection, lambda result, out: show_inspected_checkpoint(out, result))
_show.register(ImageSummary, lambda result, out: show_image(out, result))
_show.register(ImageFolder, lambda result, out: show_images(out, result.files))
_show.register(Check, lambda result, out: show_check(out, result))
_show.register(ToolCheck, lambda result, out: show_tool(out, result))
_show.register(Verification, lambda result, out: show_verification(out, result))
_show.register(AdapterVerification, lambda result, out: show_adapter_verification(out, result))
_show.register(Diff, lambda result, out: show_diff(out, result))
_show.register(Explanation, lambda result, out: show_explanation(out, result))
