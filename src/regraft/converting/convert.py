"""``regraft.convert``: checkpoints and adapters from one layout to another, by whatever way was asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from regraft.bridges.transformers.files import InstalledTransformers
from regraft.errors import BadInputError, Finding
from regraft.layouts.spelled import LayoutName
from regraft.options import ConvertOptions, described
from regraft.report import PartReport, Report, log_report
from regraft.rules.book import Rules
from regraft.sources.places import (
    address_of,
    below,
    file_named,
    left_behind,
    no_address,
    settings,
    stay_offline,
    store_for,
    traffic,
)
from regraft.sources.resolve import Resolved, resolved
from regraft.storage.hub import find_cached
from regraft.storage.stand_ins import named
from regraft.storage.training import left_words
from regraft.values import replace

if TYPE_CHECKING:
    from regraft.checkpoints.convert import Staged

Progress = Callable[[str, int, int], None]
"""Told what is done, how much of it, and how much there is."""


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: LayoutName | str,
    model: str | os.PathLike[str] | None = None,
    source: LayoutName | str | None = None,
    alpha: float | None = None,
    rank: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    shard_size: str | int | None = None,
    dtype: str | Sequence[str] = (),
    jobs: int | None = None,
    resume: bool = False,
    in_place: bool = False,
    via: str | None = None,
    compact: bool = False,
    uniform_rank: bool = False,
    verify: bool = False,
    verify_budget: float = 300.0,
    max_error: float | None = None,
    merge: bool = False,
    architecture: str | None = None,
    rules: Rules = (),
    untie: bool = False,
    drop: Sequence[str] = (),
    keep: Sequence[str] = (),
    dequantize: bool = False,
    key: str | None = None,
    stage: str | os.PathLike[str] | None = None,
    part: str | None = None,
    commit: bool = False,
    abort: bool = False,
    push: str | None = None,
    runner: Literal["ray"] | None = None,
    address: str = "auto",
    tell: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Convert an adapter, a folder of adapters, or a whole checkpoint to another layout.

    Args:
        src: a folder that PEFT's ``save_pretrained`` wrote, one ``.safetensors`` (or ``adapter_model.bin``) with its
            ``adapter_config.json`` beside it, or a folder with several adapters in sub-folders; or a model's
            checkpoint: a folder, or one ``.safetensors`` or ``.bin`` file. Or the address of any of these in a store
            (``"s3://bucket/model"``), of which only what is needed is read.
        dst: the folder to write, or its address in a store. It appears whole or not at all. Where ``src``
            is one weights file of a model, a name that ends in ``.safetensors`` is the file to write.
        to: the layout to convert to, such as ``"transformers-v5"``: one that a rule book leads to, of an adapter also
            with the release of PEFT that it is for (``"transformers-v4/peft-0.18"``). ``regraft layouts`` lists them.
        model: the base model's folder or its ``config.json``, of either version. Needed where the adapter itself
            does not tell what it is for, or how many experts there are.
        source: the layout of ``src``, or the family of its model (``"mixtral"``); found out, with evidence, where it
            is not given.
        alpha: adapters only: the alpha of a LoRA whose files do not say it (Megatron-Bridge's export).
        rank: adapters only: the rank that its alpha is divided by, where its factors have several.
        overwrite: replace ``dst`` if it exists.
        dry_run: do everything but write.
        shard_size: checkpoints only: the size of a weights file, such as ``"5GB"`` or a number of bytes; as the
            source is sharded where it is not given.
        dtype: checkpoints only: cast to a type (``"bfloat16"``), or some tensors (``"*.norm.weight=float32"``).
        jobs: checkpoints only: how many workers; as many as there are cores where it is not given.
        resume: checkpoints only: continue what a run that died had begun.
        in_place: checkpoints only: rewrite the headers of ``src`` itself, where tensors only change their names.
            ``dst`` is ``src`` then.
        via: adapters only: allow what is not done by itself. ``"dense"``: a LoRA of full rank, where a family has no
            exact image otherwise; ``"svd:16"``: the best LoRA of a rank; ``"svd:1e-3"``: of the lowest rank within
            a relative error; ``"merge"``: the base at ``model`` with the adapter in its weights, where the result
            cannot hold the adapter. Families that multiply their base weight take its weights as ``model``.
        compact: adapters only: leave out components of a LoRA that add nothing, to rounding (its rank becomes
            the numerical one).
        uniform_rank: adapters only: give all targets one rank, with zeros, so that no ``rank_pattern`` is needed.
        verify: adapters only: compare what every target adds before and after, in float64, before anything is
            written. The report has the largest relative error.
        verify_budget: seconds after which ``verify`` compares what is left by random vectors, and not entry by
            entry; the report names what was compared so.
        max_error: adapters only: the largest relative error that an approximation (``via``) may have; above it the
            conversion is refused and nothing is written.
        merge: adapters only: write the base at ``model`` in the layout, with the adapter's deltas added to its
            weights, instead of an adapter.
        architecture: the class of the model, where its ``config.json`` names none that transformers has.
        rules: rule books to use in place of regraft's: files, names of regraft's own, or books that
            `regraft.load_book` read. ``"built-in"`` stands for all of regraft's, so ``["mine.toml", "built-in"]`` adds
            one to them.
        untie: checkpoints only: where tied weights have other values, keep both, and write
            ``tie_word_embeddings: false`` into the result's config.
        drop: checkpoints only: patterns of names (``"model.mtp.*"``) to leave out, each of them reported. Where tied
            weights have other values, the name of the one to leave out.
        keep: checkpoints only: patterns of names that stay as they are although nothing explains them.
        dequantize: checkpoints only: make quantised weights (FP8, MXFP4, NVFP4) bfloat16 ones. It changes numbers, and
            the report says so.
        key: of what a training run saved (DCP, ``.ckpt``, ``.pt``): the key that the model is below, where several
            fit.
        stage: checkpoints only: do one part of the work, in a folder that all parts share; by as many processes as
            there are parts, on any machines. ``dst`` appears with the ``commit``; where that is in S3, so is the stage.
        part: which part: ``"3/16"`` is number 3 of those from 0 to 15; ``"/16"`` that which the scheduler says
            (JOB_COMPLETION_INDEX). Where it is not given, the scheduler says both (SLURM_ARRAY_TASK_ID and its like).
        commit: put the result of all parts in its place, once they are done.
        abort: end what is staged in ``stage``, and remove it; nothing is converted.
        push: a repository of Hugging Face's hub to upload the result to, too, in one commit: with the model card, which
            gets a section on the layout. huggingface_hub must be installed and know a token.
        runner: checkpoints only: ``"ray"`` hands out the parts to a running cluster of Ray's and commits; ``part``
            (``"/16"``) then says how many there are, and ``stage`` is beside ``dst`` where it is not given.
        address: where the cluster is; the one of this machine (``"auto"``) where it is not given, or the one that Ray
            is connected to already.
        tell: told in one line what is about to be done, with the most memory it may take.
        progress: told how far it is.

    Returns:
        What was done: every target with its rank and scale, and notes.

    Raises:
        BadInputError: the input breaks a rule of its format, or contradicts its config or its base.
        UnmatchedKeysError: keys that no rule matches.
        AmbiguousError: more than one reading fits, with different results.
        RefusedError: what was asked for has no exact equivalent.
        NotEqualError: ``verify`` found that the result is not what it should be.
    """
    given = locals()  # by the names of the class, which a test compares with these
    asked = ConvertOptions(**{field.name: given[field.name] for field in described(ConvertOptions)})
    with below(key):
        return convert_with(src, dst, asked, tell=tell, progress=progress)


