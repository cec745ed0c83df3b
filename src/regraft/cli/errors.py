"""`regraft errors`: what a finding's code means."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output

if TYPE_CHECKING:
    from regraft.views.documents import CodeList, ExplainedCode


def _codes(ctx: click.Context, param: click.Parameter, begun: str) -> list[CompletionItem]:
    from regraft.errors.codes import CODES

    return [CompletionItem(name) for name in CODES if name.startswith(begun)]


@click.command(cls=options.WithArguments)
@options.argument(
    "code",
    "The code of a finding, as --json shows it and docs/errors.md lists it.",
    metavar="[CODE]",
    required=False,
    shell_complete=_codes,
)
@options.json
def errors(code: str | None, *, json: bool) -> Job:
    """Explain the code of a finding: what it means, what to do, and the exit status.

    Without CODE, list all of them.
    """
    out = Output(json=json)

    def job() -> int:
        from difflib import get_close_matches

        from regraft.cli.forms import tell
        from regraft.errors.codes import CODES
        from regraft.views.documents import CodeList, ExplainedCode

        if code is not None and code not in CODES:
            near = get_close_matches(code, CODES, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else " 'regraft errors' lists all codes."
            raise click.BadParameter(f"there is no code {code!r}.{hint}", param_hint="CODE")
        asked = [CODES[code]] if code is not None else CODES.values()
        return tell(out, CodeList([ExplainedCode.of(each) for each in asked]))

    return job


def show_codes(out: Output, found: CodeList) -> None:
    """One code at length, or all in a line each, by their parts."""
    if len(found.codes) == 1:
        out.text(_explained(found.codes[0]))
        return
    width = max(len(each.code) for each in found.codes)
    for part, codes in groupby(found.codes, key=lambda each: each.part):
        lines = [f"  {each.code:<{width}}  {each.title}" for each in codes]
        out.text(f"{part}\n" + "\n".join(lines) + "\n\n")


def _explained(code: ExplainedCode) -> str:
    text = f"{code.code}: {code.title}\n"
    if code.details:
        text += f"\n{code.details}\n"
    return f"{text}\nFix: {code.fix}\nExit status: {code.status} ({code.meaning})\n"
