"""The commands and their options. Each returns what is to be done; `regraft.cli.run` does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

import regraft
from regraft.cli.output import Output

Job = Callable[[], int]

# Without Rich, help is plain text without boxes, wherever it goes.
app = typer.Typer(
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TOUR = """\
regraft moves LoRA adapters between the weight layouts of transformers 4 and 5, exactly.

Look at an adapter, convert it, and convert it back:
  $ regraft inspect my-lora                              what it is, and which layout it has
  $ regraft check my-lora --model model                  will it load as it is? if not, why
  $ regraft convert my-lora out --to transformers-v5     convert it; PEFT loads the result
  $ regraft convert out back --to transformers-v4        the very bits you had

Whole checkpoints:
  $ regraft convert model out --to transformers-v5       file to file, in little memory
  $ regraft verify model out                             compare every element, bit for bit

What goes where, and why:
  $ regraft explain model KEY --to transformers-v5       the way of one tensor
  $ regraft diff model other                             what two files have in common
  $ regraft rules lint mine.toml                         check a rule book of your own

What helps with each of them:
  --model PATH     the base model's folder or config.json, where the adapter doesn't tell enough
  --dry-run        do everything but write
  --html FILE      a page that shows where every tensor goes
  --json           the same for programs; 'regraft schema COMMAND' describes it
  -q               print errors only

'regraft COMMAND --help' has all options; 'regraft --install-completion' makes your shell know them.
Nothing is guessed: what has no exact image is refused, with the reason.
"""

_Src = Annotated[
    Path,
    typer.Argument(
        metavar="SRC",
        help="A folder that save_pretrained wrote, a weights file with its config beside it, "
        "or a folder with several adapters in sub-folders.",
        show_default=False,
    ),
]
_Model = Annotated[
    Path | None,
    typer.Option(
        "--model",
        metavar="PATH",
        help="The base model's folder or its config.json, of either version. Needed where the "
        "adapter itself doesn't tell what it is for, or how many experts there are.",
        show_default=False,
    ),
]
_Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rules",
        metavar="BOOK",
        help="Use this rule book (a TOML file, or the name of one of regraft's) and no others. May be "
        "given more than once.",
        show_default=False,
    ),
]
_Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document; messages go to stderr."),
]
_Html = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        help="Write a page to look at: one file that needs no network. Also when it fails.",
        show_default=False,
    ),
]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]


def _layouts() -> list[str]:
    from regraft.layouts import LAYOUTS

    return list(LAYOUTS)


def _documents() -> list[str]:
    from regraft.views.schema import DOCUMENTS

    return list(DOCUMENTS)


def _show_version(wanted: bool) -> None:
    if wanted:
        Output().text(f"regraft {regraft.__version__}\n")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Move adapters between weight layouts, exactly."""
    if context.invoked_subcommand is None:
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


