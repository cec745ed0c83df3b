"""Files that look like PEFT's and are another tool's: looking at them, and opening them as PEFT would have them.

A dialect of such a tool turns what it finds into tensors and a config that PEFT reads in the same way; from there on
everything is PEFT's reader.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from msgspec import Struct

from regraft.adapters.base_weights import BaseWeights
from regraft.adapters.convert import Converted
from regraft.adapters.detect import Known
from regraft.adapters.form import Array
from regraft.adapters.protocol import Opened, Reading, Writer
from regraft.dialects.alike import one_of_each
from regraft.dialects.base import Found, dialects
from regraft.dialects.peft.scan import PREFIX
from regraft.dialects.peft.source import CONFIG, WEIGHTS, WEIGHTS_BIN, Source, find_adapters
from regraft.errors import (
    AmbiguousError,
    BadInputError,
    Choice,
    Finding,
    RefusedError,
    RegraftError,
)
from regraft.layouts.names import Layout
from regraft.planning.side import Side
from regraft.storage.json_files import load_json
from regraft.storage.safetensors import read_header
from regraft.values import replace

WRITTEN_BY = "regraft.dialect"
"""The metadata of a weights file that say which dialect regraft wrote it in."""

SPLIT = "regraft.experts-split"
"""The metadata of a file whose experts stand one by one, although the base has them stacked in every layout."""

PACKED = re.compile(
    r"(?P<module>.+\.experts)(?P<depth>(?:\.base_layer)*)\.lora_(?P<letter>[AB])\.weight"
)
"""A factor of packed experts: the module, and ``.base_layer`` as often as another one is wrapped around it."""

INNER, OUTER = "gate_up_proj", "down_proj"
"""The parameters of stacked experts: where both are adapted, PEFT's names have the first one inside."""


class Look(Struct, frozen=True):
    """What the heads of an adapter's files say."""

    folder: Path
    config: Mapping[str, Any] | None
    """``None`` where there is no ``adapter_config.json``."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of tensors in ``adapter_model.safetensors``: one of each kind, where names that differ in digits are of one."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def written_by(self) -> str | None:
        """The dialect that regraft wrote it in, where it says so."""
        return self.metadata.get(WRITTEN_BY)


def look_at(src: Path) -> Look | None:
    """The heads of a folder with an adapter, or of a weights file in one; ``None`` where it is none, or is broken.

    The last ones are remembered, because every dialect asks; whether the files are still those is seen each time,
    and in `looking_once` one time.
    """
    seen = _seen.get()
    if seen is None:
        return _look_now(src)
    if src not in seen:
        seen[src] = _look_now(src)
    return seen[src]


_seen: ContextVar[dict[Path, Look | None] | None] = ContextVar("seen", default=None)


@contextmanager
def looking_once() -> Iterator[None]:
    """Look at each path one time as long as this lasts, while dialects are asked one after the other."""
    token = _seen.set({})
    try:
        yield
    finally:
        _seen.reset(token)


def _look_now(src: Path) -> Look | None:
    folder = src if src.is_dir() else src.parent
    weights = src if src.is_file() else folder / WEIGHTS
    return _look(folder, weights, _state(folder / CONFIG), _state(weights))


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size, state.st_ino


@lru_cache(maxsize=8)
def _look(
    folder: Path,
    weights: Path,
    config_state: tuple[int, int, int] | None,
    weights_state: tuple[int, int, int] | None,
) -> Look | None:
    config = None
    shapes: dict[str, tuple[int, ...]] = {}
    metadata: dict[str, str] = {}
    try:
        if config_state is not None:
            config = load_json(folder / CONFIG)
        if weights_state is not None and weights.suffix == ".safetensors":
            header = read_header(weights)
            few = one_of_each(header.tensors)
            shapes = {name: tuple(header.tensors[name].shape) for name in few}
            metadata = dict(header.metadata)
    except RegraftError:
        return None
    if config is None and not shapes:
        return None
    return Look(folder, config, shapes, metadata)


def find_weights(src: Path) -> Found:
    """One adapter that may have no ``adapter_config.json``; raises what `find_adapters` raises."""
    folder = src if src.is_dir() else src.parent
    if (folder / CONFIG).is_file() or (src.is_dir() and not (folder / WEIGHTS).is_file()):
        return find_adapters(src)
    weights = folder / WEIGHTS if src.is_dir() else src
    return Found(folder, (folder,), weights)


@dataclass(slots=True)
class ToolSource(Source):
    """An adapter of another tool, as PEFT would have it."""

    tool: str = "peft"
    """The dialect that it was opened by."""
    told: tuple[str, ...] = ()
    """Why it was read as it was."""
    ready: bool = False
    """Whether its files are what the dialect would write, so that they may be copied."""
    packed_as: str | None = None
    """How its experts are packed, where the tool says it."""

    @property
    def opened_by(self) -> str:
        """The dialect that it was opened by."""
        return self.tool

    @property
    def evidence(self) -> tuple[str, ...]:
        """What told its dialect how to read it."""
        return self.told

    def is_ready(self, to: Layout, known: Known, packing: str | None) -> bool:
        """Whether the dialect would write the same."""
        return self.ready and Source.is_ready(self, to, known, packing)

    def read(
        self,
        side: Side,
        packing: str | None = None,
        base: BaseWeights | None = None,
    ) -> Reading:
        """PEFT's reading, with what told how the file is to be read.

        Raises ``AmbiguousError`` with what ``--from`` takes, where nothing tells how the experts are packed.
        """
        try:
            reading = Source.read(self, side, packing or self.packed_as, base)
        except AmbiguousError as error:
            choices = tuple(
                Choice(f"{self.tool}/{each}", "its shapes fit")
                for each in getattr(dialects()[self.tool], "versions", ())
            )
            raise AmbiguousError(
                dataclasses.replace(f, choices=choices or f.choices) for f in error.findings
            ) from None
        return replace(reading, evidence=(*self.told, *reading.evidence))

    def writer(self, known: Known, to: Layout) -> Writer:
        """What writes the result in the dialect that it was opened by."""
        return dialects()[self.tool].writer(self, known, to)


def tool_source(source: Source, tool: str, told: Iterable[str] = (), **changed: Any) -> ToolSource:
    """A source that was opened by a dialect, with changed fields."""
    fields: dict[str, Any] = {
        name: getattr(source, name)
        for name in ("name", "where", "config", "tensors", "metadata", "weights", "aside")
    }
    return ToolSource(**(fields | changed), tool=tool, told=tuple(told))


class Renamed(dict[str, Array]):
    """Tensors under PEFT's names, of a file that has other ones.

    A tool has several names for one thing, and a file may have both; `checked` refuses it, because only one of the two
    would be left.
    """

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.doubled: dict[str, None] = {}

    def __setitem__(self, name: str, tensor: Array) -> None:
        if name in self:
            self.doubled[name] = None
        super().__setitem__(name, tensor)

    def checked(self) -> dict[str, Array]:
        """The tensors. Raises ``BadInputError`` for every name that two of them would have."""
        if not self.doubled:
            return dict(self)
        raise BadInputError(
            Finding(
                "two-values",
                "two tensors of the file are this one, under two of the names that the tool has for it",
                where=self.where,
                key=name,
                fix="take one of the two out",
            )
            for name in self.doubled
        )


def with_prefix(tensors: Mapping[str, Array], where: str) -> dict[str, Array]:
    """Tensors whose names may lack PEFT's prefix, with it. Raises ``BadInputError`` where two would have one name."""
    made = Renamed(where)
    for name, tensor in tensors.items():
        made[name if name.startswith(PREFIX) else PREFIX + name] = tensor
    return made.checked()


