"""What ``--html`` writes; nothing of it is imported without that option."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.cli.output import Output, visible
from regraft.errors import RegraftError
from regraft.report import Report

if TYPE_CHECKING:
    from regraft.checking.certificate import AdapterVerification
    from regraft.checking.for_tool import ToolCheck
    from regraft.checking.verdict import Check
    from regraft.checkpoints.verify import Verification
    from regraft.dialects.peft.inspect import Inspection
    from regraft.explaining.diff import Diff
    from regraft.explaining.explanation import Explanation
    from regraft.rules.lint.book import Linted
    from regraft.views.model import Page
    from regraft.views.outcome import SourceOutcome

    Result = Report | Inspection | Verification | AdapterVerification | Check | ToolCheck
    Answer = Explanation | Diff | Linted


def show_page(
    out: Output, file: Path | None, result: Result | Answer, *sources: str | Path | None
) -> None:
    """Write the page of a result that some ``sources`` have, and say so."""
    if file is not None:
        _write(out, file, _page_of(result), [Path(s) for s in sources if s is not None])


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
        _write(out, file, page, [Path(outcome.source) for outcome in outcomes])


_NAMED = 3
"""With so many sources they are the title of a page."""


def _write(out: Output, file: Path, page: Page, sources: Sequence[Path]) -> None:
    from regraft.views.html import write_page

    write_page(page, file, sources)
    if not out.json and not out.quiet:
        out.text(f"Page: {visible(str(file))}\n")


def _page_of(result: Result | Answer) -> Page:
    from regraft.checking.certificate import AdapterVerification
    from regraft.checking.for_tool import ToolCheck
    from regraft.checking.verdict import Check
    from regraft.dialects.peft.inspect import Inspection
    from regraft.explaining.diff import Diff
    from regraft.explaining.explanation import Explanation
    from regraft.rules.lint.book import Linted
    from regraft.views import answers, data

    if isinstance(result, Explanation):
        return answers.page_of_explanation(result)
    if isinstance(result, Diff):
        return answers.page_of_diff(result)
    if isinstance(result, Linted):
        return answers.page_of_lint(result)
    if isinstance(result, Report):
        return data.page_of_report(result)
    if isinstance(result, Inspection):
        return data.page_of_inspection(result)
    if isinstance(result, Check):
        return data.page_of_check(result)
    if isinstance(result, ToolCheck):
        return data.page_of_tool_check(result)
    if isinstance(result, AdapterVerification):
        return data.page_of_adapter_verification(result)
    return data.page_of_verification(result)


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
