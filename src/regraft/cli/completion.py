"""`regraft completion`: tab completion for a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from regraft.cli import options
from regraft.cli.app import Job, app
from regraft.cli.output import Output


@click.command(cls=options.WithArguments)
@options.argument(
    "shell", "The shell you use.", metavar="SHELL", type=click.Choice(["bash", "zsh", "fish"])
)
def completion(shell: str) -> Job:
    """Print what enables tab completion in a shell.

    For bash, add this line to ~/.bashrc (for zsh ~/.zshrc): eval "$(regraft completion bash)". For fish, write the
    output to ~/.config/fish/completions/regraft.fish.
    """

    def job() -> int:
        made = get_completion_class(shell)
        assert made is not None  # one of the three that click has
        Output().text(made(app, {}, "regraft", "_REGRAFT_COMPLETE").source())
        return 0

    return job
