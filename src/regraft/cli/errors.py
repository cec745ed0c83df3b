"""`regraft errors`: what a finding's code means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output

if TYPE_CHECKING:
    from regraft.errors.codes import Code


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

        from regraft.errors.codes import CODES, Part

        if code is not None and code not in CODES:
            near = get_close_matches(code, CODES, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else " 'regraft errors' lists all codes."
            raise click.BadParameter(f"there is no code {code!r}.{hint}", param_hint="CODE")
        if json:
            asked = [CODES[code]] if code is not None else list(CODES.values())
            out.data({"codes": [_as_data(each) for each in asked]})
        elif code is not None:
            out.text(_explained(CODES[code]))
        else:
            width = max(map(len, CODES))
            for part in Part:
                lines = [
                    f"  {c.value:<{width}}  {c.title}" for c in CODES.values() if c.part is part
                ]
                out.text(f"{part.title}\n" + "\n".join(lines) + "\n\n")
        return 0

    return job


def _as_data(code: Code) -> dict[str, Any]:
    return {
        "code": code.value,
        "title": code.title,
        "details": code.details,
        "fix": code.fix,
        "status": int(code.status),
        "part": code.part.title,
    }


def _explained(code: Code) -> str:
    text = f"{code.value}: {code.title}\n"
    if code.details:
        text += f"\n{code.details}\n"
    return f"{text}\nFix: {code.fix}\nExit status: {int(code.status)} ({code.status.meaning})\n"
