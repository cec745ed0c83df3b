"""Arguments and options that several commands share, and the checks that belong to them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click
from click.core import iter_params_for_processing
from click.shell_completion import CompletionItem
from msgspec import NODEFAULT

from regraft.errors import RegraftError
from regraft.options import CheckOptions, Described, Option, Options, described

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
    """A path of this machine for what a command line names; see `regraft.sources.places.locate`."""
    from regraft.sources.places import locate

    return locate(path, whole=whole)


PLACE = _Place(path_type=Path)


def _complete_layout(begun: str) -> list[CompletionItem]:
    from regraft.dialects.names import dialect_names
    from regraft.layouts.names import known_layouts

    names = dict.fromkeys((*known_layouts(), *dialect_names()))
    return [CompletionItem(name) for name in names if name.startswith(begun)]


class _Layout(click.ParamType):  # type: ignore[type-arg] # it takes arguments in later releases only
    """A layout's name, which is checked when all options are read: rule books of one's own bring their own."""

    name = "layout"

    def __init__(self, of: Literal["target", "source", "tool"] = "target") -> None:
        self.of = of

    def check(self, value: str) -> None:
        """Raises ``BadInputError`` for a name that is not known."""
        from regraft.dialects.names import layout_named, source_named

        if self.of == "source":
            source_named(value)
            return
        if self.of == "tool":
            from regraft.dialects.judging import is_tool

            if is_tool(value):
                return
        layout_named(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The names that begin so."""
        return _complete_layout(incomplete)


def _without(args: Sequence[str], option: str) -> list[str]:
    """Arguments without the first that is an option, with its value where both are one word.

    >>> _without(["a", "--too=v5", "b"], "--too")
    ['a', 'b']
    """
    short = not option.startswith("--")
    for at, word in enumerate(args):
        if word.partition("=")[0] == option or (short and word.startswith(option)):
            return [*args[:at], *args[at + 1 :]]
    return list(args)


def argument(name: str, text: str, **settings: Any) -> Callable[[Command], Command]:
    """A positional argument; its text goes to the end of the command's help, where click has no place for it."""

    def add(command: Command) -> Command:
        lines = getattr(command, "_regraft_arguments", [])
        command._regraft_arguments = [(settings.get("metavar", name), text), *lines]  # type: ignore[attr-defined]
        return click.argument(name, **settings)(command)

    return add


class WrongUsageError(click.UsageError):
    """Everything that is wrong with one command line."""

    def __init__(self, errors: Sequence[click.UsageError], ctx: click.Context) -> None:
        super().__init__("; ".join(error.format_message() for error in errors), ctx)
        self.errors = errors


Check = Callable[[Mapping[str, Any]], Iterator[click.UsageError]]
"""What is wrong with the values of options beside each other; those that could not be read are absent."""


def checked(check: Check) -> Callable[[Command], Command]:
    """Let a command's options be checked when all are read; the problems are told together with others."""

    def add(command: Command) -> Command:
        command._regraft_check = check  # type: ignore[attr-defined]
        return command

    return add