def convert_with(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    asked: ConvertOptions,
    *,
    tell: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Report:
    """What `convert` does, its options in one value."""
    if asked.abort:
        return _abort(src, dst, asked)
    if asked.push is not None:
        return _pushed(src, dst, asked, tell, progress)
    if asked.runner is not None:
        return _run_on(src, dst, asked, tell, progress)
    if asked.stage is None:
        names = ("part", "commit")
        _check_unused(asked, names, "they are for work in parts, and no stage is given")
    if asked.in_place:
        no_address(src, "--in-place")
    with resolved(
        src,
        to=asked.to,
        source=asked.source,
        model=asked.model,
        architecture=asked.architecture,
        rules=asked.rules,
        whole=not asked.dry_run,
    ) as found:
        _check_subject(asked, is_adapter=found.is_adapter)
        if found.is_adapter:
            report = _convert_adapters(found, dst, asked, progress)
        else:
            report = _convert_checkpoint(found, dst, asked, tell, progress)
        report.own_rules = list(found.own_rules)
    log_report(report)
    return report


def _pushed(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    asked: ConvertOptions,
    tell: Callable[[str], None] | None,
    progress: Progress | None,
) -> Report:
    """Convert, and send the result to the hub."""
    from regraft.converting.push import push_result
    from regraft.storage.hub_network import check_push

    assert asked.push is not None
    no_address(dst, "--push")
    if asked.stage is not None and not asked.commit:
        _check_unused(asked, ("push",), "it goes with the commit, and not with a part")
    if not asked.dry_run:
        check_push(asked.push, offline=settings()[1])
    report = convert_with(src, dst, replace(asked, push=None), tell=tell, progress=progress)
    if report.written:
        try:
            report.pushed = push_result(asked.push, report)
        except BadInputError as error:
            error.add_note(
                f"the result is whole, in {report.destination}: 'hf upload {asked.push} {report.destination}' sends it"
            )
            raise
    return report


def _run_on(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    asked: ConvertOptions,
    tell: Callable[[str], None] | None,
    progress: Progress | None,
) -> Report:
    """Let a cluster do all parts, and commit them."""
    from regraft.checkpoints.on_ray import Cluster, count_of

    if asked.runner != "ray":
        fix = "give ray; for a scheduler's array, run one --part in each of its elements"
        message = f"there is no runner {str(asked.runner)[:100]!r}"
        raise BadInputError(Finding("option", message, key="runner", fix=fix))
    _check_unused(asked, ("commit",), "a runner commits by itself")
    count = count_of(asked.part)
    src, dst = _anywhere(src), _anywhere(dst)
    stage = f"{dst}.stage" if asked.stage is None else _anywhere(asked.stage)
    asked = replace(asked, runner=None, stage=stage, part="0/1")
    if asked.model is not None:
        asked = replace(asked, model=_anywhere(asked.model))
    if isinstance(asked.rules, (list, tuple)):
        asked = replace(asked, rules=[_book_anywhere(book) for book in asked.rules])
    planned = convert_with(src, dst, replace(asked, dry_run=True), tell=tell)
    if asked.dry_run:
        return planned
    assert planned.checkpoint is not None
    cluster, total = Cluster(asked.address), planned.checkpoint.bytes
    done = [0]

    def advance(part: PartReport) -> None:
        done[0] += part.bytes
        if progress is not None:
            progress(Path(dst).name, done[0], total)

    jobs = asked.jobs or 1
    work = partial(_do_part, src, dst, replace(asked, jobs=jobs), settings())
    cluster.run(work, count or cluster.count(total), jobs, advance)
    report = convert_with(src, dst, replace(asked, part=None, commit=True))
    _abort(src, dst, replace(asked, part=None))
    return report


def _do_part(
    src: str, dst: str, asked: ConvertOptions, told: tuple[str | None, bool], part: str
) -> PartReport:
    """One part, in a process of the cluster; ``told`` is what `settings` says where it is handed out."""
    key, offline = told
    stay_offline(wanted=offline)
    with below(key):
        report = convert_with(src, dst, replace(asked, part=part))
    assert report.checkpoint is not None and report.checkpoint.part is not None
    return report.checkpoint.part


def _anywhere(path: str | os.PathLike[str]) -> str:
    """A path as another process names it; an address, and an id of the hub, stay as they are."""
    text = os.fspath(path)
    if address_of(path) is None and (os.path.lexists(path) or find_cached(text) is None):
        return str(Path(path).absolute())
    return text


def _book_anywhere(book: Any) -> Any:
    is_file = isinstance(book, (str, os.PathLike)) and Path(book).is_file()
    return str(Path(book).absolute()) if is_file else book


def _staged(asked: ConvertOptions) -> Staged | None:
    if asked.stage is None:
        return None
    from regraft.checkpoints.convert import Staged
    from regraft.storage.scheduler import find_share

    address = address_of(asked.stage)
    folder = Path(asked.stage) if address is None else store_for(address)
    return Staged(folder, None if asked.commit else find_share(asked.part, os.environ))


def _abort(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], asked: ConvertOptions
) -> Report:
    """End what is staged."""
    _check_unused(asked, ("part", "commit"), "there is nothing to do after --abort")
    stage = asked.stage
    if stage is None:
        raise BadInputError(Finding("option", "no stage is given to be ended", fix="give --stage"))
    address, target = address_of(stage), address_of(dst)
    if address is not None:
        from regraft.checkpoints.staged_uploads import abort_uploads

        there = abort_uploads(store_for(target or os.fspath(dst)), store_for(address))
    else:
        from regraft.storage import stage as stages
        from regraft.storage.work import cannot_write

        try:
            there = stages.abort(Path(stage))
        except OSError as error:
            raise cannot_write(Path(stage), error) from error
    report = Report(address_of(src) or os.fspath(src), target or os.fspath(dst), written=False)
    report.ended = address or os.fspath(stage) if there else ""
    return report


