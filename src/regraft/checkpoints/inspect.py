"""Telling what a checkpoint is, from its headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from regraft.checkpoints.aliases import find_aliases
from regraft.checkpoints.companions import find_companions
from regraft.checkpoints.parts import find_parts, is_parted
from regraft.checkpoints.per_expert import find_unstacked
from regraft.checkpoints.prepare import model_of
from regraft.checkpoints.source import Source, open_checkpoint
from regraft.checkpoints.wrappers import strip_wrappers
from regraft.dialects.peft.inspect import TensorPattern
from regraft.errors import Finding, RegraftError
from regraft.errors.codes import Status
from regraft.names.patterns import group_alike
from regraft.planning.identify import detect
from regraft.planning.model import Foreign, ModelConfig
from regraft.rules.book import Book
from regraft.shown import Shown
from regraft.storage.dtypes import DTYPES


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """One file of weights."""

    name: str
    bytes: int
    tensors: int


@dataclass(slots=True, repr=False)
class CheckpointInspection(Shown):
    """What a checkpoint is; ``to_dict`` gives plain data."""

    source: str
    layouts: list[str]
    """The layouts it may be in: all where it is the same in each, none where that is not known."""
    evidence: list[str]
    """Why it was taken for what it is."""
    model_types: list[str]
    """What its config says, the whole model first."""
    classes: list[str]
    """The classes of transformers that its config names."""
    tensors: int
    bytes: int
    """Of the tensors' data."""
    elements: int
    """Of all tensors together."""
    dtypes: dict[str, int]
    """How many tensors have each type."""
    weights: list[WeightsFile]
    ties: dict[str, str]
    """Names that stand for other tensors, by the metadata."""
    patterns: list[TensorPattern] = field(default_factory=list)
    """The tensors; those that are alike together."""
    files: list[str] = field(default_factory=list)
    """Files beside the weights, which a conversion carries over."""
    notes: list[str] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)
    """Why its layout is not known."""

    @property
    def layout(self) -> str | None:
        """The layout, where it can be one only."""
        return self.layouts[0] if len(self.layouts) == 1 else None

    @property
    def status(self) -> Status:
        """The exit status of the command that found it."""
        return Status.DONE if not self.problems else Status.BAD_INPUT

    def to_dict(self) -> dict[str, Any]:
        """The inspection as plain data."""
        data = {**asdict(self), "layout": self.layout}
        for alike in data["patterns"]:
            del alike["keys"]
        data["problems"] = [problem.to_dict() for problem in self.problems]
        return data


def inspect_checkpoint(
    path: Path, model: Path | None = None, foreign: Foreign | None = None
) -> CheckpointInspection:
    """Tell what a checkpoint is; a layout that is not known is one of its ``problems``.

    Reads headers and the config, never the data.

    Raises ``BadInputError`` where it cannot be opened, or its config is none.
    """
    source, stripped = strip_wrappers(open_checkpoint(path))
    config = model_of(source, model)
    tensors = source.tensors
    names = tensors.names
    sizes = Counter(tensors.files.tolist())
    result = CheckpointInspection(
        source=str(path),
        layouts=[],
        evidence=[],
        model_types=list(config.model_types()) if config is not None else [],
        classes=list(config.architectures()) if config is not None else [],
        tensors=len(tensors),
        bytes=int(tensors.sizes.sum()),
        elements=sum(map(_elements, tensors.dtypes, tensors.sizes.tolist())),
        dtypes=dict(Counter(tensors.dtypes).most_common()),
        weights=[WeightsFile(f.name, f.size, sizes[i]) for i, f in enumerate(source.files)],
        ties={name: names[row] for name, row in sorted(find_aliases(source).items())},
        patterns=_patterns(source),
        files=[str(other) for other in source.others],
    )
    result.notes += [f"a conversion does this: {said}" for said in stripped]
    if source.left_out:
        result.notes.append(
            "a conversion leaves these out, because they hold weights in another form or lie elsewhere: "
            + ", ".join(source.left_out)
        )
    _find_layout(result, source, config, foreign)
    return result


def _find_layout(
    result: CheckpointInspection,
    source: Source,
    config: ModelConfig | None,
    foreign: Foreign | None,
) -> None:
    try:
        if is_parted(source):
            found = find_parts(source)
            result.layouts, result.model_types = [found.layout], [found.pipeline.name]
            parts = ", ".join(piece.part.name for piece in found.pieces)
            result.evidence = [found.evidence, f"its parts: {parts}"]
            return
        companions = find_companions(source, config.data if config is not None else None)
        known = detect(
            companions.headers,
            config,
            source.where,
            None,
            foreign,
            unstack=partial(find_unstacked, companions),
        )
    except RegraftError as error:
        result.problems += error.findings
        return
    result.layouts = [known.layout] if known.layout is not None else _joined(known.books)
    result.evidence = list(known.evidence)


def _joined(books: Sequence[Book]) -> list[str]:
    """The layouts that some books lead between; other tools' names would have told themselves."""
    own = [book for book in books if book.tells == "both"] or books
    return list(dict.fromkeys(name for book in own for name in (book.left, book.right)))


def _elements(dtype: str, size: int) -> int:
    return size * 8 // DTYPES[dtype].bits


def _patterns(source: Source) -> list[TensorPattern]:
    """The tensors in the order of their files, those that are alike together."""
    tensors = source.tensors
    alike: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for row in np.lexsort((tensors.starts, tensors.files)).tolist():
        looks = (tuple(tensors.shapes[row]), tensors.dtypes[row])
        alike.setdefault(looks, []).append(tensors.names[row])
    return [
        TensorPattern(str(pattern), len(pattern), pattern, *looks)
        for looks, names in alike.items()
        for pattern in group_alike(names)
    ]
