"""Merging: adapters added to a base, each with a weight, as a new checkpoint like the base."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from math import isfinite
from pathlib import Path

from regraft.bridges.transformers.files import InstalledTransformers
from regraft.checkpoints.casting import parse_casts
from regraft.checkpoints.prepare import Prepared, prepare
from regraft.checkpoints.reads import check_reads
from regraft.checkpoints.sharding import parse_size
from regraft.checkpoints.source import is_checkpoint
from regraft.checkpoints.ties import is_input, is_output
from regraft.dialects.names import SourceName, source_named
from regraft.dialects.opening import Opening, find_source
from regraft.errors import BadInputError, Finding, RefusedError, RegraftError
from regraft.merging.add import Checked, add_all, check
from regraft.merging.addends import Addend
from regraft.merging.base import Base, open_base, open_result, prepare_like, write_prepared
from regraft.merging.image import image_addends
from regraft.merging.language import language_addend
from regraft.planning.model import Foreign
from regraft.report import AdapterReport, Report, Target, logged
from regraft.rules.book import Rules, only_books
from regraft.rules.said import saying
from regraft.sources.places import absent
from regraft.storage.beside import narrow
from regraft.storage.folder import check_destination
from regraft.values import Struct

Progress = Callable[[str, int, int], None]
Path_ = str | os.PathLike[str]

_HEAD = "lm_head.weight"


@logged
def merge(
    base: Path_,
    adapters: Sequence[Path_ | tuple[Path_, float]],
    dst: Path_,
    *,
    dtype: str | Sequence[str] = (),
    clip_weight: float | None = None,
    source: str | None = None,
    shard_size: str | int | None = None,
    jobs: int | None = None,
    architecture: str | None = None,
    rules: Rules = (),
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Add adapters to a base, each with a weight, and write a checkpoint like the base.

    What all adapters add to a tensor is summed up in float64 and rounded once, to the tensor's type; tensors that
    nothing is added to are the base's, bit for bit. Every delta is the one that its adapter has on the base as it is,
    also where it depends on the base's weights (DoRA).

    Args:
        base: a language model (a folder, or a weights file), or an image or video model: one file with all parts or
            with one, or a folder of diffusers.
        adapters: paths, or pairs of a path and a weight that multiplies what the adapter adds; 1 where none is
            given. Of language models adapters of any dialect and family, in any layout; of image models files of
            kohya, diffusers, ComfyUI and the others that `regraft.convert` reads.
        dst: the folder to write, or the file where ``base`` is one. It appears whole or not at all.
        dtype: cast, as `regraft.convert` does; a sum is then rounded to this type, once.
        clip_weight: the weight of what adapters add to text encoders, in place of each adapter's own.
        source: the layout, the dialect or the family of the adapters; found out where it is not given.
        shard_size: the size of a weights file; as the base is sharded where it is not given.
        jobs: how many workers copy; as many as there are cores where it is not given.
        architecture: the class of the model, where its ``config.json`` names none that transformers has.
        rules: rule books to use in place of regraft's, as `regraft.convert` takes them.
        overwrite: replace ``dst`` if it exists.
        dry_run: do everything but write; one slice of every delta is computed.
        progress: told how far it is.

    Returns:
        What was done: of each adapter the tensors that it changed, and the checkpoint that was written.

    Raises:
        BadInputError: an adapter is for another base: shapes, names or families do not fit, or nothing of it is for a
            weight of the base. All adapters are looked at before anything is written.
        RefusedError: it cannot be added to weights (a prompt, a quantised base), or a sum leaves the range of a type.
    """
    with ExitStack() as stack:
        stack.enter_context(only_books(rules))
        stack.enter_context(saying(architecture=architecture))
        given = source_named(source)
        stack.enter_context(saying(family=given.family))
        paths = [_weighted(adapter) for adapter in adapters]
        base_path, dst_path = Path(base), Path(os.path.realpath(dst))
        _check_given(base_path, paths, clip_weight)
        if not dry_run and base_path.is_dir() and not dst_path.is_file():
            # Before anything is opened, for that may take long; a file's name is looked at when the base is known.
            for path in (base_path, *(path for path, _ in paths)):
                check_destination(path, dst_path, overwrite=overwrite)
        casts = parse_casts(dtype)
        limit = parse_size(shard_size) if isinstance(shard_size, str) else shard_size
        foreign = InstalledTransformers()
        model = open_base(base_path, None, foreign)
        addends, failed = _open_all(model, paths, clip_weight, given, foreign)
        notes = _untie(model, addends)
        checked = check(model, addends, failed)
        ready, name = prepare_like(model, dst_path, casts, limit)
        ready.report.notes += notes
        report = Report(str(base_path), str(dst_path), checkpoint=ready.report, written=not dry_run)
        report.adapters = _reports(addends, checked, model)
        report.files = list(ready.report.others)
        ready.report.carried -= len(checked.asked)
        if dry_run:
            return report
        for path in (base_path, *(path for path, _ in paths)):
            check_destination(path, dst_path, overwrite=overwrite, file=name is not None)
        write = _Write(dst_path, name, overwrite, jobs, progress)
        write.run(model, addends, checked, ready)
        return report