def _convert_adapters(
    found: Resolved,
    dst: str | os.PathLike[str],
    asked: ConvertOptions,
    progress: Progress | None,
) -> Report:
    from regraft.converting.adapters import Request, convert_adapters

    if asked.merge:
        no_address(dst, "--merge")

    assert found.to is not None
    to, given = found.to, replace(found.given, alpha=asked.alpha, rank=asked.rank)

    def make(place: Path) -> Report:
        return convert_adapters(
            Request(
                src=found.path,
                dst=place,
                to=to,
                given=given,
                model=found.model,
                asked=asked,
                foreign=InstalledTransformers(),
                progress=progress,
            )
        )

    address = address_of(dst)
    return make(Path(dst)) if address is None else _sent(address, asked, make)


def _convert_checkpoint(
    found: Resolved,
    dst: str | os.PathLike[str],
    asked: ConvertOptions,
    tell: Callable[[str], None] | None,
    progress: Progress | None,
) -> Report:
    address = address_of(dst)
    if address is not None and address.startswith("hf://"):
        message = "the hub takes whole results, in one commit"
        fix = f"convert into a folder, with --push {address.removeprefix('hf://')[:200]}"
        raise BadInputError(Finding("bad-address", message, where=address, fix=fix))
    store = None if address is None else store_for(address)
    assert found.to is not None
    src, given = found.path, found.given.layout
    options: dict[str, Any] = {
        "to": found.to.name,
        "source": None if given is None else given.name,
        "model": found.model,
        "untie": asked.untie,
        "foreign": InstalledTransformers(),
    }
    if asked.stage is not None:
        names = ("resume", "in_place", "dequantize", *(["part"] if asked.commit else []))
        _check_unused(asked, names, "not with work in parts")
    if asked.in_place:
        writing = (
            "drop",
            "keep",
            "shard_size",
            "dtype",
            "jobs",
            "resume",
            "overwrite",
            "dequantize",
        )
        _check_unused(asked, writing, "they say how to write, and --in-place writes headers only")
        from regraft.checkpoints.in_place import convert_in_place

        done = convert_in_place(src, Path(dst), dry_run=asked.dry_run, **options)
    else:
        options |= {
            "shard_size": asked.shard_size,
            "dtype": asked.dtype,
            "jobs": asked.jobs,
            "overwrite": asked.overwrite,
            "drop": asked.drop,
            "keep": asked.keep,
            "tell": tell,
            "progress": progress,
        }
        if asked.dequantize:
            _check_unused(asked, ("dry_run", "resume"), "not with --dequantize")
            no_address(dst, "--dequantize")
            from regraft.checkpoints.dequantize import dequantize_checkpoint

            done = dequantize_checkpoint(src, Path(dst), **options)
        else:
            from regraft.checkpoints.convert import convert_checkpoint

            done = convert_checkpoint(
                src,
                Path(dst),
                resume=asked.resume,
                dry_run=asked.dry_run,
                store=store,
                staged=_staged(asked),
                options=asked.given(),
                **options,
            )
    if left := left_behind():
        done.notes.append(left_words(left))
    done.traffic = traffic([] if store is None else [store])
    written = not asked.dry_run and done.part is None
    report = Report(named(str(src)), address or str(dst), checkpoint=done, written=written)
    report.files = list(done.others)
    return report


