"""`regraft rules`: list, show, check and write rule books."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output, visible
from regraft.report import count_in_words

if TYPE_CHECKING:
    from regraft.rules.lint.book import Fault, Linted
    from regraft.views.documents import BookList, ShownBook


@click.group(invoke_without_command=True)
@click.pass_context
def rules(ctx: click.Context) -> None:
    """List, show, check and write rule books."""
    if ctx.invoked_subcommand is None:
        Output().text(ctx.get_help() + "\n")


_book = options.argument("book", "A TOML file, or the name of one of regraft's.", metavar="BOOK")
_GOOD, _WARNING, _BAD, _NAME, _FAINT = "green", "yellow", "bold red", "bold", "dim"
_STYLE = {"error": _BAD, "warning": _WARNING, "note": _FAINT}


@rules.command("list", cls=options.WithArguments)
@options.json
@options.quiet
def list_books(*, json: bool, quiet: bool) -> Job:
    """List the rule books that come with regraft."""
    out = Output(json=json, quiet=quiet)

    def job() -> int:
        from regraft.cli.forms import tell
        from regraft.rules.book import library
        from regraft.views.documents import BookList, BookSummary

        return tell(out, BookList([BookSummary.of(book) for book in library()]))

    return job


def show_list(out: Output, found: BookList) -> None:
    """One book a row."""
    from regraft.cli.styled import Column, Table

    table = Table(
        Column("book", wrapped=True),
        Column("rules", "right", wrapped=True),
        Column("model types", wrapped=True),
        Column("what changes", wrapped=True),
    )
    for book in found.books:
        title = book.title.partition(": ")[2] or book.title
        table.add_row(book.name, str(book.rules), ", ".join(book.model_types), title)
    out.show(table)


@rules.command(cls=options.WithArguments)
@_book
@options.json
def show(book: str, *, json: bool) -> Job:
    """Show a rule book as one TOML file, with what it includes.

    Exit status: 0 done, 1 there is no such book or it cannot be loaded.
    """
    out = Output(json=json)

    def job() -> int:
        from regraft.cli.forms import tell
        from regraft.rules.book import find_book
        from regraft.views.documents import ShownBook

        return tell(out, ShownBook.of(find_book(book)))

    return job


def show_book(out: Output, found: ShownBook) -> None:
    """A book as a file."""
    out.text(found.toml)


@rules.command(cls=options.WithArguments)
@_book
@click.option(
    "--keys",
    metavar="SRC",
    type=options.FILE,
    help="A checkpoint or an adapter whose names the rules must fit: shows what never fires and what is not explained.",
)
@options.model
@options.architecture
@options.html
@options.json
@options.quiet
def lint(
    book: str,
    keys: Path | None,
    model: Path | None,
    architecture: str | None,
    html: Path | None,
    *,
    json: bool,
    quiet: bool,
) -> Job:
    """Check a rule book before any tensor is read.

    BOOK may also be transformers, for the registry of the release that is installed, or transformers:MODEL_TYPE.
    Finds rules that claim one key, shadow each other, eat each other's output, cannot be undone or never fire.

    Exit status: 0 no errors (warnings may be there), 1 it cannot be read, 2 usage, 4 errors.
    """
    out = Output(json=json, quiet=quiet)

    def job() -> int:
        from regraft.checking.rule_books import lint
        from regraft.cli.forms import tell
        from regraft.cli.pages import failure_page

        with options.told((), architecture), failure_page(html, "rules lint", Path(book)):
            found = lint(book, keys, model)
        return tell(out, found, html)

    return job


def show_linted(out: Output, found: Linted) -> None:
    """What lint found, the worst first."""
    from regraft.cli.styled import Text

    for fault in found.faults:
        _show_fault(out, fault)
    counts = [
        count_in_words(number, kind)
        for kind in ("error", "warning", "note")
        if (number := sum(fault.severity == kind for fault in found.faults))
    ]
    against = f", compared with {count_in_words(found.keys, 'key')}" if found.keys else ""
    head = Text.assemble(
        (visible(found.book), _NAME), f": {count_in_words(found.rules, 'rule')}{against}: "
    )
    head.append(
        ", ".join(counts) or "nothing to say against it", _BAD if not found.sound else _GOOD
    )
    out.show(head)


def _show_fault(out: Output, fault: Fault) -> None:
    from regraft.cli.styled import Text

    finding = fault.finding
    head = Text.assemble(
        (finding.where or "", _NAME),
        ": ",
        (fault.severity, _STYLE[fault.severity]),
        f" {finding.code}",
    )
    if finding.rule:
        head.append(f" in {visible(finding.rule)!r}")
    lines = [head]
    if finding.key:
        lines.append(Text(f"  {visible(finding.key)}"))
    lines += [Text(f"  {visible(line)}") for line in finding.message.splitlines()]
    if fault.other:
        lines.append(Text(f"  the other: {visible(fault.other)}", _FAINT))
    if finding.fix:
        lines.append(Text.assemble(("  Fix: ", _GOOD), visible(finding.fix)))
    out.show(*lines)


@rules.command(cls=options.WithArguments)
@options.argument("model", "A model type, or a model's folder or config.json.", metavar="MODEL")
@click.option("--out", "-o", "file", metavar="FILE", type=options.FILE, help="Write it here.")
@options.quiet
def export(model: str, file: Path | None, *, quiet: bool) -> Job:
    """Write the rule books that apply to a model as TOML, as a start for one of your own.

    Exit status: 0 done, 1 no rule book knows the model, or the file exists.
    """
    out = Output(quiet=quiet)

    def job() -> int:
        from regraft.checking.rule_books import export

        text = export(model)
        if file is None:
            out.text(text)
            return 0
        from regraft.errors import BadInputError, Finding

        if file.exists():
            finding = Finding(
                "destination-exists",
                "the file exists already",
                where=str(file),
                fix="choose another",
            )
            raise BadInputError(finding)
        file.write_text(text, encoding="utf-8")
        return 0

    return job


@rules.command(cls=options.WithArguments)
@options.argument("file", "The TOML file to write.", metavar="FILE", type=options.FILE)
@click.option(
    "--left",
    metavar="LAYOUT",
    default="transformers-v4",
    show_default=True,
    help="The layout on the left.",
)
@click.option("--right", metavar="LAYOUT", required=True, help="The layout on the right.")
@click.option(
    "--model-type",
    metavar="TYPE",
    required=True,
    help="What model_type is in the model's config.json.",
)
@options.quiet
def new(file: Path, left: str, right: str, model_type: str, *, quiet: bool) -> Job:
    """Start a rule book, with a test beside it that passes; then put the model's own names in.

    Exit status: 0 done, 1 a file exists, 2 usage.
    """
    out = Output(quiet=quiet)

    def job() -> int:
        from regraft.errors import BadInputError, Finding
        from regraft.rules.skeleton import book_text, test_text

        test = file.with_name(f"test_{file.stem}.py")
        taken = [path for path in (file, test) if path.exists()]
        if taken:
            raise BadInputError(
                Finding(
                    "destination-exists",
                    "the file exists already",
                    where=str(path),
                    fix="choose another",
                )
                for path in taken
            )
        file.write_text(book_text(file.stem, left, right, model_type), encoding="utf-8")
        test.write_text(test_text(file.stem, left, file.name), encoding="utf-8")
        if not quiet:
            out.text(f"{visible(str(file))}, {visible(str(test))}\n")
            out.text(f"Next: regraft rules lint {file}; pytest {test}\n")
        return 0

    return job
