"""`regraft rules`: list, show, check and write rule books."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output, visible

if TYPE_CHECKING:
    from regraft.rules.book import Book
    from regraft.rules.lint.book import Fault, Linted


@click.group(invoke_without_command=True)
@click.pass_context
def rules(ctx: click.Context) -> None:
    """List, show, check and write rule books."""
    if ctx.invoked_subcommand is None:
        Output().text(ctx.get_help() + "\n")


_book = options.argument("book", "A TOML file, or the name of one of regraft's.", metavar="BOOK")
_GOOD, _WARNING, _BAD, _NAME, _FAINT = "green", "yellow", "bold red", "bold", "dim"
_STYLE = {"error": _BAD, "warning": _WARNING, "note": _FAINT}


@rules.command("list")
@options.json
@options.quiet
def list_books(*, json: bool, quiet: bool) -> Job:
    """List the rule books that come with regraft."""
    out = Output(json=json, quiet=quiet)

    def job() -> int:
        from regraft.rules.book import library

        if json:
            out.data({"books": [_summary(book) for book in library()]})
        elif not quiet:
            _show_list(out, library())
        return 0

    return job


def _summary(book: Book) -> dict[str, Any]:
    return {
        "name": book.name,
        "title": book.title,
        "left": book.left,
        "right": book.right,
        "model_types": list(book.model_types),
        "rules": len(book.rules),
        "carries": len(book.carries),
        "path": book.path,
    }


def _show_list(out: Output, books: tuple[Book, ...]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=_NAME)
    for name in ("book", "rules", "model types", "what changes"):
        table.add_column(name, justify="right" if name == "rules" else "left", overflow="fold")
    for book in books:
        title = book.title.partition(": ")[2] or book.title
        table.add_row(book.name, str(len(book.rules)), ", ".join(book.model_types), title)
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
        from regraft.rules.book import find_book
        from regraft.rules.write import write_book

        found = find_book(book)
        if json:
            out.data(
                {
                    **_summary(found),
                    "equations": [
                        {
                            "name": rule.name,
                            "where": rule.where,
                            "text": rule.equation.text,
                            "left_kinds": list(rule.left_kinds),
                            "right_kinds": list(rule.right_kinds),
                        }
                        for rule in found.rules
                    ],
                    "carried": [
                        {"key": str(carry.term), "why": carry.why, "where": carry.where}
                        for carry in found.carries
                    ],
                }
            )
        else:
            out.text(write_book(found))
        return 0

    return job


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
        from msgspec import to_builtins

        from regraft.checking.rule_books import lint
        from regraft.cli.pages import failure_page, show_page

        with options.told((), architecture), failure_page(html, "rules lint", Path(book)):
            found = lint(book, keys, model)
        if json:
            out.data({**to_builtins(found), "sound": found.sound})
        elif not quiet:
            show_linted(out, found)
        show_page(out, html, found)
        return 0 if found.sound else 4

    return job


def show_linted(out: Output, found: Linted) -> None:
    """What lint found, the worst first."""
    from rich.text import Text

    for fault in found.faults:
        _show_fault(out, fault)
    counts = [
        f"{number} {kind}{'s' * (number != 1)}"
        for kind in ("error", "warning", "note")
        if (number := sum(fault.severity == kind for fault in found.faults))
    ]
    against = f", compared with {found.keys} keys" if found.keys else ""
    head = Text.assemble((visible(found.book), _NAME), f": {found.rules} rules{against}: ")
    head.append(
        ", ".join(counts) or "nothing to say against it", _BAD if not found.sound else _GOOD
    )
    out.show(head)


def _show_fault(out: Output, fault: Fault) -> None:
    from rich.text import Text

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