def _sent(address: str, asked: ConvertOptions, make: Callable[[Path], Report]) -> Report:
    """Let something small be made in a folder that is sent to an address then, its configs last."""
    from tempfile import TemporaryDirectory

    from regraft.checkpoints.upload import check_free, chunks_of

    store, name = store_for(address), file_named(address)
    check_free(store, overwrite=asked.overwrite, name=name)
    with TemporaryDirectory(prefix="regraft-") as folder:
        made = Path(folder) / (name or "made")
        report = make(made)
        report.destination = address
        files = [made] if name else [path for path in sorted(made.rglob("*")) if path.is_file()]
        for path in [] if asked.dry_run else sorted(files, key=lambda path: path.suffix == ".json"):
            key = name or path.relative_to(made).as_posix()
            with path.open("rb") as file:
                store.stream(key, chunks_of(file), path.stat().st_size)
        return report


def _check_subject(asked: ConvertOptions, *, is_adapter: bool) -> None:
    """Raise ``BadInputError`` for options that are for the other kind of source only."""
    subject, other, one = (
        ("adapters", "checkpoints", "an adapter")
        if is_adapter
        else ("checkpoints", "adapters", "a checkpoint")
    )
    wrong = [
        field.flag
        for field in described(ConvertOptions)
        if field.option.only not in (None, subject) and getattr(asked, field.name) != field.default
    ]
    if wrong:
        message = f"{' and '.join(wrong)}: only for {other}, and SRC is {one}"
        raise BadInputError(Finding("option", message))


def _check_unused(asked: ConvertOptions, names: Collection[str], why: str) -> None:
    """Raise ``BadInputError`` for options that were given and do not apply."""
    wrong = [
        field.flag
        for field in described(ConvertOptions)
        if field.name in names and getattr(asked, field.name) != field.default
    ]
    if wrong:
        raise BadInputError(Finding("option", f"{' and '.join(wrong)}: {why}"))
