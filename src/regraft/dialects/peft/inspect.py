"""Telling what an adapter is, without converting it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from regraft.adapters.detect import (
    Known,
    books_by_keys,
    detect_layout,
    find_books,
)
from regraft.adapters.families.lora_variants import changes_base
from regraft.adapters.form import Array, Factors
from regraft.adapters.home import at_home
from regraft.adapters.protocol import Names, Opened
from regraft.adapters.provenance import read_remembered
from regraft.dialects.alike import one_of_each
from regraft.dialects.base import Dialect
from regraft.dialects.names import SourceName
from regraft.dialects.opening import Opening, find_source
from regraft.dialects.peft.config import LoraConfig, targets_parameter
from regraft.dialects.peft.reading import FactorReader
from regraft.dialects.peft.scan import Scan, scan_names
from regraft.dialects.peft.source import Source, names_of_scan, open_adapter
from regraft.dialects.tool_files import parameter_of
from regraft.dialects.unread import find_dialect
from regraft.errors import AmbiguousError, BadInputError, Finding, RefusedError, RegraftError
from regraft.errors.codes import Status
from regraft.layouts.names import DEFAULT
from regraft.names.patterns import Pattern, group_alike
from regraft.planning.detect import detect_layouts
from regraft.planning.model import Foreign, ModelConfig, load_model
from regraft.planning.side import Side
from regraft.rules.book import Book
from regraft.shown import Shown

DEPTH = 5
"""How many folders deep adapters are looked for."""


@dataclass(frozen=True, slots=True)
class TargetPattern:
    """Adapted tensors of the base that are alike."""

    pattern: str
    """Their keys, such as ``model.layers.{0..31}.mlp.experts.{0..7}.w1.weight``."""
    count: int
    keys: Pattern = field(repr=False)
    """The keys themselves; no part of the plain data."""
    shape: tuple[int, ...] | None
    """The base tensor's shape; ``None`` where the factors alone don't tell."""
    rank: int
    alpha: int | float
    scale: float
    """What multiplies ``B @ A``."""
    dtype: str
    parameter: bool
    """Whether PEFT adapts it through ``target_parameters``."""


@dataclass(frozen=True, slots=True)
class TensorPattern:
    """Tensors of the file that are no LoRA factors and are alike."""

    pattern: str
    count: int
    keys: Pattern = field(repr=False)
    """The keys themselves; no part of the plain data."""
    shape: tuple[int, ...]
    dtype: str


@dataclass(slots=True)
class Inspected:
    """What one adapter is."""

    name: str
    """The sub-folder, or an empty string."""
    peft_type: str
    layouts: list[str]
    """The layouts it may be in: all where it is the same in each, none where nothing is known."""
    evidence: list[str]
    """Why it was taken for what it is."""
    packing: str | None
    """How stacked experts are packed, where there are any."""
    base_model: str | None
    """What the adapter's own config calls its base."""
    model_type: str | None
    peft_version: str | None
    rslora: bool
    variants: list[str]
    """What makes it more than a plain LoRA."""
    tensors: int
    bytes: int
    dtypes: dict[str, int]
    targets: list[TargetPattern] = field(default_factory=list)
    others: list[TensorPattern] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)
    """What is wrong with it."""
    dialect: str = DEFAULT
    """The dialect that its files are written in."""

    @property
    def layout(self) -> str | None:
        """The layout, where it can be one only."""
        return self.layouts[0] if len(self.layouts) == 1 else None

    @property
    def ranks(self) -> list[int]:
        """The ranks there are, smallest first."""
        return sorted({target.rank for target in self.targets})

    @property
    def alphas(self) -> list[int | float]:
        """The alphas there are, smallest first."""
        return sorted({target.alpha for target in self.targets})

    @property
    def scales(self) -> list[float]:
        """The scales there are, smallest first."""
        return sorted({target.scale for target in self.targets})


