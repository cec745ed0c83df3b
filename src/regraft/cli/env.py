"""`regraft env`: the versions that a bug report needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output

if TYPE_CHECKING:
    from regraft.views.environment import Environment


@click.command(cls=options.WithArguments)
@options.json
def env(*, json: bool) -> Job:
    """Print the versions of regraft, Python and the libraries it works with, for bug reports.

    Nothing is imported and nothing is sent anywhere; no paths, names or environment variables' values are shown.
    """
    out = Output(json=json)

    def job() -> int:
        from regraft.cli.forms import tell
        from regraft.views.environment import environment

        return tell(out, environment())

    return job


def show_environment(out: Output, found: Environment) -> None:
    """One line each."""
    rows = [
        ("regraft", found.regraft),
        ("python", found.python),
        ("platform", found.platform),
        *((name, version or "not installed") for name, version in found.packages.items()),
        *((name, "set") for name in found.variables),
        *(("books and dialects from", name) for name in found.plugins),
    ]
    width = max(len(name) for name, _ in rows)
    out.text("".join(f"{name:<{width}}  {value}\n" for name, value in rows))