@app.command()
def convert(
    src: _Src,
    dst: Annotated[
        Path | None,
        typer.Argument(
            metavar="DST",
            help="The folder to write, or the file (.safetensors) where SRC is one weights file of "
            "a model. It appears whole or not at all.",
            show_default=False,
        ),
    ] = None,
    *,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="LAYOUT",
            autocompletion=_layouts,
            help="The layout to convert to: transformers-v5 or transformers-v4.",
            show_default=False,
        ),
    ],
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="LAYOUT",
            autocompletion=_layouts,
            help="The layout of SRC. Found out, with evidence, where it is not given.",
            show_default=False,
        ),
    ] = None,
    model: _Model = None,
    rules: _Rules = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but write.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DST if it exists.")
    ] = False,
    shard_size: Annotated[
        str | None,
        typer.Option(
            "--shard-size",
            metavar="SIZE",
            help="Checkpoints: the size of a weights file, such as 200MB or 5GB. As SRC is sharded "
            "where it is not given.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            metavar="[PATTERN=]DTYPE",
            help="Checkpoints: cast floating-point tensors (bfloat16), or those whose names fit a "
            "pattern (*.norm.weight=float32). May be given more than once.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            metavar="N",
            min=1,
            help="Checkpoints: how many workers. As many as there are cores where it is not given.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Checkpoints: continue what a run that died had begun."),
    ] = False,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place",
            help="Checkpoints: rename the tensors in SRC itself, by rewriting headers only.",
        ),
    ] = False,
    html: _Html = None,
    check: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Adapters: compare what every target adds before and after, before anything is written.",
        ),
    ] = False,
    compact: Annotated[
        bool,
        typer.Option(
            "--compact", help="Adapters: leave out components that add nothing, to rounding."
        ),
    ] = False,
    uniform_rank: Annotated[
        bool,
        typer.Option(
            "--uniform-rank",
            help="Adapters: one rank for all targets, with zeros; no rank_pattern.",
        ),
    ] = False,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge",
            help="Adapters: write the base of --model in the layout, with the adapter added to its weights.",
        ),
    ] = False,
    via: Annotated[
        str | None,
        typer.Option(
            "--via",
            metavar="WAY",
            help="Adapters: what is done only by name. dense: a LoRA of full rank; svd:RANK (svd:16) or "
            "svd:TOLERANCE (svd:1e-3): the best one of a lower rank, with its error.",
            show_default=False,
        ),
    ] = None,
    json: _Json = False,
    quiet: _Quiet = False,
) -> Job:
    """Convert an adapter, or a whole checkpoint, to another layout.

    Exit status: 0 done, 1 bad input, 2 usage, 3 refused because there is no exact image, 4 not equal (--verify).
    """
    if not rules:
        _check_layout(to, "--to")
    if source is not None and not rules:
        _check_layout(source, "--from")
    if shard_size is not None:
        _check_size(shard_size)
    if via is not None:
        _check_via(via)
    if dst is None and not in_place:
        raise typer.BadParameter("DST is missing", param_hint="DST")
    _check_file(html)
    out = Output(json=json, quiet=quiet)

    def job() -> int:
        from regraft.api import convert
        from regraft.cli.pages import failure_page, show_page

        with (
            _own_books(rules),
            failure_page(html, "convert", src),
            out.waiting("converting", src) as progress,
        ):
            report = convert(
                src,
                src if dst is None else dst,
                to=to,
                model=model,
                source=source,
                overwrite=overwrite,
                dry_run=dry_run,
                shard_size=shard_size,
                dtype=dtype,
                jobs=jobs,
                resume=resume,
                in_place=in_place,
                via=via,
                compact=compact,
                uniform_rank=uniform_rank,
                verify=check,
                merge=merge,
                tell=None if quiet else lambda line: out.warn(line + "\n"),
                progress=progress,
            )
        if json:
            out.data(report.to_dict())
        elif report.checkpoint is not None and not quiet:
            from regraft.cli.checkpoint_words import show_checkpoint

            show_checkpoint(out, report, report.checkpoint)
        elif not quiet:
            from regraft.cli.words import show_report

            show_report(out, report)
        show_page(out, html, report)
        return 0

    return job


@app.command()
def inspect(
    src: _Src,
    model: _Model = None,
    html: _Html = None,
    json: _Json = False,
    quiet: _Quiet = False,
) -> Job:
    """Tell what an adapter or a checkpoint is, and which layout it has.

    Shows why it was taken for that; of an adapter its ranks, scales and targets, of a checkpoint its model, files
    and tensors.

    Exit status: 0 it is sound, 1 something is wrong with it, 2 usage.
    """
    _check_file(html)
    out = Output(json=json, quiet=quiet)

    def job() -> int:
        from regraft.api import inspect
        from regraft.checkpoints.source import is_checkpoint
        from regraft.cli.pages import failure_page, show_page
        from regraft.cli.words import show_findings, show_inspection

        if is_checkpoint(src):
            return _inspect_checkpoint(out, src, model, html)
        with failure_page(html, "inspect", src):
            inspection = inspect(src, model=model)
        if json:
            out.data(inspection.to_dict())
        elif not quiet:
            show_inspection(out, inspection)
        show_page(out, html, inspection)
        if inspection.problems:
            show_findings(out, "bad input", inspection.problems)
            return 1
        return 0

    return job


def _inspect_checkpoint(out: Output, src: Path, model: Path | None, html: Path | None) -> int:
    from regraft.bridges.transformers.files import InstalledTransformers
    from regraft.checkpoints.inspect import inspect_checkpoint
    from regraft.cli.checkpoint_words import show_inspected_checkpoint
    from regraft.cli.words import show_findings

    if html is not None:
        message = "there is no page of a checkpoint alone; 'convert --dry-run --html' makes one"
        raise typer.BadParameter(message, param_hint="--html")
    result = inspect_checkpoint(src, model, InstalledTransformers())
    if out.json:
        out.data(result.to_dict())
    elif not out.quiet:
        show_inspected_checkpoint(out, result)
    if result.problems:
        show_findings(out, "bad input", result.problems)
        return 1
    return 0


