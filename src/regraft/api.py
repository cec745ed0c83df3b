"""The functions that most users need."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.adapters.convert import Converted, convert_adapter
from regraft.adapters.detect import load_model
from regraft.adapters.protocol import Opened
from regraft.adapters.ranks import Options
from regraft.bridges.transformers.files import InstalledTransformers
from regraft.checkpoints.convert import convert_checkpoint
from regraft.checkpoints.dequantize import dequantize_checkpoint
from regraft.checkpoints.in_place import convert_in_place
from regraft.checkpoints.source import is_checkpoint
from regraft.dialects.base import Found
from regraft.dialects.names import SourceName, layout_named, source_named
from regraft.dialects.opening import Opening, Target, find_source, reopened
from regraft.errors import BadInputError, Finding, NotEqualError, RegraftError
from regraft.layouts.graph import going_over
from regraft.layouts.names import Layout
from regraft.planning.model import ModelConfig, taken_for
from regraft.report import Report
from regraft.rules.book import Rules, only_books, only_family
from regraft.storage.beside import narrow
from regraft.storage.folder import check_destination, copy_file, staged_file, staged_folder
from regraft.storage.stale import sort_files
from regraft.storage.stamp import Stamp

if TYPE_CHECKING:
    from regraft.checking.certificate import Budget
    from regraft.dialects.peft.inspect import Inspection

Progress = Callable[[str, int, int], None]
"""Told what is done, how much of it, and how much there is."""


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: str,
    model: str | os.PathLike[str] | None = None,
    source: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    shard_size: str | int | None = None,
    dtype: str | list[str] | None = None,
    jobs: int | None = None,
    resume: bool = False,
    in_place: bool = False,
    via: str | None = None,
    compact: bool = False,
    uniform_rank: bool = False,
    verify: bool = False,
    verify_budget: float = 300.0,
    merge: bool = False,
    architecture: str | None = None,
    rules: Rules = (),
    untie: bool = False,
    drop: Sequence[str] = (),
    keep: Sequence[str] = (),
    dequantize: bool = False,
    tell: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Convert an adapter, a folder of adapters, or a whole checkpoint to another layout.

    Args:
        src: a folder that PEFT's ``save_pretrained`` wrote, one ``.safetensors`` (or ``adapter_model.bin``) with its
            ``adapter_config.json`` beside it, or a folder with several adapters in sub-folders; or a model's
            checkpoint: a folder, or one ``.safetensors`` or ``.bin`` file.
        dst: the folder to write. It appears whole or not at all. Where ``src`` is one weights file of a model, a
            name that ends in ``.safetensors`` is the file to write.
        to: the layout to convert to, such as ``"transformers-v5"``: one that a rule book leads to, of an adapter also
            with the release of PEFT that it is for (``"transformers-v4/peft-0.18"``). ``regraft layouts`` lists them.
        model: the base model's folder or its ``config.json``, of either version. Needed where the adapter itself
            does not tell what it is for, or how many experts there are.
        source: the layout of ``src``, or the family of its model (``"mixtral"``); found out, with evidence, where it
            is not given.
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
            a relative error. Families that multiply their base weight take its weights as ``model``.
        compact: adapters only: leave out components of a LoRA that add nothing, to rounding (its rank becomes
            the numerical one).
        uniform_rank: adapters only: give all targets one rank, with zeros, so that no ``rank_pattern`` is needed.
        verify: adapters only: compare what every target adds before and after, in float64, before anything is
            written. The report has the largest relative error.
        verify_budget: seconds after which ``verify`` compares what is left by random vectors, and not entry by
            entry; the report names what was compared so.
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
        tell: told in one line what is about to be done, with the most memory it may take.
        progress: told how far it is.

    Returns:
        What was done: every target with its rank and scale, and notes.

    Raises:
        BadInputError: the input breaks a rule of its format, or contradicts its config or its base.
        UnmatchedKeysError: keys that no rule and no carry-over explains.
        AmbiguousError: more than one reading fits, with different results.
        RefusedError: what was asked for has no exact image.
        NotEqualError: ``verify`` found that the result is not what it should be.
    """
    with ExitStack() as stack:
        stack.enter_context(only_books(rules))
        stack.enter_context(taken_for(architecture))
        asked = Options(via, compact, uniform_rank)
        src_path, dst_path = Path(src), Path(dst)
        adapter = not is_checkpoint(src_path)
        layout, given = layout_named(to, adapter=adapter), source_named(source, adapter=adapter)
        source_layout = given.layout
        stack.enter_context(only_family(given.family))
        stack.enter_context(going_over(given.via))
        if not adapter:
            told = Path(model) if model is not None else None
            options: dict[str, Any] = {"to": layout.name, "model": told, "dry_run": dry_run}
            options["foreign"] = InstalledTransformers()
            options["source"] = source_layout.name if source_layout is not None else None
            options["untie"] = untie
            if in_place:
                _check_options(
                    "they say how to write, and --in-place writes headers only",
                    drop=drop,
                    keep=keep,
                    shard_size=shard_size,
                    dtype=dtype,
                    jobs=jobs,
                    resume=resume,
                    overwrite=overwrite,
                    dequantize=dequantize,
                )
                done = convert_in_place(src_path, dst_path, **options)
            elif dequantize:
                _check_options("they do not go with --dequantize", dry_run=dry_run, resume=resume)
                del options["dry_run"]
                done = dequantize_checkpoint(
                    src_path,
                    dst_path,
                    shard_size=shard_size,
                    dtype=dtype,
                    jobs=jobs,
                    overwrite=overwrite,
                    drop=drop,
                    keep=keep,
                    tell=tell,
                    progress=progress,
                    **options,
                )
            else:
                done = convert_checkpoint(
                    src_path,
                    dst_path,
                    shard_size=shard_size,
                    dtype=dtype,
                    jobs=jobs,
                    resume=resume,
                    overwrite=overwrite,
                    drop=drop,
                    keep=keep,
                    tell=tell,
                    progress=progress,
                    **options,
                )
            report = Report(str(src_path), str(dst_path), checkpoint=done, written=not dry_run)
            report.files = list(done.others)
            return report
        _check_options(
            "only for checkpoints, and SRC is none",
            shard_size=shard_size,
            dtype=dtype,
            jobs=jobs,
            resume=resume,
            in_place=in_place,
            untie=untie,
            drop=drop,
            keep=keep,
            dequantize=dequantize,
        )
        opening = find_source(src_path, given)
        found = opening.found
        foreign = InstalledTransformers()
        if merge:
            return _merge(opening, dst_path, layout, given, model, overwrite, progress, foreign)
        target = Target.of(layout, opening, dst_path)
        check_destination(src_path, dst_path, overwrite, file=target.file)
        base = Path(model) if model is not None else None
        config: ModelConfig | None = None
        report = Report(str(src_path), str(dst_path), written=not dry_run)
        report.files = [str(path) for path in found.others]
        left = _budget(verify_budget) if verify else None
        converted: list[tuple[Opened, Converted]] = []
        stamps: list[Stamp] = []
        findings: list[Finding] = []
        failed: list[RegraftError] = []
        for number, folder in enumerate(found.folders):
            if progress is not None:
                progress(folder.name, number, len(found.folders))
            stamps += _stamp(folder, found)
            try:
                opened = opening.open(folder)
                by_itself = getattr(opened, "convert", None)
                if by_itself is not None:
                    _check_options("not for LoRAs of image models", verify=verify)
                    result = by_itself(layout, given.family, base, asked)
                else:
                    config = load_model(base) if base is not None and config is None else config
                    result = convert_adapter(
                        opened,
                        layout,
                        config,
                        source_layout,
                        asked,
                        foreign,
                        packing=given.packing,
                        into=target.into,
                    )
            except RegraftError as error:
                failed.append(error)
                findings += error.findings
                continue
            if not result.report.copied or not dry_run:
                _note_values(opened, result)
            if left is not None:
                _certify(opened, result, target, config, via, foreign, left, given.packing)
            converted.append((opened, result))
            report.adapters.append(result.report)
        if failed:
            kinds = {type(error) for error in failed}
            raise (kinds.pop() if len(kinds) == 1 else BadInputError)(findings)
        _note_company(report, [result for _, result in converted])
        others = list(found.others)
        if not all(result.report.copied for _, result in converted):
            others, notes = sort_files(found.root, found.others)
            report.adapters[0].notes += notes
        if target.file and others:
            report.adapters[0].notes.append(
                f"left out, because one file is written: {', '.join(map(str, others))}"
            )
            others = []
        report.files = [str(path) for path in others]
        if not dry_run:
            _write(found.root, others, dst_path, target, converted, stamps, overwrite)
        if progress is not None:
            progress("", len(found.folders), len(found.folders))
        return report


