"""`regraft convert`: an adapter, or a whole checkpoint, to another layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output

if TYPE_CHECKING:
    from regraft.cli.progress import Mode
    from regraft.sources import Item


@click.command(cls=options.WithArguments)
@options.argument(
    "paths",
    "SRC: an adapter's folder or file, or a checkpoint; several of them, or folders with any number inside, are "
    "converted each by itself. DST: the folder to write, or the file where SRC is one weights file of a model, or the "
    "dialect writes one file; of several SRC the folder for all results. Each result appears whole or not at all.",
    metavar="SRC... DST",
    type=options.FILE,
    nargs=-1,
    required=True,
)
@options.layout(
    "--to",
    "The layout to convert to (transformers-v5, transformers-v4), a dialect of adapters, or both (LAYOUT:DIALECT); "
    "'regraft layouts' lists them.",
    required=True,
)
@options.source
@options.model
@options.architecture
@options.rules
@options.beyond
@click.option("--dry-run", is_flag=True, help="Run without writing.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it exists.")
@click.option(
    "--shard-size",
    metavar="SIZE",
    help="Checkpoints: the size of a weights file, such as 200MB or 5GB. As SRC is sharded if omitted.",
)
@click.option(
    "--dtype",
    metavar="[PATTERN=]DTYPE",
    multiple=True,
    help="Checkpoints: cast floating-point tensors (bfloat16), or those whose names fit a pattern "
    "(*.norm.weight=float32). May be given more than once.",
)
@click.option(
    "--jobs",
    metavar="N",
    type=click.IntRange(min=1),
    help="Checkpoints: how many workers, as many as there are cores if omitted. Several SRC: how many at once, one if "
    "omitted.",
)
@click.option(
    "--resume", is_flag=True, help="Checkpoints: continue what a run that died had begun."
)
@click.option(
    "--stage",
    metavar="DIR",
    type=options.FILE,
    help="Checkpoints: do one part of the work, in a folder that the processes of all parts share; DST appears with "
    "--commit.",
)
@click.option(
    "--part",
    metavar="I/N",
    help="Which part: 0/4, 1/4, 2/4 or 3/4; /4 for that which JOB_COMPLETION_INDEX says. As SLURM_ARRAY_TASK_ID and "
    "SLURM_ARRAY_TASK_COUNT say if omitted.",
)
@click.option("--commit", is_flag=True, help="All parts are done: check them, and let DST appear.")
@click.option("--abort", is_flag=True, help="End what is staged in --stage, and remove it.")
@click.option(
    "--in-place",
    is_flag=True,
    help="Checkpoints: rename the tensors in SRC itself, by rewriting headers only.",
)
@click.option(
    "--untie",
    is_flag=True,
    help="Checkpoints: where tied weights have other values, keep both, and write tie_word_embeddings: false.",
)
@click.option(
    "--drop",
    metavar="PATTERN",
    multiple=True,
    help="Checkpoints: leave out the tensors whose names it matches (model.mtp.*), or one of two tied weights with "
    "other values. May be given more than once.",
)
@click.option(
    "--keep",
    metavar="PATTERN",
    multiple=True,
    help="Checkpoints: carry over as they are the tensors whose names it matches, which no rule explains. May be "
    "given more than once.",
)
@click.option(
    "--dequantize",
    is_flag=True,
    help="Checkpoints: make quantised weights (FP8, MXFP4, NVFP4) bfloat16 ones. This changes numbers.",
)
@click.option(
    "--fail-fast",
    is_flag=True,
    help="Several SRC: stop at the first that fails. Of one folder with several adapters: all or nothing.",
)
@options.html
@click.option(
    "--verify",
    is_flag=True,
    help="Adapters: compare what every target adds before and after, before anything is written.",
)
@options.verify_budget
@click.option(
    "--compact", is_flag=True, help="Adapters: leave out components that add nothing, to rounding."
)
@click.option(
    "--uniform-rank",
    is_flag=True,
    help="Adapters: one rank for all targets, with zeros; no rank_pattern.",
)
@click.option(
    "--max-error",
    metavar="ERROR",
    type=click.FloatRange(min=0),
    help="Adapters: refuse an approximation (--via) whose relative error is larger; nothing is written.",
)
@click.option(
    "--merge",
    is_flag=True,
    help="Adapters: write the base of --model in the layout, with the adapter added to its weights.",
)
@click.option(
    "--via",
    metavar="WAY",
    help="Adapters: what is done only by name. dense: a LoRA of full rank; svd:RANK (svd:16) or svd:TOLERANCE "
    "(svd:1e-3): the best one of a lower rank, with its error; merge: the base of --model with the adapter in its "
    "weights, where the result cannot hold the adapter.",
)
@click.option(
    "--alpha",
    metavar="ALPHA",
    type=click.FloatRange(min=0, min_open=True),
    help="Adapters: the alpha of a LoRA whose files do not say it (Megatron-Bridge's export).",
)
@click.option(
    "--rank",
    metavar="RANK",
    type=click.IntRange(min=1),
    help="Adapters: the rank that --alpha is divided by, where the factors have several.",
)
@options.json
@options.quiet
@options.verbose
@options.progress
def convert(
    paths: tuple[Path, ...],
    rules: tuple[str, ...],
    html: Path | None,
    json: bool,
    quiet: bool,
    verbose: bool,
    progress: Mode,
    fail_fast: bool,
    **given: Any,
) -> Job:
    """Convert an adapter, or a whole checkpoint, to another layout; or many of them.

    Exit status: 0 done, 1 bad input (of several SRC: not all were converted), 2 usage, 3 refused because there is no
    exact equivalent, 4 not equal (--verify).
    """
    options.check_layouts(rules, to=given["to"], from_=given["source"])
    _check_values(given["shard_size"], given["via"])
    *sources, dst = (*paths, paths[0]) if given["in_place"] and len(paths) == 1 else paths
    if not sources:
        raise click.BadParameter("DST is missing", param_hint="DST")
    if len(sources) > 1 and (html is not None or given["in_place"]):
        raise click.UsageError("--html and --in-place take one SRC")
    _check_staging(given, several=len(sources) > 1 or html is not None)
    out = Output(json=json, quiet=quiet, progress=progress, verbose=verbose)

    def job() -> int:
        out.log()
        if given["abort"]:
            return _convert_one(out, sources[0], dst, rules, html, given)
        from regraft.sources import find_sources

        there = [options.located(source, whole=not given["dry_run"]) for source in sources]
        items, deeper = find_sources(there)
        if len(sources) == 1 and items[0].path == there[0]:
            return _convert_one(out, there[0], dst, rules, html, given)
        if given["stage"] is not None:
            raise click.UsageError("--stage takes one checkpoint")
        if len(sources) == 1 and fail_fast:
            return _convert_one(out, there[0], dst, rules, html, given)
        if html is not None or given["in_place"]:
            raise click.UsageError("--html and --in-place take one adapter or checkpoint")
        from regraft.cli.many import warn_of_rest

        warn_of_rest(out, there, deeper)
        return _convert_many(out, items, dst, rules, fail_fast, given)

    return job


def _convert_one(
    out: Output,
    src: Path,
    dst: Path,
    rules: tuple[str, ...],
    html: Path | None,
    given: Mapping[str, Any],
) -> int:
    from regraft.api import convert
    from regraft.cli.pages import failure_page, show_page

    with (
        options.own_books(rules),
        failure_page(html, "convert", src),
        out.waiting("converting", src) as tell_progress,
    ):
        tell = None if out.quiet else lambda line: out.warn(line + "\n")
        report = convert(src, dst, tell=tell, progress=tell_progress, **given)
    if out.json:
        out.data(report.to_dict())
    elif report.ended is not None and not out.quiet:
        out.show(
            f"ended and removed: {report.ended}" if report.ended else "nothing was staged there"
        )
    elif report.checkpoint is not None and not out.quiet:
        from regraft.cli.checkpoint_words import show_checkpoint

        show_checkpoint(out, report, report.checkpoint)
    elif not out.quiet:
        from regraft.cli.words import show_report

        show_report(out, report)
    show_page(out, html, report, src)
    return 0


def _convert_many(
    out: Output,
    items: Sequence[Item],
    dst: Path,
    rules: tuple[str, ...],
    fail_fast: bool,
    given: Mapping[str, Any],
) -> int:
    """Each source into a folder or file of its own below DST."""
    from regraft.api import convert
    from regraft.cli.many import run_many
    from regraft.cli.words import how_to_load
    from regraft.views.outcome import SourceOutcome, Verdict

    options_for_each = {**given, "jobs": None}

    def work(item: Item) -> SourceOutcome:
        place = _place_of(item, dst, given["to"])
        report = convert(item.path, place, **options_for_each)
        made = report.checkpoint
        verdict: Verdict = "converted"
        if made is not None:
            why = f"{made.source_layout} -> {made.target_layout}"
            same = made.source_layout == made.target_layout
        else:
            why = ", ".join(
                dict.fromkeys(f"{a.source_layout} -> {a.target_layout}" for a in report.adapters)
            )
            same = all(adapter.copied for adapter in report.adapters)
        if same:
            verdict, why = "unchanged", f"it is in {why.partition(' -> ')[2]} already; copied"
        load = how_to_load(report) if report.written and made is None else ""
        return SourceOutcome(item.name, str(item.path), str(place), verdict, why, report, load=load)

    with options.own_books(rules):
        return run_many(out, items, work, jobs=given["jobs"] or 1, fail_fast=fail_fast)


def _place_of(item: Item, dst: Path, to: str) -> Path:
    """Where a result goes: a file where the source is one and the target's dialect writes one, else a folder."""
    from regraft.checkpoints.source import is_checkpoint
    from regraft.dialects.base import dialects
    from regraft.dialects.names import layout_named
    from regraft.layouts.names import DEFAULT

    place = dst / item.name
    if is_checkpoint(item.path):
        return place
    can = dialects()[layout_named(to).dialect or DEFAULT].capabilities
    if can.suffixes and (item.path.is_file() or not can.folder):
        return (
            place.with_suffix(can.suffixes[0])
            if item.path.is_file()
            else place.with_name(place.name + can.suffixes[0])
        )
    return place.with_suffix("") if item.path.is_file() else place


def _check_staging(given: Mapping[str, Any], several: bool) -> None:
    """Whether the options for work in parts go together."""
    named = [f"--{name}" for name in ("part", "commit", "abort") if given[name]]
    if len(named) > 1:
        raise click.UsageError(f"{' and '.join(named)}: give one of them")
    if named and given["stage"] is None:
        raise click.UsageError(f"{named[0]} needs --stage")
    if given["stage"] is not None and several:
        raise click.UsageError("--stage takes one SRC, and no --html")


def _check_values(shard_size: str | None, via: str | None) -> None:
    """Whether the values of options can be read, before any work is done."""
    if shard_size is not None:
        from regraft.checkpoints.sharding import parse_size

        with options.usage("--shard-size"):
            parse_size(shard_size)
    if via is not None:
        from regraft.adapters.ranks import Options

        with options.usage("--via"):
            Options(via)
