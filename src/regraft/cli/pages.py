"""What ``--html`` writes; nothing of it is imported without that option."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.cli.output import Output, visible
from regraft.errors import RegraftError

if TYPE_CHECKING:
    from regraft.views.model import Page
    from regraft.views.outcome import SourceOutcome


def show_page_of_many(
    out: Output,
    file: Path | None,
    command: str,
    sources: Sequence[Path],
    outcomes: Sequence[SourceOutcome],
    *,
    asked: int,
) -> None:
    """Write one page of what became of many sources, and say so."""
    if file is not None:
        from regraft.views.many import page_of_many

        names = [source.resolve().name for source in sources]
        title = ", ".join(names) if len(names) <= _NAMED else f"{len(names)} sources"
        page = page_of_many(title, command, outcomes, asked=asked)
        write(out, file, page, [Path(outcome.source) for outcome in outcomes])


_NAMED = 3
"""With so many sources they are the title of a page."""


def write(out: Output, file: Path, page: Page, sources: Sequence[Path]) -> None:
    """Write the page of what some ``sources`` hold, and say so."""
    from regraft.views.html import write_page

    write_page(page, file, sources)
    if not out.json and not out.quiet:
        out.text(f"Page: {visible(str(file))}\n")


@contextmanager
def failure_page(file: Path | None, command: str, source: Path) -> Iterator[None]:
    """Write a page of what went wrong, if something does."""
    try:
        yield
    except RegraftError as error:
        if file is not None:
            from regraft.views.data import page_of_failure
            from regraft.views.html import write_page

            write_page(page_of_failure(command, str(source), error), file, [source])
        raise
