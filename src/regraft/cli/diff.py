"""`regraft diff`: what two files have in common, and the rule book that leads from one to the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output, visible
from regraft.options import DiffOptions
from regraft.report import count_in_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.explaining.diff import Diff, Some

_SHOWN = 20


@click.command(cls=options.WithArguments)
@options.argument("a", "A checkpoint or an adapter.", metavar="A", type=options.PLACE)
@options.argument("b", "Another one.", metavar="B", type=options.PLACE)
@click.option(
    "--book",
    "-o",
    metavar="FILE",
    type=options.FILE,
    help="Propose a rule book that leads from A to B, even where regraft has one, and write it to this file (.toml).",
)
@options.from_class(DiffOptions)
@options.html
@options.json
@options.quiet
def diff(
    a: Path,
    b: Path,
    book: Path | None,
    *,
    html: Path | None,
    json: bool,
    quiet: bool,
    **given: Any,
) -> Job:
    """Show what two checkpoints or adapters have in common.

    Shows the renames and equations under which their contents are equal. Where no rule book knows both layouts, one
    is proposed from the contents and printed. Both files are read whole.

    Exit status: 0 they hold the same, 1 bad input, 2 usage, 4 they do not.
    """
    asked = DiffOptions(**given)
    out = Output(json=json, quiet=quiet)

    def job() -> int:
        from regraft.cli.forms import tell
        from regraft.cli.pages import failure_page
        from regraft.errors import BadInputError, Finding
        from regraft.explaining.diff import diff
        from regraft.storage.beside import write_like

        if book is not None and book.exists():
            message = "the file exists already"
            raise BadInputError(
                Finding("destination-exists", message, where=str(book), fix="choose another")
            )
        with options.told(asked.rules, asked.architecture), failure_page(html, "diff", a):
            found = diff(a, b, **asked.values(), propose_book=book is not None)
        if book is not None and found.book is not None:
            write_like(book, found.book, [Path(a), Path(b)])
            found = replace(found, book_file=str(book))
        return tell(out, found, html, a, b)

    return job


_GOOD, _WARNING, _BAD, _NAME, _FAINT = "green", "yellow", "bold red", "bold", "dim"


def show_diff(out: Output, found: Diff) -> None:
    """What two files have in common and what not."""
    from regraft.cli.styled import Text

    out.show(Text.assemble((visible(found.a), _NAME), " and ", (visible(found.b), _NAME)))
    if any(found.layouts):
        one, other = (layout or "unknown" for layout in found.layouts)
        out.show(Text(f"  layouts: {one} and {other}", _FAINT))
    if found.same:
        out.show(Text(f"Same name, same content: {count_in_words(_total(found.same), 'tensor')}"))
    if found.moved:
        out.show(Text(), Text("Same content:"))
    for moved in found.moved:
        names = ", ".join(some.pattern for some in moved.targets[:3])
        names += ", ..." if len(moved.targets) > 3 else ""
        out.show(
            Text.assemble((visible(moved.rule), _NAME), f": {moved.equal} of B, ", visible(names))
        )
        for line in moved.equation.splitlines():
            out.show(Text(f"    {visible(line)}", _FAINT))
        for some in moved.differ[:_SHOWN]:
            out.show(Text(f"    not equal: {visible(some.pattern)} ({some.count})", _BAD))
    for each in found.differ[:_SHOWN]:
        what = f"{visible(each.some.pattern)} ({each.some.count}): {each.why}"
        out.show(Text.assemble(("differs: ", _BAD), what))
    for title, tensors in (("only in A: ", found.only_a), ("only in B: ", found.only_b)):
        for some in tensors[:_SHOWN]:
            out.show(Text.assemble((title, _BAD), f"{visible(some.pattern)} ({some.count})"))
        if len(tensors) > _SHOWN:
            out.show(Text(f"... and {len(tensors) - _SHOWN} more; --json lists them all", _WARNING))
    for note in found.notes:
        out.show(Text.assemble(("Note: ", _WARNING), visible(note)))
    if found.book is not None:
        _show_book(out, found)
    if found.equal:
        out.show(Text(), Text.assemble(("Equal", _GOOD), ": they hold the same, bit for bit"))
    else:
        out.show(Text(), Text.assemble(("Not equal", _BAD), f": {_unequal(found)}"))


def _unequal(found: Diff) -> str:
    """How many tensors there are of each kind that keeps two files from being equal."""
    differ = [each.some for each in found.differ]
    differ += [some for moved in found.moved for some in moved.differ]
    counts = [
        count_in_words(_total(differ), "tensor", "differs") if differ else "",
        f"{_total(found.only_a)} only in A" if found.only_a else "",
        f"{_total(found.only_b)} only in B" if found.only_b else "",
    ]
    return ", ".join(filter(None, counts)) or "they do not hold the same"


def _show_book(out: Output, found: Diff) -> None:
    from regraft.cli.styled import Text

    proof = (
        "carried out both ways, it gives the other file bit for bit"
        if found.verified
        else "it does not lead the whole way"
    )
    if found.book_file is not None:
        out.show(Text(), Text(f"A rule book was written to {visible(found.book_file)}: {proof}."))
        out.show(
            Text(f"Use it with: regraft convert SRC DST --to LAYOUT --rules {found.book_file}")
        )
        return
    out.show(Text(), Text(f"A rule book that leads from A to B ({proof}):"), Text())
    out.text("".join(f"    {line}\n" if line else "\n" for line in (found.book or "").splitlines()))


def _total(tensors: Sequence[Some]) -> int:
    return sum(some.count for some in tensors)