def inspect(
    src: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    source: str | None = None,
    architecture: str | None = None,
    rules: Rules = (),
) -> Inspection:
    """Tell what an adapter is, or each adapter of a folder.

    What is wrong with an adapter that can be opened stands in its ``problems``; a base model that
    is not known is no problem, only less is told.

    Args:
        src: what `regraft.convert` takes.
        model: the base model's folder or its ``config.json``.
        source: the dialect of ``src``, or the family of its model; found out where it is not given.
        architecture: the class of the model, where its ``config.json`` names none that transformers has.
        rules: rule books to use in place of regraft's, as `regraft.convert` takes them.

    Raises:
        BadInputError: there is no adapter, or it cannot be opened, or ``model`` is no config.
    """
    from regraft.dialects.peft.inspect import inspect as inspect_adapters

    with only_books(rules), taken_for(architecture):
        said = source_named(source)
        with only_family(said.family):
            return inspect_adapters(src, model=model, foreign=InstalledTransformers(), said=said)


def _merge(
    opening: Opening,
    dst: Path,
    layout: Layout,
    given: SourceName,
    model: str | os.PathLike[str] | None,
    overwrite: bool,
    progress: Progress | None,
    foreign: InstalledTransformers,
) -> Report:
    from regraft.merging import merge_adapter

    src = opening.src
    if model is None or len(opening.found.folders) != 1:
        raise BadInputError(
            Finding(
                "option",
                "merging takes one adapter, and its base with weights",
                where=str(src),
                fix="give the base's folder as --model, and one adapter's folder as SRC",
            )
        )
    _check_folder(dst)
    check_destination(src, dst, overwrite)
    check_destination(Path(model), dst, overwrite)
    files = [stamp.path for stamp in _stamp(opening.found.folders[0], opening.found)]
    adapter, checkpoint = merge_adapter(
        opening.one(),
        dst,
        layout,
        Path(model),
        given.layout,
        overwrite,
        progress,
        foreign,
        files,
    )
    report = Report(str(src), str(dst), [adapter], checkpoint=checkpoint)
    report.files = list(checkpoint.others)
    return report


