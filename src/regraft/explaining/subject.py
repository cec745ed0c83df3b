"""An adapter or a checkpoint as something to ask about: its names, its shapes, its books, and how far a plan gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from regraft.adapters.convert import convert_adapter
from regraft.adapters.detect import Known, detect_layout, find_books
from regraft.adapters.families.base import Family
from regraft.adapters.home import at_home
from regraft.adapters.protocol import Into, Opened
from regraft.bridges.transformers.files import InstalledTransformers
from regraft.checkpoints.companions import find_companions
from regraft.checkpoints.parts import find_parts
from regraft.checkpoints.per_expert import find_unstacked
from regraft.checkpoints.pipelines import DIFFUSERS
from regraft.checkpoints.prepare import model_of
from regraft.checkpoints.source import Source as Checkpoint
from regraft.checkpoints.source import is_checkpoint, open_checkpoint
from regraft.dialects.names import SourceName
from regraft.dialects.opening import Target, find_source
from regraft.dialects.peft.config import targets_parameter
from regraft.dialects.peft.scan import PREFIX, Scan, scan_names
from regraft.dialects.peft.source import Source as Adapter
from regraft.dialects.peft.source import names_of_scan
from regraft.errors import Finding, RegraftError
from regraft.layouts.names import Layout
from regraft.names.keys import Group, group_names
from regraft.planning.identify import Unstacked, detect
from regraft.planning.model import ModelConfig, Scope, load_model
from regraft.planning.plan import Headers, Plan
from regraft.rules.book import Book
from regraft.rules.templates import match_group

SHARED = "shared by all modules of"
"""What the role of a tensor begins with that a family keeps once for all modules."""


@dataclass(frozen=True, slots=True)
class Name:
    """A tensor of the file and the tensor of the base that it is about."""

    name: str
    base: str
    role: str = ""
    """What it is to the base tensor, such as ``lora_A``; empty where it is that tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What is known of a source before anything is converted."""

    kind: Literal["adapter", "checkpoint"]
    where: str
    names: Mapping[str, Name]
    """By the name in the file."""
    headers: Headers
    """Keys of the base, with shapes where ``shapes_known``."""
    shapes_known: bool
    books: tuple[Book, ...]
    scopes: Mapping[str, Scope]
    layout: str | None
    evidence: tuple[str, ...]
    model: ModelConfig | None
    plan: Plan | None = None
    """The whole plan of an adapter that can be converted."""
    problems: tuple[Finding, ...] = field(default=())
    """Why it cannot be planned as a whole."""
    unstacked: Unstacked = field(default_factory=Unstacked)
    """Quantised experts that stay one by one."""
    made: frozenset[str] = frozenset()
    """The names in the result of an adapter that can be converted."""
    same: str = ""
    """Why every tensor stays as it is; empty where rules move them."""


def open_subject(
    src: Path,
    to: Layout | None = None,
    model: Path | None = None,
    source: Layout | None = None,
    said: SourceName | None = None,
) -> Subject:
    """Open an adapter or a checkpoint, and find out as much as its names tell.

    What is wrong with it as a whole is a part of the answer (``problems``), not an error.

    Raises ``BadInputError`` where it cannot be read.
    """
    config = load_model(model) if model is not None else None
    if is_checkpoint(src):
        return _open_checkpoint(src, config, None if source is None else source.name)
    opening = find_source(src, said)
    opened = opening.one()
    into = Target.writes(to, opening) if to is not None else None
    packing = said.packing if said is not None else None
    return _open_adapter(opened, to, config, source, into, packing)


def _open_checkpoint(src: Path, config: ModelConfig | None, source: str | None) -> Subject:
    opened = open_checkpoint(src)
    config = config if config is not None else model_of(opened, None)
    companions = find_companions(opened, config.data if config is not None else None)
    headers = companions.headers
    names = {name: Name(name, name) for group in headers.groups for name in group.names()}
    for name in opened.tensors.names:
        names.setdefault(name, Name(name, name, "belongs to a quantised weight"))
    try:
        known = detect(
            headers,
            config,
            opened.where,
            source,
            InstalledTransformers(),
            unstack=partial(find_unstacked, companions),
        )
    except RegraftError as error:
        found = error.findings
        return Subject(
            "checkpoint",
            opened.where,
            names,
            headers,
            shapes_known=True,
            books=(),
            scopes={},
            layout=source,
            evidence=(),
            model=config,
            problems=found,
        )
    return Subject(
        "checkpoint",
        opened.where,
        names,
        headers,
        shapes_known=True,
        books=known.books,
        scopes=known.scopes,
        layout=known.layout,
        evidence=known.evidence,
        model=config,
        unstacked=known.unstacked,
    )


def open_part(opened: Checkpoint, key: str, layout: str | None) -> Subject:
    """The part of an image model that a tensor belongs to, by the part's own names.

    ``key`` is the tensor's name in the file, or its own; ``layout`` what was said of the whole.

    Raises what `find_parts` raises.
    """
    found = find_parts(opened, layout)
    piece = next(
        (p for p in found.pieces if key.startswith(p.place) or key in p.tensors.names),
        found.pieces[0],
    )
    name = piece.part.name
    role = f"in the {name}: {piece.place} stands before its own name"
    own = zip(piece.rows.tolist(), piece.tensors.names, strict=True)
    names = {opened.tensors.names[row]: Name(opened.tensors.names[row], x, role) for row, x in own}
    there = piece.part.prefixes[0] if found.layout == DIFFUSERS else f"{name}/"
    evidence = found.evidence, f"in {found.target} it has {there} before its name"
    books = tuple(book for book in found.books if book.name == piece.part.book)
    same = "" if books else f"the names of the {name} are the same in all layouts"
    return Subject(
        "checkpoint",
        opened.where,
        names,
        piece.headers,
        shapes_known=True,
        books=books,
        scopes={},
        layout=found.layout,
        evidence=evidence,
        model=None,
        same=same,
    )


def _open_adapter(
    opened: Opened,
    to: Layout | None,
    config: ModelConfig | None,
    source: Layout | None,
    into: Into | None,
    packing: str | None,
) -> Subject:
    problems: list[Finding] = []
    known: Known | None = None
    foreign = InstalledTransformers()
    was, moved = opened, None
    try:
        opened, moved = at_home(opened, config, foreign)
    except RegraftError as error:
        problems += error.findings
    layout = None if source is None else source.name
    evidence = [] if source is None else ["its layout was given"]
    scan: Scan | None = None
    family = opened.family
    if isinstance(opened, Adapter):
        plain = opened.peft_type == "LORA" and family is None
        prefix = family.prefix if family is not None else None
        scan, scanned = scan_names(list(opened.tensors), opened.where, lora=plain, prefix=prefix)
        problems += scanned
    try:
        keys = opened.names() if scan is None else names_of_scan(scan)
        known = find_books(keys, opened.hints(), config, opened.where, foreign)
        evidence.insert(0, known.evidence)
        if source is None:
            detected = detect_layout(known.layouts, opened.hints(), known.books, opened.where)
            layout = detected.layout
            evidence += detected.evidence
    except RegraftError as error:
        problems += error.findings
    books = known.books if known is not None else ()
    if isinstance(opened, Adapter) and scan is not None:
        names = _adapter_names(opened, scan, family, books, layout)
        if opened.stripped:
            # Under the names that the file has, too.
            pairs = zip(opened.stripped.before, opened.stripped.names, strict=True)
            names |= {old: replace(names[new], name=old) for old, new in pairs if new in names}
    else:
        names = {n: Name(n, base, role) for n, (base, role) in opened.roles().items()}
    if moved is not None:
        evidence.append(moved)
        # Under the names that the file has, too.
        pairs = zip(was.tensors, opened.tensors, strict=True)
        names |= {old: replace(names[new], name=old) for old, new in pairs if new in names}
    plan: Plan | None = None
    made: frozenset[str] = frozenset()
    if to is not None and not problems:
        try:
            converted = convert_adapter(
                opened, to, config, source, foreign=foreign, packing=packing, into=into
            )
            plan, layout = converted.plan, converted.report.source_layout
            made = frozenset(converted.tensors)
        except RegraftError as error:
            problems += error.findings
    if plan is not None:
        headers = plan.headers
    else:
        bases = list(dict.fromkeys(name.base for name in names.values()))
        headers = Headers(group_names(bases), [()] * len(bases), [""] * len(bases))
    return Subject(
        "adapter",
        opened.where,
        names,
        headers,
        plan is not None,
        books,
        known.scopes if known is not None else {},
        layout,
        tuple(dict.fromkeys(evidence)),
        known.model if known is not None else config,
        plan,
        tuple(problems),
        made=made,
    )


def _adapter_names(
    opened: Adapter,
    scan: Scan,
    family: type[Family] | None,
    books: Sequence[Book],
    layout: str | None,
) -> dict[str, Name]:
    """Every tensor of an adapter with the base tensor that it is about."""
    names = list(opened.tensors)
    result: dict[str, Name] = {}
    depths: dict[str, int] = {}
    for pairs in scan.pairs:
        for module in pairs.modules.names():
            depths[module] = max(depths.get(module, 0), pairs.depth)
    for pairs in scan.pairs:
        modules = pairs.modules.names()
        own = _parameters(books, layout, pairs.modules)
        for row, module in enumerate(modules):
            leaf = pairs.parameter
            if own is not None:
                wanted = opened.config.get("target_parameters")
                adapted = [n for n in own if targets_parameter(wanted, f"{module}.{n}")] or list(
                    own
                )
                # PEFT nests them: the first that is registered is innermost.
                leaf = adapted[min(depths[module] - pairs.depth, len(adapted) - 1)]
            letters = (("embedding_" if pairs.embedding else "") + letter for letter in "AB")
            for ids, letter in zip((pairs.a, pairs.b), letters, strict=True):
                name = names[int(ids[row])]
                result[name] = Name(name, f"{module}.{leaf}", f"lora_{letter}")
    title = family.title if family is not None else ""
    for tuned in scan.tuned:
        for end, ids in tuned.tensors.items():
            for number, module in zip(ids.tolist(), tuned.modules.names(), strict=True):
                if number >= 0:
                    name = names[number]
                    role = f"{end.removeprefix('.')} of {title}"
                    result[name] = Name(name, f"{module}.weight", role)
    for name in names:
        if family is not None and family.shares(name):
            result[name] = Name(name, name, f"{SHARED} {title}")
    for other in scan.others:
        for number, key in zip(other.keys.ids.tolist(), other.keys.names(), strict=True):
            role = "saved whole" if other.prefix else "no part of the model"
            result.setdefault(names[number], Name(names[number], key, role))
    for name in names:
        result.setdefault(name, Name(name, name.removeprefix(PREFIX), "not understood"))
    return result


def _parameters(
    books: Sequence[Book], layout: str | None, modules: Group
) -> tuple[str, ...] | None:
    tables = (
        table
        for book in books
        for table in book.parameters
        if any(book.layout(side) == layout for side in table.sides)
    )
    return next((t.names for t in tables if match_group(t.module, modules) is not None), None)
