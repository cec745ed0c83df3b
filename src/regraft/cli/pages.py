"""What ``--html`` writes; nothing of it is imported without that option."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.cli.output import Output, visible
from regraft.errors import RegraftError
from regraft.report import Report

if TYPE_CHECKING:
    from regraft.checking.certificate import AdapterVerification
    from regraft.checking.verdict import Check
    from regraft.checkpoints.verify import Verification
    from regraft.dialects.peft.inspect import Inspection
    from regraft.explaining.diff import Diff
    from regraft.explaining.explanation import Explanation
    from regraft.rules.lint.book import Linted
    from regraft.views.model import Page

    Result = Report | Inspection | Verification | AdapterVerification | Check
    Answer = Explanation | Diff | Linted


def show_page(
    out: Output, file: Path | None, result: Result | Answer, *sources: str | Path | None
) -> None:
    """Write the page of a result that some ``sources`` have, and say so."""
    if file is None:
        return
    from regraft.views.html import write_page

    write_page(_page_of(result), file, [Path(s) for s in sources if s is not None])
    if not out.json and not out.quiet:
        out.text(f"Page: {visible(str(file))}\n")


def _page_of(result: Result | Answer) -> Page:
    from regraft.checking.certificate import AdapterVerification
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
