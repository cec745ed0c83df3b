"""`regraft schema`: the JSON Schema of what commands print."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output


def _documents(ctx: click.Context, param: click.Parameter, begun: str) -> list[CompletionItem]:
    from regraft.views.schema import DOCUMENTS

    return [CompletionItem(name) for name in DOCUMENTS if name.startswith(begun)]


@click.command(cls=options.WithArguments)
@options.argument(
    "command",
    "A command, or 'error' for what is printed when one fails.",
    metavar="[COMMAND]",
    required=False,
    shell_complete=_documents,
)
@options.json
def schema(command: str | None, *, json: bool) -> Job:
    """Print the JSON Schema of what a command prints with --json.

    Without COMMAND, print the schemas of all of them in one document.
    """
    out = Output(json=json)

    def job() -> int:
        from regraft.views.schema import DOCUMENTS, schema_of

        if command is None:
            out.data({name: schema_of(name) for name in DOCUMENTS})
        elif command in DOCUMENTS:
            out.data(schema_of(command))
        else:
            message = f"there is no {command!r}; there are {', '.join(DOCUMENTS)}"
            raise click.BadParameter(message, param_hint="COMMAND")
        return 0

    return job
