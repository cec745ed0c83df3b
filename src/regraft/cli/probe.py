"""`regraft probe`: small checkpoints whose elements are all different, for a converter to be watched on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output, visible
from regraft.options import ProbeOptions
from regraft.report import count_in_words

if TYPE_CHECKING:
    from regraft.views.documents import Probes


def fixed_fields(settings: tuple[str, ...]) -> dict[str, Any]:
    """Fields of a config from ``NAME=VALUE``; a value is JSON, or text."""
    import msgspec

    fields: dict[str, Any] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--set")
        try:
            fields[name] = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            fields[name] = value
    return fields


def wrong_fields(given: Mapping[str, Any]) -> Iterator[click.UsageError]:
    """The values of --set that are none."""
    for text in given.get("settings") or ():
        try:
            fixed_fields((text,))
        except click.UsageError as error:
            yield error


@click.command(cls=options.WithArguments)
@options.argument(
    "model",
    "A config.json, a model's folder, or a class of transformers (LlamaForCausalLM).",
    metavar="MODEL",
)
@options.argument(
    "out", "The folder to write: one folder for each size.", metavar="OUT", type=options.FILE
)
@click.option(
    "--sizes", metavar="N", type=click.IntRange(1, 3), default=2, help="How many sizes (2)."
)
@click.option(
    "--digits",
    is_flag=True,
    help="For a converter that casts to bfloat16 or float16: more probes of each size, which carry the digits of what "
    "these types cannot tell apart. Convert them all.",
)
@options.from_class(ProbeOptions)
@options.json
@options.quiet
@options.checked(wrong_fields)
def probe(
    model: str,
    out: Path,
    layout: str | None,
    sizes: int,
    *,
    digits: bool,
    settings: tuple[str, ...],
    headers: str | None,
    json: bool,
    quiet: bool,
) -> Job:
    """Write small checkpoints with the names of a model, every element different from all others.

    Run a converter on each of them, and 'regraft learn' reads the rule off what it makes.

    Exit status: 0 done, 1 bad input, 2 usage.
    """
    fields = fixed_fields(settings)
    screen = Output(json=json, quiet=quiet)

    def job() -> int:
        from regraft.bridges.transformers.outlines import outlines
        from regraft.cli.forms import tell
        from regraft.errors import BadInputError, Finding
        from regraft.learning import probe as probes
        from regraft.learning.command import write_probe
        from regraft.views.documents import Probes, ShownProbe

        if out.exists():
            fix = "choose another"
            finding = Finding(
                "destination-exists", "the folder exists already", where=str(out), fix=fix
            )
            raise BadInputError(finding)
        made = []
        for number, outline in enumerate(outlines(model, sizes, layout, fields, headers), 1):
            states = {f"size-{number}": probes.labels(outline.shapes, number)}
            if digits:
                parts = probes.digits(outline.shapes, number)
                states |= {f"size-{number}-digit-{n}": part for n, part in enumerate(parts, 1)}
            for name, state in states.items():
                folder = out / name
                write_probe(folder, state, outline.config)
                made.append(ShownProbe(str(folder), len(outline.shapes)))
        return tell(screen, Probes(made))

    return job


def show_probes(out: Output, found: Probes) -> None:
    """One a line."""
    for each in found.probes:
        out.text(f"{visible(each.folder)}: {count_in_words(each.tensors, 'tensor')}\n")
