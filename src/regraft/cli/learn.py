"""`regraft learn`: a rule book from what a converter makes of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output, visible
from regraft.cli.probe import fixed_fields, wrong_fields
from regraft.options import LearnOptions, ProbeOptions
from regraft.report import count_in_words

if TYPE_CHECKING:
    from regraft.cli.progress import Mode
    from regraft.views.documents import LearnedBook


@click.command(cls=options.WithArguments)
@options.argument(
    "files",
    "BEFORE and AFTER: checkpoints with the same weights in two layouts. More pairs are the same at other sizes: they "
    "name the sizes and test the book.",
    metavar="[BEFORE AFTER]...",
    nargs=-1,
    type=options.FILE,
)
@click.option(
    "--book",
    "-o",
    metavar="FILE",
    type=options.FILE,
    required=True,
    help="The rule book to write (.toml).",
)
@click.option(
    "--layouts",
    metavar="OLD NEW",
    nargs=2,
    default=("before", "after"),
    help="The names of the two layouts (before after).",
)
@click.option("--name", metavar="NAME", help="The book's name; that of FILE if omitted.")
@click.option(
    "--config",
    metavar="MODEL",
    help="In place of files: a config.json, a folder, or a class of transformers to make probes for.",
)
@click.option(
    "--with",
    "command",
    metavar="COMMAND",
    help="With --config: the converter, such as 'python convert.py {src} {dst}'. Runs without a shell, more than once.",
)
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0.1),
    default=300.0,
    help="How long the converter may take, each time (300).",
)
@options.from_class(ProbeOptions)
@options.from_class(LearnOptions)
@options.json
@options.quiet
@options.progress
@options.checked(lambda given: _problems(given))
def learn(
    files: tuple[Path, ...],
    book: Path,
    layouts: tuple[str, str],
    name: str | None,
    config: str | None,
    command: str | None,
    timeout: float,
    *,
    json: bool,
    quiet: bool,
    progress: Mode,
    layout: str | None,
    settings: tuple[str, ...],
    headers: str | None,
    **given: Any,
) -> Job:
    """Learn a rule book from checkpoints before and after a conversion, or by running a converter on probes.

    The book is verified on all pairs, in both directions. It converts at once:
    regraft convert SRC DST --to NEW --rules FILE.

    Exit status: 0 done, 1 something is not explained (no book is written), 2 usage.
    """
    asked = LearnOptions(**given)
    fields = fixed_fields(settings)
    out = Output(json=json, quiet=quiet, progress=progress)

    def job() -> int:
        from regraft.bridges.transformers.commanded import Probes, learn_command
        from regraft.bridges.transformers.probing import parameter_orders
        from regraft.cli.forms import tell
        from regraft.errors import BadInputError, Finding
        from regraft.learning.command import Command
        from regraft.learning.learn import learn_pairs, require_sound
        from regraft.learning.pairs import Pair
        from regraft.report import log_result
        from regraft.storage.beside import write_like
        from regraft.views.documents import LearnedBook

        if book.exists():
            fix = "choose another"
            finding = Finding(
                "destination-exists", "the file exists already", where=str(book), fix=fix
            )
            raise BadInputError(finding)
        title = name or book.stem
        with out.waiting("learning"):
            if config is not None and command is not None:
                found = learn_command(
                    Probes(config, layout, fields, headers),
                    Command(command, timeout),
                    layouts=layouts,
                    name=title,
                    choose=asked.choose,
                )
            else:
                pairs = [Pair.of(a, b) for a, b in zip(files[::2], files[1::2], strict=True)]
                found = learn_pairs(
                    pairs,
                    layouts=layouts,
                    name=title,
                    choose=asked.choose,
                    orders=lambda: parameter_orders(pairs[0].config),
                )
        log_result(found)
        if not asked.partial:
            require_sound(found)
        write_like(book, found.text, [Path(name) for name in files])
        return tell(out, LearnedBook.of(found, book))

    return job


def _problems(given: Mapping[str, Any]) -> Iterator[click.UsageError]:
    config, files = given.get("config"), given.get("files") or ()
    if (config is None) != (given.get("command") is None):
        yield click.UsageError("--config and --with belong together")
    elif config is None and (not files or len(files) % 2):
        yield click.UsageError("give pairs of files, BEFORE and AFTER, or --config and --with")
    if config is not None and files:
        yield click.UsageError("give files, or --config and --with")
    yield from wrong_fields(given)


def show_learned(out: Output, found: LearnedBook) -> None:
    """What was learned, and how to use it."""
    rules, tensors = count_in_words(found.rules, "rule"), count_in_words(found.total, "tensor")
    out.text(f"{visible(found.book)}: {rules}, {found.explained} of {tensors} explained\n")
    for each in found.verified:
        word = "equal, bit for bit, both ways" if each.equal else "NOT equal"
        seen = "learned from it" if each.learned_from else "not seen before"
        out.text(f"  {visible(each.where)}: {word} ({seen})\n")
    for name, why in list(found.not_explained.items())[:20]:
        out.text(f"  not explained: {visible(name)}: {why}\n")
    if found.unused:
        out.text(
            f"  dropped: {count_in_words(len(found.unused), 'tensor')} before, such as {visible(found.unused[0])}\n"
        )
    for note in found.notes:
        out.text(f"  note: {visible(note)}\n")
    old, new = found.layouts
    out.text(
        f"Use it with: regraft convert SRC DST --to {new} --rules {found.book}  (or --to {old})\n"
    )