def _budget(seconds: float) -> Budget:
    from regraft.checking.certificate import Budget

    return Budget(seconds)


def _certify(
    source: Opened,
    result: Converted,
    target: Target,
    model: ModelConfig | None,
    via: str | None,
    foreign: InstalledTransformers,
    left: Budget,
    packing: str | None,
) -> None:
    """Compare what an adapter adds before and after; an approximation that was asked for is only measured.

    The result is opened by its dialect; where that needs files, they are written for this and removed.
    """
    from regraft.checking.certificate import TOLERANCE, compare

    tolerance = TOLERANCE if via is None or via == "dense" else math.inf
    with reopened(target.dialect, source, result) as made:
        done = compare(source, made, model, tolerance, foreign, left, packing)
    result.report.error = done.error
    result.report.verified = len(done.targets) + done.others
    result.report.sampled = done.sampled
    if not done.equal:
        raise NotEqualError(done.differences)


def _note_company(report: Report, results: list[Converted]) -> None:
    """Adapters that PEFT cannot hold on one model at a time."""
    targets = {tuple(sorted(r.config.get("target_parameters") or ())) for r in results}
    if len(targets - {()}) > 1:
        report.adapters[0].notes.append(
            "these adapters name different target_parameters: load each on a model of its own, because PEFT "
            "does not hold two such adapters on one model"
        )


def _check_options(why: str, **given: object) -> None:
    wrong = [name for name, value in given.items() if value]
    if wrong:
        raise BadInputError(Finding("option", f"{' and '.join(wrong)}: {why}"))


def _note_values(source: Opened, result: Converted) -> None:
    for name, tensor in source.tensors.items():
        if tensor.dtype.kind in "fV" and not np.isfinite(
            np.add.reduce(tensor, axis=None, dtype=float)
        ):
            bad = ~np.isfinite(tensor.astype(np.float32))
            if bad.any():
                result.report.notes.append(
                    f"{name} holds {int(bad.sum())} values that are NaN or infinite; they were kept"
                )


def _check_folder(dst: Path) -> None:
    if dst.suffix == ".safetensors" and not dst.is_dir():
        message = "a merged model is a folder, and this is a file's name"
        fix = "name a folder to write"
        raise BadInputError(Finding("destination-is-file", message, where=str(dst), fix=fix))


def _stamp(folder: Path, found: Found) -> list[Stamp]:
    """What an adapter's files are now, to be compared when the result is written."""
    if found.weights is not None:
        return [Stamp.of(path) for path in (found.weights, *found.beside)]
    others = {found.root / path for path in found.others}
    files = (path for path in folder.iterdir() if path.is_file() and path not in others)
    return [Stamp.of(path) for path in files]


def _write(
    root: Path,
    others: Sequence[Path],
    dst: Path,
    target: Target,
    converted: list[tuple[Opened, Converted]],
    stamps: list[Stamp],
    overwrite: bool,
) -> None:
    size = sum((root / path).stat().st_size for path in others)
    for _, result in converted:
        size += sum(t.nbytes for t in (*result.tensors.values(), *result.aside.values()))
    staged_place = staged_file if target.file else staged_folder
    with staged_place(dst, overwrite, size) as staged:
        for source, result in converted:
            inner = staged / source.name
            inner.mkdir(parents=True, exist_ok=True)
            target.dialect.save(inner, source, result)
        for path in others:
            (staged / path).parent.mkdir(parents=True, exist_ok=True)
            copy_file(root / path, staged / path)
        narrow(staged, [stamp.path for stamp in stamps], kept=others)
        for stamp in stamps:
            stamp.check()