class ReadOnly:
    """What dialects have in common that are read and not written."""

    unwritten: tuple[str, str, str]
    """Whose adapters they are, why they are not written, and what to do instead."""

    def writer(self, opened: Opened, known: Known, to: Layout) -> Writer:
        """There is none. Raises ``RefusedError``."""
        whose, why, instead = self.unwritten
        message = f"{whose} adapters are read, and not written: {why}"
        raise RefusedError(Finding("dialect", message, fix=instead))

    def save(self, folder: Path, opened: Opened, result: Converted) -> None:
        """There is nothing to save."""
        raise AssertionError("it has no writer")


def parameter_of(module: str, depth: str, *, both: bool, entries: Iterable[str] | None) -> str:
    """The parameter that packed factors belong to.

    Where a module has two, the inner one is ``gate_up_proj``; of a single one, ``target_parameters`` tell.

    >>> parameter_of("l.0.experts", ".base_layer", both=True, entries=None)
    'gate_up_proj'
    """
    if both:
        return INNER if depth else OUTER
    named = f"{module}.{OUTER}"
    ends = any(named == entry or named.endswith("." + entry) for entry in entries or ())
    return OUTER if ends else INNER


def packed_parameters(
    names: Iterable[str], entries: Iterable[str] | None
) -> dict[str, tuple[str, str]]:
    """For the lora_B of packed experts by name: the module (without PEFT's prefix) and the parameter."""
    found = [
        (name, hit) for name in names if (hit := PACKED.fullmatch(name)) and hit["letter"] == "B"
    ]
    nested = {hit["module"] for _, hit in found if hit["depth"]}
    told = {}
    for name, hit in found:
        module = hit["module"].removeprefix(PREFIX)
        leaf = parameter_of(module, hit["depth"], both=hit["module"] in nested, entries=entries)
        told[name] = module, leaf
    return told


__all__ = [
    "CONFIG",
    "PREFIX",
    "WEIGHTS",
    "WEIGHTS_BIN",
    "WRITTEN_BY",
    "Look",
    "ReadOnly",
    "Renamed",
    "ToolSource",
    "find_weights",
    "look_at",
    "packed_parameters",
    "tool_source",
    "with_prefix",
]
