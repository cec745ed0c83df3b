"""Arguments and options that several commands share, and the checks that belong to them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from click.shell_completion import CompletionItem
from msgspec import NODEFAULT

from regraft.options import ConvertOptions, Described, Option, Options, described

if TYPE_CHECKING:
    from regraft.rules.book import Rules

Command = Callable[..., Any]
FILE = click.Path(path_type=Path)


class _Place(click.Path):
    """A path of this machine, or the address of what is beyond it, of which an outline is made."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, or that of the outline."""
        return located(Path(os.fsdecode(super().convert(value, param, ctx))))


def located(path: Path, *, whole: bool = False) -> Path:
    """A path of this machine for what a command line names; see `regraft.places.locate`."""
    from regraft.places import locate

    return locate(path, whole=whole)


PLACE = _Place(path_type=Path)


def _complete_layout(
    ctx: click.Context, param: click.Parameter, begun: str
) -> list[CompletionItem]:
    from regraft.dialects.names import dialect_names
    from regraft.layouts.names import known_layouts

    names = dict.fromkeys((*known_layouts(), *dialect_names()))
    return [CompletionItem(name) for name in names if name.startswith(begun)]


def argument(name: str, text: str, **settings: Any) -> Callable[[Command], Command]:
    """A positional argument; its text goes to the end of the command's help, where click has no place for it."""

    def add(command: Command) -> Command:
        lines = getattr(command, "_regraft_arguments", [])
        command._regraft_arguments = [(settings.get("metavar", name), text), *lines]  # type: ignore[attr-defined]
        return click.argument(name, **settings)(command)

    return add


class WithArguments(click.Command):
    """A command whose help explains its arguments as well as its options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the arguments before the options."""
        rows = getattr(self.callback, "_regraft_arguments", [])
        if rows:
            with formatter.section("Arguments"):
                formatter.write_dl(rows)
        super().format_options(ctx, formatter)


def from_class(options: type[Options]) -> Callable[[Command], Command]:
    """The options that a class describes, in its order; the command takes them by the names of its fields."""

    def add(command: Command) -> Command:
        for field in reversed(list(described(options))):
            command = _option(field)(command)
        return command

    return add


def from_field(options: type[Options], name: str) -> Callable[[Command], Command]:
    """The option of one field of a class."""
    return _option(next(field for field in described(options) if field.name == name))


def _option(field: Described) -> Callable[[Command], Command]:
    option = field.option
    settings: dict[str, Any] = {"help": _help_of(option), "metavar": option.metavar}
    kinds = set(get_args(field.type)) or {field.type}
    if field.type is bool:
        return click.option(field.flag, field.name, is_flag=True, help=settings["help"])
    if option.kind == "place":
        settings["type"] = PLACE
    elif option.kind == "file":
        settings["type"] = FILE
    elif option.kind in ("layout", "source"):
        settings["shell_complete"] = _complete_layout
    elif str not in kinds and kinds & {int, float}:
        made: Any = click.FloatRange if float in kinds else click.IntRange
        settings["type"] = made(min=option.least, min_open=option.above)
    if option.many:
        return click.option(field.flag, field.name, multiple=True, **settings)
    if field.default is NODEFAULT:
        return click.option(field.flag, field.name, required=True, **settings)
    settings["show_default"] = option.shown
    return click.option(field.flag, field.name, default=field.default, **settings)


def _help_of(option: Option) -> str:
    """What the help says: first what the option is for, where it is not for everything.

    >>> _help_of(Option("Leave it out.", only="adapters"))
    'Adapters: leave it out.'
    """
    if option.only is None:
        return option.help
    first, second = option.help[0], option.help[1]
    start = first.lower() if not second.isupper() else first
    return f"{option.only.capitalize()}: {start}{option.help[1:]}"


src = argument(
    "src",
    "A folder that save_pretrained wrote, a weights file with its config beside it, a folder with several adapters "
    "in subfolders, or an adapter of another dialect: a file or a folder.",
    metavar="SRC",
    type=PLACE,
)
model = from_field(ConvertOptions, "model")
architecture = from_field(ConvertOptions, "architecture")
rules = from_field(ConvertOptions, "rules")
source = from_field(ConvertOptions, "source")
verify_budget = from_field(ConvertOptions, "verify_budget")
key = click.option(
    "--key",
    metavar="KEY",
    expose_value=False,
    is_eager=True,
    callback=lambda ctx, param, value: _below(value),
    help="What a training run saved (DCP, .ckpt, .pt): the key that the model is below, if several fit.",
)
offline = click.option(
    "--offline",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=lambda ctx, param, value: _stay_offline(wanted=value),
    help="Ask nothing over the network, whatever is named.",
)


