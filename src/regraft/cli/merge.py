"""`regraft merge`: adapters added to a base, as a new checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output
from regraft.options import MergeOptions


@click.command(cls=options.WithArguments)
@options.argument(
    "base",
    "The base: a model's folder or weights file; of image and video models one file with all parts or one, or a "
    "folder of diffusers.",
    metavar="BASE",
    type=options.FILE,
)
@options.argument(
    "loras",
    "An adapter, and what multiplies what it adds (style.safetensors=0.8); 1 if omitted, and it may be negative. Any "
    "number of them.",
    metavar="LORA[=WEIGHT]...",
    nargs=-1,
    required=True,
)
@click.option(
    "--output",
    "-o",
    metavar="OUT",
    type=options.FILE,
    required=True,
    help="The folder to write, or the file where BASE is one.",
)
@options.from_class(MergeOptions)
@options.json
@options.quiet
@options.checked(lambda given: _problems(given))
def merge(
    base: Path,
    loras: tuple[str, ...],
    output: Path,
    *,
    json: bool,
    quiet: bool,
    **given: Any,
) -> Job:
    """Add adapters to a base, each with a weight, and write a checkpoint like the base.

    What all adapters add to a tensor is summed up in float64 and rounded once; other tensors stay bit for bit. An
    adapter that does not fit the base, or of which nothing is for it, is an error, and then nothing is written.

    Exit status: 0 done, 1 bad input, 2 usage, 3 refused because it cannot be added to weights.
    """
    asked = MergeOptions(**given)
    adapters = [weighted(text) for text in loras]
    out = Output(json=json, quiet=quiet)

    def job() -> int:
        from regraft.cli.forms import tell
        from regraft.merging.merge import merge as merge_adapters

        with out.waiting("merging", base) as progress:
            report = merge_adapters(base, adapters, output, **asked.values(), progress=progress)
        return tell(out, report)

    return job


def _problems(given: Mapping[str, Any]) -> Iterator[click.UsageError]:
    yield from options.wrong_size(given)
    for text in given.get("loras") or ():
        try:
            weighted(text)
        except click.UsageError as error:
            yield error


def weighted(text: str) -> tuple[Path, float]:
    """A path and a weight; what follows the last ``=`` is one where it is a number and no such file is there.

    >>> weighted("style.safetensors=0.8")
    (PosixPath('style.safetensors'), 0.8)
    >>> weighted("style.safetensors")
    (PosixPath('style.safetensors'), 1.0)
    """
    path, sign, number = text.rpartition("=")
    if not sign or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(number)
    except ValueError:
        if Path(path).exists():
            message = f"{number!r} is no number"
            raise click.BadParameter(message, param_hint="LORA=WEIGHT") from None
        return Path(text), 1.0