def merge_into(
    base: Path,
    opening: Opening,
    dst: Path,
    to: str,
    *,
    given: SourceName,
    foreign: Foreign,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Add one adapter to a language model's base, and write that in a layout.

    The base is converted file to file, and each sum is made where its tensor stands then.

    Raises what `merge` and `regraft.convert` raise; ``RefusedError`` where tied weights would come apart.
    """
    dst = Path(os.path.realpath(dst))
    if dst.suffix == ".safetensors" and not dst.is_dir():
        message = "a merged model is a folder, and this is a file's name"
        fix = "name a folder to write"
        raise BadInputError(Finding("destination-is-file", message, where=str(dst), fix=fix))
    for path in (opening.src, base):
        check_destination(path, dst, overwrite=overwrite)
    folder = base if base.is_dir() else base.parent
    ready = prepare(folder, to, model=base, foreign=foreign)
    model = open_result(ready, to)
    addend = language_addend(opening, model, 1.0, given, foreign)
    _untie(model, [addend])
    checked = check(model, [addend])
    report = Report(str(opening.src), str(dst), checkpoint=ready.report, written=not dry_run)
    report.adapters = _reports([addend], checked, model)
    report.files = list(ready.report.others)
    if dry_run:
        return report
    if ready.plan is not None:
        check_reads(ready.plan, ready.source)
    write = _Write(dst, None, overwrite, None, progress)
    write.run(model, [addend], checked, ready)
    return report


class _Write(Struct, frozen=True):
    """Where a result goes, and how."""

    dst: Path
    name: str | None
    """The file's, where it is one."""
    overwrite: bool
    jobs: int | None
    progress: Progress | None

    def run(
        self, model: Base, addends: Sequence[Addend], checked: Checked, ready: Prepared
    ) -> None:
        """Write the base, and add to it before it appears; it gets no more permissions than the adapters have."""

        def finish(folder: Path) -> None:
            add_all(model, addends, checked, ready, folder, self.progress)
            narrow(folder, [path for addend in addends for path in addend.files])

        write_prepared(
            ready,
            self.dst,
            self.name,
            overwrite=self.overwrite,
            jobs=self.jobs,
            progress=self.progress,
            finish=finish,
        )


def _weighted(adapter: Path_ | tuple[Path_, float]) -> tuple[Path, float]:
    if isinstance(adapter, tuple):
        return Path(adapter[0]), float(adapter[1])
    return Path(adapter), 1.0


def _check_given(
    base: Path, adapters: Sequence[tuple[Path, float]], clip_weight: float | None
) -> None:
    findings = []
    if not adapters:
        findings.append(Finding("option", "there is no adapter to merge", fix="name one"))
    findings += absent(base)
    if base.exists() and not is_checkpoint(base):
        message, fix = "this is no checkpoint of a model", "name the base first, then the adapters"
        findings.append(Finding("no-weights", message, where=str(base), fix=fix))
    for path, _ in adapters:
        findings += absent(path)
    weights = [*((str(path), weight) for path, weight in adapters), (None, clip_weight or 0.0)]
    findings += [
        Finding(
            "option",
            f"its weight is {weight}, and no finite number"
            if where
            else "clip_weight is no finite number",
            where=where,
            fix="give a number, such as 0.8",
        )
        for where, weight in weights
        if not isfinite(weight)
    ]
    if findings:
        raise BadInputError(findings)


def _open_all(
    base: Base,
    adapters: Sequence[tuple[Path, float]],
    clip_weight: float | None,
    given: SourceName,
    foreign: Foreign,
) -> tuple[list[Addend], list[RegraftError]]:
    """Every adapter as what it adds, and why some cannot be read as that."""
    if clip_weight is not None and not base.is_image:
        message = "a weight for text encoders is for image and video models, and the base is none"
        raise BadInputError(Finding("option", message, where=str(base.path)))
    made: list[Addend] = []
    failed: list[RegraftError] = []
    for path, weight in adapters:
        try:
            opening: Opening = find_source(path, given)
            if base.is_image:
                made += image_addends(opening, base, weight, clip_weight)
            else:
                made.append(language_addend(opening, base, weight, given, foreign))
        except RegraftError as error:
            failed.append(error)
    if not made and not failed:
        message = "every weight is 0, so nothing would be added"
        raise BadInputError(Finding("option", message, fix="give a weight other than 0"))
    return made, failed


# -- tied weights


def _untie(base: Base, addends: Sequence[Addend]) -> list[str]:
    """Give a tied output a tensor of its own where adapters make it another than the input embeddings.

    PEFT adapts one module and leaves the other as it is, save trained rows, which are those of both, and where the
    adapter's config has ``ensure_weight_tying``.

    Raises ``RefusedError`` where adapters disagree.
    """
    if base.is_image or any(is_output(name) for name in base.rows):
        return []
    owner = next((name for name in base.rows if is_input(name)), None)
    if owner is None:
        return []
    heads: list[str] = []
    apart, tied = False, False
    for addend in addends:
        changed = [name for name in _asked(addend) if base.find(name) == base.rows[owner]]
        changed += [
            name
            for name, r in addend.replaced.items()
            if r.rows is None and base.find(name) == base.rows[owner]
        ]
        names = [*_asked(addend), *addend.replaced]
        heads += [name for name in names if is_output(name) and base.find(name) is None]
        apart |= bool(changed) and not addend.ties
        tied |= bool(changed) and addend.ties
    classes = [] if base.model is None else base.model.architectures()
    if apart and not heads and any(name.endswith(_WITH_HEAD) for name in classes):
        heads = [_HEAD]
    if not heads:
        return []
    if tied:
        raise RefusedError(
            Finding(
                "no-image",
                "one adapter changes tied weights together (ensure_weight_tying), and another one of them alone",
                where=str(base.path),
                key=owner,
                fix="merge them one after the other",
            )
        )
    if not base.source.files:
        raise RefusedError(_comes_apart(heads[0], owner, base))
    base.untie(heads[0], base.rows[owner])
    for addend in addends:
        for name, replacement in list(addend.replaced.items()):
            if replacement.rows is not None and base.find(name) == base.rows[owner]:
                addend.replaced[heads[0]] = replacement
    return [
        f"{heads[0]} was tied to {owner}, and is a tensor of its own now: an adapter changes one of the two alone"
    ]


def _comes_apart(head: str, owner: str, base: Base) -> Finding:
    """That a layout is asked for together with a tensor that the base does not have."""
    return Finding(
        "no-image",
        f"{head} is tied to {owner}, and the adapter changes one of the two alone",
        where=str(base.path),
        key=owner,
        fix="merge first ('regraft merge', which gives it a tensor of its own), and convert the result",
    )


_WITH_HEAD = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


def _asked(addend: Addend) -> list[str]:
    """The tensors that an adapter may add to."""
    names: dict[str, None] = {}

    def note(asked: Sequence[str]) -> str:
        names.update(dict.fromkeys(asked))
        return "nothing"

    for _ in addend.pieces(note):  # type: ignore[arg-type]
        pass
    return list(names)


# -- the report


def _reports(addends: Sequence[Addend], checked: Checked, base: Base) -> list[AdapterReport]:
    made: dict[str, AdapterReport] = {}
    for number, addend in enumerate(addends):
        report = made.get(addend.name)
        if report is None:
            report = made[addend.name] = AdapterReport(
                addend.name,
                addend.peft_type,
                addend.layout,
                base.layout or addend.layout,
                list(addend.evidence),
                tensors_in=addend.tensors,
            )
        report.targets += [
            Target(
                key, addend.ranks.get(key, 0), 0, addend.weight, rule, exact=False, rung="merged"
            )
            for key, rule in checked.keys.get(number, {}).items()
        ]
        report.carried += len(addend.replaced)
        report.notes += addend.notes
    return list(made.values())