def beyond(command: Command) -> Command:
    """The options for what is beyond this machine, or comes from a training run."""
    return key(offline(command))


json = click.option("--json", is_flag=True, help="Print one JSON document; messages go to stderr.")
html = click.option(
    "--html",
    metavar="FILE",
    type=FILE,
    callback=lambda ctx, param, value: _check_file(value),
    help="Write an HTML report: one file that needs no network. Also when the command fails.",
)
_quiet = click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
_verbose = click.option(
    "--verbose",
    "-v",
    is_flag=True,
    expose_value=False,
    callback=lambda ctx, param, value: _log(ctx, verbose=value),
    help="Say on stderr what is decided, and why.",
)


def quiet(command: Command) -> Command:
    """How much a command says."""
    return _quiet(_verbose(command))


def _log(ctx: click.Context, *, verbose: bool) -> None:
    """Let what the library logs go to stderr."""
    from regraft.cli.output import log_to_stderr

    log_to_stderr(verbose=verbose, quiet=bool(ctx.params.get("quiet")))


fail_fast = click.option(
    "--fail-fast",
    is_flag=True,
    help="Several SRC: stop at the first that fails.",
)
progress = click.option(
    "--progress",
    metavar="auto|plain|json|none",
    type=click.Choice(("auto", "plain", "json", "none")),
    default="auto",
    help="How to show on stderr how far it is: a bar on a terminal and else a line every ten seconds (auto), lines "
    "(plain), a line of JSON every second (json), or not at all.",
)


def layout(flag: str, text: str, **settings: Any) -> Callable[[Command], Command]:
    """An option that takes a layout's name."""
    return click.option(
        flag, "to", metavar="LAYOUT", shell_complete=_complete_layout, help=text, **settings
    )


def check_layouts(rules: Sequence[str], **given: str | None) -> None:
    """Whether the layouts exist; a user's rule books may lead to layouts of their own.

    Raises ``click.BadParameter``.
    """
    from regraft.dialects.names import layout_named, source_named

    for option, name in given.items():
        if name is not None and not rules:
            with usage(f"--{option.strip('_')}"):
                (source_named if option == "from_" else layout_named)(name)


@contextmanager
def usage(option: str) -> Iterator[None]:
    """Make an error about an option's value one of usage."""
    from regraft.errors import BadInputError

    try:
        yield
    except BadInputError as error:
        found = error.findings[0]
        if found.code == "rule-book":  # REGRAFT_RULES names a book that is wrong
            raise
        fix = found.fix or ""
        hint = f". {fix[0].upper()}{fix[1:]}" if fix.startswith("did you mean") else ""
        raise click.BadParameter(found.message + hint, param_hint=option) from None


def _below(key: str | None) -> None:
    """Let the model be below a key, for this command line."""
    if key is not None:
        from regraft.places import take_key

        take_key(key)


def _stay_offline(*, wanted: bool) -> None:
    if wanted:
        from regraft.places import stay_offline

        stay_offline(wanted=True)


def _check_file(path: Path | None) -> Path | None:
    """Whether a page can be written there, before any work is done."""
    if path is None:
        return None
    if path.is_dir():
        raise click.BadParameter(f"{path} is a folder, and a file's name was expected")
    if not path.parent.is_dir():
        raise click.BadParameter(f"there is no folder {path.parent}")
    if os.path.lexists(path):
        from regraft.views.html import check_page_place

        check_page_place(path)
    return path


@contextmanager
def told(names: Rules, architecture: str | None) -> Iterator[None]:
    """Let --rules and --architecture apply."""
    from regraft.rules.said import saying

    with own_books(names), saying(architecture=architecture):
        yield


@contextmanager
def own_books(names: Rules) -> Iterator[None]:
    """Let the rule books of --rules stand in for the library."""
    from regraft.rules.book import only_books

    with only_books(names):
        yield
