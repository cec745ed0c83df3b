"""The commands by name, each imported when it is asked for, and what `regraft` alone shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import click

import regraft
from regraft.cli.output import Output

Job = Callable[[], int]
"""What a command returns: it parses, and `regraft.cli.run` does the job, so that errors are handled in one place."""

TOUR = """\
regraft moves model checkpoints and LoRA adapters between weight layouts (transformers 4 and 5,
PEFT, vLLM, llama.cpp, kohya, diffusers, ...), exactly.

Adapters: inspect one, convert it, and convert it back:
  $ regraft inspect my-lora                              what it is, and which layout it has
  $ regraft check my-lora --model model                  will it load as it is? If not, why?
  $ regraft convert my-lora out --to transformers-v5     convert it; PEFT loads the result
  $ regraft convert out back --to transformers-v4        the same bits as before

Adapters and their base:
  $ regraft merge model my-lora=0.8 -o merged            the base with adapters added
  $ regraft extract model tuned -o lora --rank 32        what tuning changed, as a LoRA

Whole checkpoints:
  $ regraft convert model out --to transformers-v5       file to file, in little memory
  $ regraft verify model out                             compare every element, bit for bit

What goes where, and why:
  $ regraft explain model KEY --to transformers-v5       what becomes of one tensor
  $ regraft diff model other                             what two files have in common
  $ regraft learn before after -o mine.toml              a rule book, learned from two files
  $ regraft rules lint mine.toml                         check a rule book of your own

Useful options:
  --model PATH     the base model's folder or config.json, if the adapter doesn't name it
  --dry-run        run without writing
  --html FILE      HTML report: where every tensor goes
  --json           the same for programs; 'regraft schema COMMAND' describes it
  -q               print errors only

'regraft COMMAND --help' has all options; 'regraft completion bash' enables tab completion.
Nothing is guessed: if there is no exact equivalent, regraft refuses, explains why, and lists
the options.
"""

_COMMANDS = {
    "convert": "regraft.cli.convert",
    "inspect": "regraft.cli.inspect",
    "merge": "regraft.cli.merge",
    "extract": "regraft.cli.extract",
    "verify": "regraft.cli.verify",
    "check": "regraft.cli.check",
    "explain": "regraft.cli.explain",
    "diff": "regraft.cli.diff",
    "learn": "regraft.cli.learn",
    "probe": "regraft.cli.probe",
    "slices": "regraft.cli.slices",
    "layouts": "regraft.cli.layouts",
    "rules": "regraft.cli.rules",
    "errors": "regraft.cli.errors",
    "schema": "regraft.cli.schema",
    "env": "regraft.cli.env",
    "completion": "regraft.cli.completion",
}
"""The module of each command, in the order of the help; the command has the module's last name."""


class _Commands(click.Group):
    """Commands that are imported when they are needed, so that one does not pay for the others."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(import_module(_COMMANDS[cmd_name]), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in _COMMANDS and not name.startswith("-"):
            raise click.UsageError(f"There is no command {name!r}.{_nearest(name)}", ctx)
        return super().resolve_command(ctx, args)


def _nearest(name: str) -> str:
    from difflib import get_close_matches

    found: Sequence[str] = get_close_matches(name, _COMMANDS, n=1)
    return f" Did you mean {found[0]!r}?" if found else ""


def _show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:  # noqa: FBT001 (click's)
    if wanted and not ctx.resilient_parsing:
        Output().text(f"regraft {regraft.__version__}\n")
        ctx.exit()


@click.command(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Print the version and exit.",
)
@click.pass_context
def app(ctx: click.Context) -> None:
    """Move model checkpoints and adapters between weight layouts, exactly."""
    if ctx.invoked_subcommand is None:
        _show_tour(Output())


def _show_tour(out: Output) -> None:
    if not out.colored:
        out.text(TOUR)
        return
    from rich.text import Text

    text = Text(TOUR.rstrip("\n"))
    text.highlight_regex(r"(?m)(?<=\$ )regraft .*?(?=   )", "bold cyan")
    text.highlight_regex(r"(?m)^  -\S+( [A-Z]+)?", "cyan")
    text.highlight_regex(r"(?m)^\S.*:$", "bold")
    text.highlight_regex(r"'[^']+'", "cyan")
    out.show(text)
