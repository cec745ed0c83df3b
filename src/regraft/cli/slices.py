"""`regraft slices`: which bytes of a checkpoint each rank reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output, visible
from regraft.options import SlicesOptions

if TYPE_CHECKING:
    from regraft.checkpoints.prepare import Prepared
    from regraft.checkpoints.ranks import ParallelPlan, Ranks
    from regraft.checkpoints.slices import Slices
    from regraft.views.documents import RankSlices

_SHOWN = 8
"""Patterns of one reason that are shown."""


@click.command(cls=options.WithArguments)
@options.argument(
    "src",
    "A checkpoint, of which the headers are enough: a folder or a weights file.",
    metavar="SRC",
    type=options.PLACE,
)
@options.from_class(SlicesOptions)
@click.option("--tp", metavar="N", default=1, help="How many ranks share each layer.")
@click.option(
    "--ep", metavar="N", default=1, help="How many groups of such ranks share the experts."
)
@click.option(
    "--rank",
    metavar="N",
    type=int,
    help="The rank whose bytes are listed, counted from 0; the ranks of one group follow one another. Without it, how "
    "many bytes each rank reads.",
)
@click.option(
    "--plan",
    metavar="FILE",
    type=options.FILE,
    help='What is cut, and how, as JSON: {"tp": {PATTERN: STYLE}, "ep": {PATTERN: STYLE}}. Without it, the installed '
    "transformers is asked.",
)
@options.beyond
@options.json
@options.quiet
@options.checked(lambda given: _problems(given))
def slices(
    src: Path,
    tp: int,
    ep: int,
    rank: int | None,
    plan: Path | None,
    *,
    json: bool,
    quiet: bool,
    **given: Any,
) -> Job:
    """Show which bytes of a checkpoint each rank of tensor and expert parallelism reads.

    Only headers are read, so this tells how much each machine will read before any is rented. What every rank holds
    whole is named, with the reason.

    Exit status: 0 done, 1 bad input, or sizes that do not divide, 2 usage, 3 not supported.
    """
    asked = SlicesOptions(**given)
    out = Output(json=json, quiet=quiet)

    def job() -> int:
        from regraft.checkpoints.prepare import model_of
        from regraft.checkpoints.ranks import Ranks, left_whole
        from regraft.cli.forms import tell
        from regraft.converting.slices import prepare_slices
        from regraft.views.documents import RankSlices

        first = Ranks(tp, ep, rank or 0)
        base = None if asked.model is None else Path(asked.model)
        ready = prepare_slices(src, asked.to, base, asked.source, asked.rules)
        config = model_of(ready.source, base)
        table = _plan_of(first, plan, ready, None if config is None else config.data)
        shapes = dict(zip(ready.moves.names, ready.moves.shapes, strict=True))
        whole = left_whole(first, table, shapes)
        ranks = range(first.world) if rank is None else [rank]
        parts = [_cut(ready, Ranks(tp, ep, number), table) for number in ranks]
        sizes = dict(zip(ready.moves.names, ready.moves.sizes.tolist(), strict=True))
        return tell(out, RankSlices.of(list(ranks), parts, sizes, whole, asked=plan is None))

    return job


def _problems(given: Mapping[str, Any]) -> Iterator[click.UsageError]:
    ranks = given.get("tp", 1) * given.get("ep", 1)
    if given.get("json") and "rank" in given and given["rank"] is None and ranks > 1:
        message = "--json lists the bytes of one rank; give it"
        yield click.BadParameter(message, param_hint="--rank")


def _plan_of(
    ranks: Ranks, path: Path | None, ready: Prepared, config: Mapping[str, Any] | None
) -> ParallelPlan:
    from regraft.bridges.transformers.parallel import installed_plan
    from regraft.checkpoints.ranks import ParallelPlan

    if path is not None:
        plan = ParallelPlan.read(path)
        plan.check_patterns(ready.moves.names, str(path))
    elif ranks.world == 1:
        return ParallelPlan()
    else:
        classes = (config or {}).get("architectures") or []
        names = [str(name) for name in classes] if isinstance(classes, list) else []
        plan = installed_plan(config or {}, names, ready.source.where)
    ranks.check_heads(plan, config, ready.moves.names)
    return plan


def _cut(ready: Prepared, ranks: Ranks, plan: ParallelPlan) -> Slices:
    from regraft.checkpoints.ranks import boxes_of
    from regraft.checkpoints.slices import cut

    names, shapes = ready.moves.names, ready.moves.shapes
    return cut(ready, box=boxes_of(ranks, plan, dict(zip(names, shapes, strict=True))))


def show_slices(out: Output, found: RankSlices) -> None:
    """How much each rank reads, and what all of them hold; of one rank alone, of which files."""
    from regraft.cli.styled import Text
    from regraft.report import count_in_words, show_size

    size = show_size(found.size)
    for share in found.shares:
        part = share.bytes / found.size if found.size else 1.0
        out.show(Text(f"rank {share.rank}: {show_size(share.bytes)} of {size} ({part:.1%})"))
    for name, read in found.files.items():
        runs = count_in_words(read.runs, "run")
        out.show(Text(f"  {visible(name)}: {show_size(read.bytes)} in {runs}"))
    for whole in found.whole:
        out.show(Text(f"whole in each rank: {show_size(whole.bytes)}: {whole.why}"))
        for pattern, count in whole.patterns[:_SHOWN]:
            out.show(Text(f"  {visible(pattern)}" + (f" ({count})" if count > 1 else "")))
        left = len(whole.patterns) - _SHOWN
        if left > 0:
            out.show(Text(f"  and {count_in_words(left, 'more pattern')}"))
    if found.whole and found.asked:
        out.show(Text("the plans are those of the installed transformers; --plan gives others"))