@app.command()
def verify(
    src: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="A checkpoint or an adapter: a folder or a file."),
    ],
    dst: Annotated[
        Path, typer.Argument(metavar="DST", help="The same in another layout, or in this one.")
    ],
    model: _Model = None,
    html: _Html = None,
    rules: _Rules = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            metavar="ERROR",
            min=0,
            help="Adapters: the relative error up to which two deltas are equal (1e-5).",
            show_default=False,
        ),
    ] = None,
    json: _Json = False,
    quiet: _Quiet = False,
) -> Job:
    """Check that a checkpoint, or an adapter, is another one in its own layout.

    A checkpoint is compared bit for bit. Of an adapter, what every target adds to its base is compared in
    float64, matrix by matrix.

    Exit status: 0 they are equal, 1 one of them is wrong in itself, 2 usage, 4 they are not equal.
    """
    _check_file(html)
    out = Output(json=json, quiet=quiet)

    def job() -> int:
        from regraft.bridges.transformers.files import InstalledTransformers
        from regraft.checkpoints.source import is_checkpoint
        from regraft.cli.pages import failure_page, show_page

        foreign = InstalledTransformers()
        if not is_checkpoint(src):
            from regraft.adapters.verify import TOLERANCE, verify_adapters
            from regraft.cli.words import show_adapter_verification

            limit = TOLERANCE if tolerance is None else tolerance
            with (
                _own_books(rules),
                failure_page(html, "verify", src),
                out.waiting("comparing", src) as progress,
            ):
                done = verify_adapters(src, dst, model, limit, progress, foreign)
            if json:
                out.data(done.to_dict())
            elif not quiet:
                show_adapter_verification(out, done)
            show_page(out, html, done)
            return 0 if done.equal else 4
        from regraft.checkpoints.verify import verify
        from regraft.cli.checkpoint_words import show_verification

        with (
            _own_books(rules),
            failure_page(html, "verify", src),
            out.waiting("comparing", src) as progress,
        ):
            result = verify(src, dst, model=model, progress=progress, foreign=foreign)
        if json:
            out.data(result.to_dict())
        elif not quiet:
            show_verification(out, result)
        show_page(out, html, result)
        return 0 if result.equal else 4

    return job


@contextmanager
def _own_books(names: list[str] | None) -> Iterator[None]:
    """Let the rule books of --rules stand in for the library."""
    from regraft.rules.book import find_book, only_books

    with only_books([find_book(name) for name in names or ()]):
        yield


def _check_via(text: str) -> None:
    from regraft.adapters.ranks import Options
    from regraft.errors import BadInputError

    try:
        Options(text)
    except BadInputError as error:
        raise typer.BadParameter(error.findings[0].message, param_hint="--via") from None


def _check_size(text: str) -> None:
    from regraft.checkpoints.sharding import parse_size
    from regraft.errors import BadInputError

    try:
        parse_size(text)
    except BadInputError as error:
        raise typer.BadParameter(error.findings[0].message, param_hint="--shard-size") from None


@app.command()
def schema(
    command: Annotated[
        str | None,
        typer.Argument(
            metavar="[COMMAND]",
            autocompletion=_documents,
            help="A command, or 'error' for what is printed when one fails.",
        ),
    ] = None,
    json: _Json = False,
) -> Job:
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
            raise typer.BadParameter(message, param_hint="COMMAND")
        return 0

    return job


def _check_file(path: Path | None) -> None:
    """Whether a page can be written there, before any work is done."""
    if path is None:
        return
    if path.is_dir():
        message = f"{path} is a folder, and a file's name was expected"
    elif not path.parent.is_dir():
        message = f"there is no folder {path.parent}"
    else:
        return
    raise typer.BadParameter(message, param_hint="--html")


def _check_layout(name: str, option: str) -> None:
    from regraft.errors import BadInputError
    from regraft.layouts import parse_layout

    try:
        parse_layout(name)
    except BadInputError as error:
        raise typer.BadParameter(error.findings[0].message, param_hint=option) from None
