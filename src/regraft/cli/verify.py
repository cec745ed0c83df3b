"""`regraft verify`: whether two checkpoints or adapters are equivalent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output
from regraft.options import VerifyOptions
from regraft.values import replace

if TYPE_CHECKING:
    from regraft.cli.progress import Mode
    from regraft.sources.resolve import Item
    from regraft.views.outcome import SourceOutcome


@click.command(cls=options.WithArguments)
@options.argument(
    "src", "A checkpoint or an adapter: a folder or a file.", metavar="SRC", type=options.PLACE
)
@options.argument(
    "dst", "The same in another layout, or in this one.", metavar="DST", type=options.PLACE
)
@options.from_class(VerifyOptions)
@options.beyond
@options.html
@options.json
@options.quiet
@options.progress
def verify(
    src: Path,
    dst: Path,
    *,
    html: Path | None,
    json: bool,
    quiet: bool,
    progress: Mode,
    **given: Any,
) -> Job:
    """Check that two checkpoints or adapters are equivalent.

    Each may be in a layout of its own. Checkpoints are compared bit for bit. Of adapters, what every target adds to
    its base is compared in float64, entry by entry.

    Of folders with several of them, each is compared with the one of its name.

    Exit status: 0 they are equal, 1 one of them is wrong in itself, 2 usage, 4 they are not equal.
    """
    asked = VerifyOptions(**given)
    out = Output(json=json, quiet=quiet, progress=progress)

    def job() -> int:
        from regraft.checking.verify import verify
        from regraft.sources.resolve import find_sources

        if src.is_dir() and dst.is_dir():
            items, deeper = find_sources([src], results=False)
            if items[0].path != src:
                from regraft.cli.many import warn_of_rest
                from regraft.cli.pages import show_page_of_many

                warn_of_rest(out, (), deeper)
                there, _ = find_sources([dst], results=False)
                pairs = _pairs(items, there)
                told = partial(show_page_of_many, out, html, "verify", [src], asked=len(pairs))
                with options.told(asked.rules, asked.architecture):
                    return _verify_many(out, pairs, asked, told)
        from regraft.cli.forms import tell
        from regraft.cli.pages import failure_page

        with (
            options.told(asked.rules, asked.architecture),
            failure_page(html, "verify", src),
            out.waiting("comparing", src) as progressed,
        ):
            result = verify(src, dst, **asked.values(), progress=progressed)
        return tell(out, result, html, src, dst)

    return job


class _Pair(NamedTuple):
    """What has one name on both sides, or stands on one of them alone."""

    one: Item | None
    other: Item | None


def _pairs(items: Sequence[Item], there: Sequence[Item]) -> list[_Pair]:
    """What is to be compared with what: by names, and where one side is a single file, by names without its ending."""
    left = {item.name: item for item in there}
    bare = {_bare(item): item for item in there}
    pairs = []
    for item in items:
        other = left.get(item.name) or bare.get(_bare(item))
        if other is not None:
            left.pop(other.name, None)
        pairs.append(_Pair(item, other))
    return pairs + [_Pair(None, item) for item in left.values()]


def _bare(item: Item) -> str:
    return item.name.removesuffix(item.path.suffix) if item.path.is_file() else item.name


def _verify_many(
    out: Output,
    pairs: Sequence[_Pair],
    asked: VerifyOptions,
    told: Callable[[Sequence[SourceOutcome]], None],
) -> int:
    """Each with the one of its name, and a table at the end."""
    from regraft.cli.many import run_many
    from regraft.errors.codes import Status

    by_name = {item.name: pair for pair in pairs if (item := pair.one or pair.other) is not None}
    items = [item for pair in pairs if (item := pair.one or pair.other) is not None]
    bare = replace(asked, rules=(), architecture=None)

    def work(item: Item) -> SourceOutcome:
        return _verify_pair(by_name[item.name], bare)

    return run_many(out, items, work, told=told, bad=Status.NO)


def _verify_pair(pair: _Pair, asked: VerifyOptions) -> SourceOutcome:
    from regraft.adapters.detect import why_of_another
    from regraft.checking.verify import verify
    from regraft.errors import BadInputError
    from regraft.views.outcome import SourceOutcome, verified

    one, other = pair
    if one is None or other is None:
        alone = one or other
        assert alone is not None
        why = "DST has none of this name" if other is None else "SRC has none of this name"
        place = None if other is None else str(other.path)
        return SourceOutcome(alone.name, str(alone.path), place, "not equal", why)
    try:
        result = verify(one.path, other.path, **asked.values())
    except BadInputError as error:
        if why_of_another(error.findings) is None:
            raise
        result = verify(one.path, other.path, **replace(asked, model=None).values())
    return verified(one.name, one.path, other.path, result)