class WithArguments(click.Command):
    """A command whose help explains its arguments as well as its options, and that tells all problems at once."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse a command line.

        Raises ``click.UsageError``; a `WrongUsageError` where there are several problems.
        """
        given = list(args)
        try:
            rest = super().parse_args(ctx, args)
            if ctx.resilient_parsing:  # completion, of a line that is not whole
                return rest
            found = list(self._problems(ctx))
        except (click.UsageError, RegraftError) as error:
            found = [*self._wrong(ctx, given), *self._problems(ctx)]
            if not found:
                raise
            if len(found) == 1 and isinstance(error, click.UsageError):
                error.ctx = ctx
                raise
        if len(found) == 1:
            raise found[0]
        if found:
            raise WrongUsageError(found, ctx)
        return rest

    def _wrong(self, ctx: click.Context, args: list[str]) -> Iterator[click.UsageError]:
        """What is wrong with each option and argument, where something is."""
        ctx.params.clear()  # what the first try left there may be no value
        unknown = False
        while True:
            try:
                values, rest, order = self.make_parser(ctx).parse_args(list(args))
                break
            except (click.NoSuchOption, click.BadOptionUsage) as error:
                error.ctx = ctx
                yield error
                unknown = True
                left = _without(args, error.option_name)
                if len(left) == len(args):
                    return
                args = left
            except click.UsageError as error:
                yield error
                return
        for param in iter_params_for_processing(order, self.get_params(ctx)):
            # What follows an unknown option may be its value: of arguments nothing can be told then.
            if unknown and isinstance(param, click.Argument):
                continue
            try:
                _, rest = param.handle_parse_result(ctx, values, rest)
            except click.UsageError as error:
                ctx.params.pop(param.name or "", None)
                error.ctx = ctx
                yield error
            except RegraftError:
                continue  # it is told when the command line is right
        for name, value in ctx.params.items():
            if isinstance(value, Enum):  # how click marks what was not given, while it parses
                ctx.params[name] = None
        if rest and not unknown:
            words = " ".join(rest)
            yield click.UsageError(f"Got unexpected extra arguments ({words})", ctx)

    def _problems(self, ctx: click.Context) -> Iterator[click.UsageError]:
        """What is wrong with the values."""
        books = ctx.params.get("rules")
        for param in self.params:
            value = ctx.params.get(param.name or "")
            if isinstance(param.type, _Layout) and isinstance(value, str) and not books:
                try:
                    with usage(param.opts[0]):
                        param.type.check(value)
                except click.UsageError as wrong:
                    wrong.ctx = ctx
                    yield wrong
        check: Check | None = getattr(self.callback, "_regraft_check", None)
        for error in check(ctx.params) if check is not None else ():
            error.ctx = ctx
            yield error

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


_LAYOUTS: dict[str, Literal["target", "source", "tool"]] = {
    "layout": "target",
    "source": "source",
    "tool": "tool",
}


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
    elif option.kind in _LAYOUTS:
        settings["type"] = _Layout(_LAYOUTS[option.kind])
    elif str not in kinds and kinds & {int, float}:
        bounds = {
            "min": option.least,
            "min_open": option.above,
            "max": option.most,
            "max_open": option.below,
        }
        made: Any = click.FloatRange if float in kinds else click.IntRange
        bare = click.FLOAT if float in kinds else click.INT
        bounded = option.least is not None or option.most is not None
        settings["type"] = made(**bounds) if bounded else bare
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
model = from_field(CheckOptions, "model")
architecture = from_field(CheckOptions, "architecture")
key = click.option(
    "--key",
    "below",
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


def wrong_size(given: Mapping[str, Any]) -> Iterator[click.UsageError]:
    """Whether --shard-size can be read."""
    if given.get("shard_size") is not None:
        from regraft.checkpoints.sharding import parse_size

        yield from wrong_value("--shard-size", parse_size, given["shard_size"])


def wrong_value(
    option: str, read: Callable[[Any], object], value: object
) -> Iterator[click.UsageError]:
    """Whether an option's value can be read, before any work is done."""
    try:
        with usage(option):
            read(value)
    except click.UsageError as error:
        yield error


@contextmanager
def usage(option: str) -> Iterator[None]:
    """Make an error about an option's value one of usage."""
    from regraft.errors import BadInputError

    try:
        yield
    except BadInputError as error:
        found = error.findings[0]
        if found.code in ("rule-book", "missing-file"):  # what REGRAFT_RULES names is wrong
            raise
        fix = found.fix or ""
        hint = f". {fix[0].upper()}{fix[1:]}" if fix.startswith("did you mean") else ""
        raise click.BadParameter(found.message + hint, param_hint=f"'{option}'") from None


def _below(key: str | None) -> None:
    """Let the model be below a key, for this command line."""
    if key is not None:
        from regraft.sources.places import take_key

        take_key(key)


def _stay_offline(*, wanted: bool) -> None:
    if wanted:
        from regraft.sources.places import stay_offline

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