@dataclass(slots=True, repr=False)
class Inspection(Shown):
    """What the adapters of a source are; ``to_dict`` gives plain data."""

    source: str
    adapters: list[Inspected] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    """Other files beside them."""
    deeper: list[str] = field(default_factory=list)
    """Adapters that were not looked into, because they are too many folders deep inside."""

    @property
    def problems(self) -> list[Finding]:
        """What is wrong, of all adapters."""
        return [problem for adapter in self.adapters for problem in adapter.problems]

    @property
    def status(self) -> Status:
        """The exit status of the command that found it."""
        return Status.DONE if not self.problems else Status.BAD_INPUT

    def to_dict(self) -> dict[str, Any]:
        """The inspection as plain data."""
        data = asdict(self)
        for plain, adapter in zip(data["adapters"], self.adapters, strict=True):
            plain["layout"] = adapter.layout
            plain["ranks"], plain["alphas"] = adapter.ranks, adapter.alphas
            plain["scales"] = adapter.scales
            for alike in (*plain["targets"], *plain["others"]):
                del alike["keys"]
            plain["problems"] = [problem.to_dict() for problem in adapter.problems]
        return data


def inspect(
    src: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    foreign: Foreign | None = None,
    said: SourceName | None = None,
) -> Inspection:
    """Tell what an adapter is, or each adapter of a folder.

    What is wrong with an adapter that can be opened stands in its ``problems``; a base model that
    is not known is no problem, only less is told.

    Args:
        src: what `regraft.convert` takes.
        model: the base model's folder or its ``config.json``.
        foreign: asked for models that the library does not know.
        said: what was said of the source.

    Raises:
        BadInputError: there is no adapter, or it cannot be opened, or ``model`` is no config.
    """
    opening = find_source(Path(src), said)
    found = opening.found
    config = load_model(Path(model)) if model is not None else None
    findings: list[Finding] = []
    failed: list[RegraftError] = []
    inspection = Inspection(str(src), files=[str(path) for path in found.others])
    for folder in found.folders:
        inside = folder.relative_to(found.root)
        if len(inside.parts) > DEPTH:
            inspection.deeper.append(str(inside))
            continue
        try:
            opened = _open(opening, folder)
        except RegraftError as error:
            failed.append(error)
            findings += error.findings
            continue
        try:
            opened, moved = at_home(opened, config, foreign)
            astray = []
        except RegraftError as error:
            moved, astray = None, list(error.findings)
        if isinstance(opened, Source):
            told = inspect_adapter(opened, config, foreign)
            if opened.opened_by != DEFAULT:
                told.dialect = opened.opened_by
                title = f"it is written as by {opened.opened_by}: {opening.dialect.title}"
                told.evidence = [title, *opened.evidence, *told.evidence]
        else:
            told = _inspect_other(opening.dialect, opened, config, foreign)
        told.problems += astray
        told.notes += [moved] if moved is not None else []
        inspection.adapters.append(told)
    if failed:
        raise type(failed[0])(findings)
    return inspection


def _open(opening: Opening, folder: Path) -> Opened:
    if opening.dialect.name == DEFAULT:
        return open_adapter(folder, opening.found.root, opening.found.weights, foreign=True)
    return opening.open(folder)


def _inspect_other(
    dialect: Dialect, opened: Opened, model: ModelConfig | None, foreign: Foreign | None
) -> Inspected:
    """Tell what an adapter of another dialect is."""
    tensors = list(opened.tensors.values())
    names, hints = opened.names(), opened.hints()
    known, books, evidence = _find_model(names, opened, model, foreign)
    result = Inspected(
        name=opened.name,
        peft_type=opened.kind,
        layouts=[],
        evidence=[f"it is written as by {dialect.name}: {dialect.title}", *evidence],
        packing=None,
        base_model=hints.base,
        model_type=known.model_type if known is not None else hints.model_type,
        peft_version=None,
        rslora=False,
        variants=[],
        tensors=len(tensors),
        bytes=sum(tensor.nbytes for tensor in tensors),
        dtypes=dict(Counter(tensor.dtype.name for tensor in tensors).most_common()),
        dialect=dialect.name,
    )
    if books:
        result.layouts = _find_layouts(known, names, opened, books, result)
    elif hints.layout is not None:
        result.layouts = [hints.layout]
        result.evidence.append(f"layout: {hints.layout} (the form of the file)")
    elif hints.remembered.layout:
        result.layouts = [hints.remembered.layout]
        result.evidence.append(f"layout: {hints.remembered.layout} (regraft wrote it)")
    here = known.books if known is not None else ()
    scopes = known.scopes if known is not None else {}
    side = Side(here, result.layout or next((book.left for book in here), ""), scopes)
    try:
        adapter = opened.read(side).adapter
    except AmbiguousError as error:
        result.notes += [f"{f.key}: {f.message}" for f in error.findings]
        return result
    except RegraftError as error:
        result.problems += error.findings
        return result
    if adapter.factors is not None:
        result.targets = _patterns(adapter.factors, ())
    return result


def inspect_adapter(
    source: Source, model: ModelConfig | None = None, foreign: Foreign | None = None
) -> Inspected:
    """Tell what one opened adapter is."""
    config = source.config
    lora = source.peft_type == "LORA"
    names, tensors = list(source.tensors), list(source.tensors.values())
    scan, problems = scan_names(names, source.where, lora=lora)
    own = source.opened_by == DEFAULT
    dialect = (
        find_dialect(config, one_of_each(source.tensors), source.tensors, Path(source.where))
        if own
        else None
    )
    if dialect is not None:
        problems = [dialect]
    known, books, evidence = _find_model(names_of_scan(scan), source, model, foreign)
    result = Inspected(
        name=source.name,
        peft_type=source.peft_type,
        layouts=[],
        evidence=evidence,
        packing=None,
        base_model=_text(config.get("base_model_name_or_path")),
        model_type=known.model_type if known is not None else None,
        peft_version=_text(config.get("peft_version")),
        rslora=bool(config.get("use_rslora")),
        variants=_variants(config) if lora else [],
        tensors=len(tensors),
        bytes=sum(tensor.nbytes for tensor in tensors),
        dtypes=dict(Counter(tensor.dtype.name for tensor in tensors).most_common()),
        problems=problems,
    )
    if books:
        result.layouts = _find_layouts(known, names_of_scan(scan), source, books, result)
    result.others = _other_patterns(scan, tensors)
    if lora and scan.pairs:
        _read_targets(scan, source, known, result)
        _note_idle(scan, tensors, result)
    if source.family is not None and not result.problems:
        _read_family(source, known, result)
    remembered = read_remembered(source.metadata)
    if remembered.layout:
        origin = f", from {remembered.source.layout}" if remembered.source.layout else ""
        result.notes.append(f"regraft wrote it{origin}")
    return result


def _find_model(
    names: Names, source: Opened, model: ModelConfig | None, foreign: Foreign | None
) -> tuple[Known | None, Sequence[Book], list[str]]:
    """What is known of the base, the books that tell the layout all the same, and why."""
    try:
        known = find_books(names, source.hints(), model, source.where, foreign)
    except RegraftError as error:
        finding = error.findings[0]
        fix = f" ({finding.fix})" if finding.fix else ""
        unnamed = finding.code == "model-needed" or (
            finding.code == "unknown-model" and model is None
        )
        books = books_by_keys(names) if unnamed else ()
        return None, books, [f"the base model is not known: {finding.message}{fix}"]
    return known, known.books, [known.evidence]


def _find_layouts(
    known: Known | None, names: Names, source: Opened, books: Sequence[Book], result: Inspected
) -> list[str]:
    told = known.layouts if known is not None else detect_layouts(names.lookup(books))
    try:
        detected = detect_layout(told, source.hints(), books, source.where)
    except RegraftError as error:
        result.problems += error.findings
        return []
    result.evidence += detected.evidence
    if detected.layout is not None:
        return [detected.layout]
    return list(detected.possible or dict.fromkeys(n for b in books for n in b.layouts))


def _read_family(source: Source, known: Known | None, result: Inspected) -> None:
    """What is wrong with a family's tensors, where the converter would say it."""
    books, scopes = (known.books, known.scopes) if known is not None else ((), {})
    side = Side(books, result.layout or next((book.left for book in books), ""), scopes)
    with suppress(AmbiguousError, RefusedError):
        try:
            source.read(side)
        except BadInputError as error:
            result.problems += error.findings


def _read_targets(scan: Scan, source: Source, known: Known | None, result: Inspected) -> None:
    """Targets as the converter reads them; where it can't, by the names alone."""
    if result.problems:
        result.targets = _targets_by_name(scan, source)
        return
    books, scopes = (known.books, known.scopes) if known is not None else ((), {})
    side = Side(books, result.layout or next((book.left for book in books), ""), scopes)
    names, tensors = list(source.tensors), list(source.tensors.values())
    reader = FactorReader(scan, tensors, names, source.config, side, source.where)
    try:
        factors = reader.read()
    except RegraftError as error:
        result.targets = _targets_by_name(scan, source)
        if known is None and source.config.get("target_parameters"):
            result.notes.append("how its experts are packed cannot be told without the base model")
        elif isinstance(error, AmbiguousError):
            result.notes += [f"{f.key}: {f.message}" for f in error.findings]
        else:
            result.problems += error.findings
        return
    result.packing = reader.packing
    result.targets = _patterns(factors, source.config.get("target_parameters") or ())


def _patterns(factors: Factors, entries: Any) -> list[TargetPattern]:
    """Targets that are alike; ``entries`` are the config's ``target_parameters``."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for group in factors.headers.groups:
        for row, i in enumerate(group.ids.tolist()):
            scale, name = factors.scales[i], group.name(row)
            parameter = bool(entries) and targets_parameter(entries, name)
            looks = (
                tuple(map(int, factors.headers.shapes[i])),
                scale.rank,
                scale.alpha,
                scale.value,
                factors.a[i].dtype.name,
                parameter,
            )
            alike.setdefault(looks, []).append(name)
    return [
        TargetPattern(str(pattern), len(pattern), pattern, *looks)
        for looks, keys in alike.items()
        for pattern in group_alike(keys)
    ]


def _targets_by_name(scan: Scan, source: Source) -> list[TargetPattern]:
    config = LoraConfig(source.config)
    tensors = list(source.tensors.values())
    entries = source.config.get("target_parameters")
    nested = {name for pairs in scan.pairs if pairs.depth for name in pairs.modules.names()}
    alike: dict[tuple[Any, ...], list[str]] = {}
    for pairs in scan.pairs:
        for path, i in zip(pairs.modules.names(), pairs.a.tolist(), strict=True):
            if entries and path.endswith(".experts"):
                depth = ".base_layer" * pairs.depth
                path = f"{path}.{parameter_of(path, depth, both=path in nested, entries=entries)}"
            scale = config.scale(path)
            looks = (None, scale.rank, scale.alpha, scale.value, tensors[i].dtype.name)
            parameter = bool(entries) and targets_parameter(entries, path)
            alike.setdefault((*looks, parameter), []).append(path)
    return [
        TargetPattern(str(pattern), len(pattern), pattern, *looks)
        for looks, keys in alike.items()
        for pattern in group_alike(keys)
    ]


def _other_patterns(scan: Scan, tensors: Sequence[Array]) -> list[TensorPattern]:
    alike: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for other in scan.others:
        for name, i in zip(other.keys.names(), other.keys.ids.tolist(), strict=True):
            looks = (tuple(map(int, tensors[i].shape)), tensors[i].dtype.name)
            alike.setdefault(looks, []).append(name)
    return [
        TensorPattern(str(pattern), len(pattern), pattern, *looks)
        for looks, keys in alike.items()
        for pattern in group_alike(keys)
    ]


def _note_idle(scan: Scan, tensors: Sequence[Array], result: Inspected) -> None:
    """Note targets whose B is zero, as it is before training."""
    total = sum(len(pairs.b) for pairs in scan.pairs)
    idle = sum(not _has_values(tensors[i]) for pairs in scan.pairs for i in pairs.b.tolist())
    if idle:
        which = "every pair" if idle == total else f"{idle} of {total} pairs"
        result.notes.append(f"B is zero in {which} of factors, so there the adapter does nothing")


def _has_values(tensor: Array) -> bool:
    flat = tensor.reshape(-1)
    # A trained factor shows it at once; only an untrained one is read to its end.
    return bool((flat[:64] != 0).any()) or bool((flat != 0).any())


def _variants(config: dict[str, Any]) -> list[str]:
    lora = LoraConfig(config)
    init = changes_base(config)
    return lora.variants() + ([f"the initialisation {init}"] if init is not None else [])


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


__all__ = ["Inspected", "Inspection", "TargetPattern", "TensorPattern", "inspect"]
