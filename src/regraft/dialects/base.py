"""What a dialect is: it opens the files of a tool, and writes them; and the registry of those that there are.

A dialect is one object with the methods of `Dialect`. Most formats of plain LoRA need little more than two tables:
`PlainFile` is an opened adapter whose factors are known by base tensor, and `PlainWriter` gets factors by base tensor
and says what they are called. `regraft.testing.check_dialect` tries one out.

Which dialects there are, `dialects/registry` says; others come from installed packages through the entry point
``regraft.dialects`` (a name, and an object or a function without arguments that makes one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from msgspec import Struct, field

from regraft.adapters.families.base import Family
from regraft.adapters.form import (
    Adapter,
    Array,
    Blob,
    Factors,
    Images,
    Lora,
    Saved,
    Written,
    cast_down,
    rescale,
)
from regraft.adapters.form import SavedGroup as SavedGroup
from regraft.adapters.protocol import Hints, Names, Opened, Reading, Spelling, Writer
from regraft.adapters.ranks import make_uniform
from regraft.adapters.scale import is_finite
from regraft.dialects.registry import Evidence, dialect_of, dialects, sniffed
from regraft.errors import BadInputError, Finding, RefusedError
from regraft.names.keys import Group, group_names
from regraft.planning.plan import Headers, Plan
from regraft.values import replace

if TYPE_CHECKING:
    from regraft.adapters.base_weights import BaseWeights
    from regraft.adapters.convert import Converted
    from regraft.adapters.deltas import Deltas
    from regraft.adapters.detect import Known
    from regraft.adapters.ladder import Carried
    from regraft.adapters.tuned import TunedModules
    from regraft.layouts.names import Layout
    from regraft.planning.model import ModelConfig
    from regraft.planning.side import Side
    from regraft.rules.book import Shared


class Capabilities(Struct, frozen=True):
    """What a dialect can hold; the rest is adjusted where that is exact, and refused by name otherwise."""

    families: frozenset[str] = frozenset()
    """Values of ``peft_type`` beside plain LoRA."""
    scales: bool = True
    """Whether every target may have a scale of its own; otherwise ratios are folded into B."""
    ranks: bool = True
    """Whether every target may have a rank of its own; otherwise smaller ones get components of zeros."""
    embeddings: bool = True
    """Whether an embedding's LoRA can be written."""
    experts: bool = True
    """Whether the LoRA of stacked experts can be written as it is."""
    saved: bool = True
    """Whether whole tensors of the base can be written beside the deltas."""
    doubles: bool = True
    """Whether factors may be float64; otherwise they become float32, and that is said."""
    suffixes: tuple[str, ...] = ()
    """What the name of a destination ends in that is to be one file (``.safetensors``, ``.gguf``)."""
    folder: bool = True
    """Whether a destination may be a folder."""


class Found(Struct, frozen=True):
    """The adapters of a source, by folder, and the files to copy as they are (relative to ``root``)."""

    root: Path
    folders: tuple[Path, ...]
    weights: Path | None
    """The weights file itself, where that is what was given."""
    others: tuple[Path, ...] = ()
    beside: tuple[Path, ...] = ()
    """Files that belong to ``weights``."""


class Dialect(Protocol):
    """How one tool, in some of its releases, writes adapters.

    What else it may have: ``versions`` (what may stand after the slash, the oldest first), ``layout`` (the layout that
    its adapters usually are in), ``usage`` (how its tool gets a result, with ``{path}``), ``layout_for(known)`` (the
    layout for a base that is known, or ``None``), ``in_memory(result)`` (a result as it would be opened, if no files
    are needed for that) and ``image_only`` (whether its ``writer`` refuses every model but image and video models).
    What it opens may have ``convert(to, family, base, options)``, where its adapters are of more
    than one model (an image model's parts).
    """

    @property
    def name(self) -> str:
        """What users call it (``--to``, ``--from``)."""
        ...

    @property
    def title(self) -> str:
        """One line that says what it is."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What it can hold."""
        ...

    def sniff(self, src: Path) -> Evidence | None:
        """Whether a path, a file or a folder, is one of its adapters; it reads headers only. ``None`` where it is not.

        It raises nothing: a path that cannot be read is none of its own.
        """
        ...

    def find(self, src: Path) -> Found:
        """The adapters of a path. Raises ``BadInputError``."""
        ...

    def open(self, folder: Path, root: Path, weights: Path | None) -> Opened:
        """Open one of them. Raises ``BadInputError`` with everything that is wrong with its files."""
        ...

    def writer(self, opened: Opened, known: Known, to: Layout) -> Writer:
        """What writes an adapter in this dialect, whatever dialect it was opened by."""
        ...

    def save(self, folder: Path, opened: Opened, result: Converted) -> None:
        """Write the files of a result into a folder that is not visible yet.

        Where one file was asked for, the file with its suffix is taken out of the folder, and must be all there is.
        """
        ...


# -- what most dialects of plain LoRA have in common


class PlainNames(Struct, frozen=True):
    """Names in a file for base tensors: a prefix, and what follows a module for its A and B."""

    prefix: str = ""
    a: str = "lora_A.weight"
    b: str = "lora_B.weight"

    def spell(self, key: str) -> str:
        """A tensor of the base, or a module."""
        return self.prefix + key

    def saved_name(self, item: Saved) -> str:
        """A saved tensor."""
        return self.prefix + item.new

    def factor_names(self, module: str) -> tuple[str, str]:
        """A module's A and B."""
        return f"{self.prefix}{module}.{self.a}", f"{self.prefix}{module}.{self.b}"


class PlainFile(Struct):
    """An opened adapter of plain LoRAs whose factors are known by base tensor.

    A is (rank, in) and B is (out, rank); for stacked experts (E, rank, in) and (E, out, rank).
    """

    name: str
    where: str
    config: dict[str, Any]
    tensors: dict[str, Array]
    loras: dict[str, Lora]
    """By the key of the base tensor."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of base tensors whose shape is not (out, in)."""
    kinds: dict[str, str] = field(default_factory=dict)
    """Of base tensors that are not ``linear``."""
    replaced: dict[str, Array] = field(default_factory=dict)
    """Tensors that take the place of the base's, by their key there."""
    metadata: dict[str, str] = field(default_factory=dict)
    sidecar: dict[str, Array] = field(default_factory=dict)
    said: Hints = field(default_factory=lambda: Hints("the file"))
    spelling: Spelling = field(default_factory=PlainNames)
    kind: str = "LORA"

    def __post_init__(self) -> None:
        """Raises ``BadInputError`` for scales that are no numbers to count with."""
        findings = [
            Finding(
                "config",
                "what multiplies its factors is no finite number",
                where=self.where,
                key=key,
                fix="correct alpha, or the scale, where the adapter says it",
            )
            for key, lora in self.loras.items()
            if not is_finite(lora.scale.alpha)
        ]
        if findings:
            raise BadInputError(findings)

    @property
    def family(self) -> type[Family] | None:
        """Plain LoRA."""
        return None

    def before(self, config: Mapping[str, Any], tensors: Mapping[str, Array]) -> Self:
        """Plain LoRA stands in for nothing. Raises ``BadInputError``."""
        message = "a file of this form stands in for no other adapter"
        raise BadInputError(Finding("layout", message, where=self.where))

    def names(self) -> Names:
        """The modules and tensors that it is about."""
        paths = [key.removesuffix(".weight") for key in self.loras if key.endswith(".weight")]
        parameters = [key for key in self.loras if not key.endswith(".weight")]
        modules, tensors = group_names(paths), group_names([*parameters, *self.replaced])
        return Names(tuple(modules), tuple(tensors), bool(self.loras or self.replaced))

    def hints(self) -> Hints:
        """What the file says of the base."""
        return replace(self.said, metadata=self.metadata)

    def stands_alone(self, model: ModelConfig | None) -> bool:
        """Every layout may change it."""
        return False

    def check_convertible(self) -> None:
        """There is nothing that can only be read."""

    def choose_layout(self, to: str, other: str, *, transposed: bool) -> tuple[str, str | None]:
        """Where all names are the same, it is in the layout that is asked for."""
        return to, None

    def is_ready(self, to: Layout, known: Known, packing: str | None) -> bool:
        """There is one way to write it."""
        return True

    def read(
        self,
        side: Side,
        packing: str | None = None,
        base: BaseWeights | None = None,
    ) -> Reading:
        """The factors by base tensor, with the kinds that the books give."""
        keys = list(self.loras)
        groups = group_names(keys)
        kinds: list[tuple[Group, str]] = []
        stored: list[tuple[int, ...]] = [()] * len(keys)
        for group in groups:
            found = side.find(group)
            for row, number in enumerate(group.ids.tolist()):
                key, lora = keys[number], self.loras[keys[number]]
                kind = found.kind if found is not None else self.kinds.get(key, "any")
                stored[number] = self.shapes.get(key) or _stored(lora, kind)
                if not row:
                    kinds.append((group, kind))
        loras = list(self.loras.values())
        headers = Headers(groups, stored, [lora.a.dtype.name for lora in loras])
        factors = Factors(
            headers,
            [lora.a for lora in loras],
            [lora.b for lora in loras],
            [lora.scale for lora in loras],
            kinds,
        )
        return Reading(Adapter(factors), saved=self._saved())

    def _saved(self) -> tuple[SavedGroup, ...]:
        """Tensors that take the place of the base's."""
        place = {name: number for number, name in enumerate(self.tensors)}
        names = list(self.replaced)
        ids = [place[self.spelling.spell(name)] for name in names]
        return tuple(
            SavedGroup(Group(g.template, np.array([ids[i] for i in g.ids.tolist()]), g.numbers))
            for g in group_names(names)
        )

    def settle_shared(self, shared: Sequence[Shared]) -> tuple[Self, list[str]]:
        """It names each module once."""
        return self, []

    def shown(self, item: Saved) -> tuple[str, str]:
        """A saved tensor before and after."""
        return item.old, item.new

    def warnings(self, to: str) -> list[str]:
        """Nothing."""
        return []

    def roles(self) -> Mapping[str, tuple[str, str]]:
        """Factors by the tensors themselves, or by the names that the spelling gives them."""
        names = {id(tensor): name for name, tensor in self.tensors.items()}
        found = {name: (name, "not understood") for name in self.tensors}
        for key, lora in self.loras.items():
            usual = self.spelling.factor_names(key.removesuffix(".weight"))
            for tensor, name, role in zip((lora.a, lora.b), usual, "AB", strict=True):
                found[names.get(id(tensor), name)] = key, role
        for key in self.replaced:
            found[self.spelling.spell(key)] = key, "saved whole"
        return {name: told for name, told in found.items() if name in self.tensors}

    def renamed(self, rename: Callable[[str], str]) -> Self:
        """The same with its factors at other keys of the base."""
        return replace(
            self,
            loras={rename(key): lora for key, lora in self.loras.items()},
            shapes={rename(key): shape for key, shape in self.shapes.items()},
            kinds={rename(key): kind for key, kind in self.kinds.items()},
            said=replace(self.said, model_type=None, classes=()),
        )

    def readings(self) -> Iterator[tuple[Self, str]]:
        """Nothing: its dialect reads all names that it has."""
        return iter(())

    def without(self, names: Iterable[str]) -> Self:
        """The same with fewer tensors."""
        gone = set(names)
        return replace(
            self,
            tensors={name: x for name, x in self.tensors.items() if name not in gone},
            replaced={
                key: x for key, x in self.replaced.items() if self.spelling.spell(key) not in gone
            },
        )

    def as_lora(self) -> Self:
        """It is one."""
        return self

    def writer(self, known: Known, to: Layout) -> Writer:
        """The writer of the dialect that made it."""
        return dialects()[self.dialect].writer(self, known, to)

    def deltas(self, known: Known, layout: str, packing: str | None = None) -> Deltas:
        """What it adds to base tensors."""
        from regraft.adapters.deltas import Deltas

        return Deltas(self, known, layout, packing)

    @property
    def dialect(self) -> str:
        """The dialect's name, for the way back to its own writer."""
        return str(self.config.get("dialect", "peft"))


def _stored(lora: Lora, kind: str) -> tuple[int, ...]:
    """The shape of a base tensor, out and in as its kind stores them."""
    from regraft.rules.kinds import BATCH, IN, KINDS, OUT

    roles = KINDS[kind].roles or ((BATCH, OUT, IN) if lora.a.ndim == 3 else (OUT, IN))
    sizes = {OUT: lora.b.shape[-2], IN: lora.a.shape[-1]}
    if lora.a.ndim == 3:
        sizes[BATCH] = lora.a.shape[0]
    return tuple(sizes[role] for role in roles)


class Delta(Struct, frozen=True, gc=False):
    """One LoRA as a writer gets it, adjusted to what its dialect can hold."""

    key: str
    """The key of the base tensor."""
    kind: str
    """Which of its dims are experts, out and in (`regraft.rules.kinds`)."""
    lora: Lora


def written_of(deltas: Iterable[Delta]) -> tuple[Written, ...]:
    """What a report says of LoRAs that were written, one for each module."""
    return tuple(
        [Written(d.key, d.key.removesuffix(".weight"), None, d.lora.scale) for d in deltas]
    )


class PlainWriter:
    """Writes plain LoRAs; a subclass says what a file has (`blob`) and what it can hold.

    Ranks are padded with zeros and scales folded into B where the dialect has one for all; what cannot be held is
    refused by name.
    """

    capabilities = Capabilities()
    title = "this format"
    claimed: tuple[str, ...] = ()
    narrowed: int = 0
    """How many factors were float64 and became float32."""

    def __init__(self, opened: Opened, known: Known, to: Layout, spelling: Spelling) -> None:
        self.opened, self.known, self.to, self.spelling = opened, known, to, spelling

    @property
    def model(self) -> ModelConfig | None:
        """The config of the base, where it is known."""
        return self.known.model

    @property
    def _repeats(self) -> bool:
        """Whether the model that was adapted repeats layers of its base, which the dialect's files cannot say."""
        return bool(self.opened.hints().replicated)

    @cached_property
    def base(self) -> BaseWeights:
        """The base's tensors under the names of the layout; it has none where they are not at hand."""
        from regraft.adapters.base_weights import BaseWeights

        return BaseWeights.of(self.known, self.to.name)

    def holds(self, family: Family) -> bool:
        """Whether the dialect has a family; otherwise it becomes LoRA where that is exact."""
        return self.opened.kind in self.capabilities.families

    def blob(self, deltas: Sequence[Delta], saved: Sequence[Saved]) -> Blob:
        """The file: its config, its tensors by name, its metadata."""
        raise NotImplementedError

    def entries(self, saved: Sequence[Saved]) -> Sequence[str]:
        """Saved tensors are named one by one."""
        return []

    def owner(self, key: str, entry: str) -> str | None:
        """No module is saved as a whole."""
        return None

    def entry_for(self, module: str) -> str:
        """The module itself."""
        return module

    def arrange(self, made: Sequence[Images]) -> Sequence[Images]:
        """The LoRAs as the dialect can hold them: of one rank, or of one scale, where it has one for all."""
        adjust(made, self.capabilities)
        return made

    def write_lora(
        self,
        made: Sequence[Images],
        saved: Sequence[Saved],
        entries: Sequence[str],
        returned: Mapping[str, Array],
        written: Sequence[Written],
    ) -> Blob:
        """Adjust, then write."""
        deltas = list(_deltas(self.arrange(made)))
        self.check(deltas, saved)
        self.narrow_doubles(deltas)
        blob = self.blob(deltas, saved)
        notes = tuple(self.notes(blob, made))
        tensors = {**blob.tensors, **returned}
        return replace(blob, tensors=tensors, written=(*written_of(deltas), *written), notes=notes)

    def write_family(
        self,
        carried: Carried,
        plan: Plan | None,
        modules: TunedModules,
        family: Family,
        saved: Sequence[Saved],
        entries: Sequence[str],
    ) -> tuple[Blob, bool]:
        """A family that the dialect does not have."""
        raise RefusedError(
            Finding(
                "no-image",
                f"{self.title} has plain LoRA only, and this is {family.title}",
                where=self.opened.where,
                fix="ask for deltas of full rank (--via dense), or for an approximation (--via svd:RANK)",
            )
        )

    def notes(self, blob: Blob, made: Sequence[Images]) -> list[str]:
        """What the user should know of the written file."""
        if not self.narrowed:
            return []
        return [
            f"{self.narrowed} factors were float64 and became float32, the widest type that {self.title} has: numbers "
            "were rounded"
        ]

    def narrow_doubles(self, deltas: Sequence[Delta]) -> None:
        """Make float64 float32, where the dialect has no wider type.

        Raises ``RefusedError`` where a finite number would become infinite.
        """
        if self.capabilities.doubles:
            return
        wide = np.dtype(np.float64)
        for lora in (delta.lora for delta in deltas):
            if lora.a.itemsize < wide.itemsize and lora.b.itemsize < wide.itemsize:
                continue
            for half in "ab":
                values = getattr(lora, half)
                if values.dtype == wide:
                    made = cast_down(values, np.dtype(np.float32))
                    lora.exact = lora.exact and bool(np.array_equal(made, values, equal_nan=True))
                    setattr(lora, half, made)
                    self.narrowed += 1

    def check(self, deltas: Sequence[Delta], saved: Sequence[Saved]) -> None:
        """Raise ``RefusedError`` for everything that the dialect cannot hold."""
        can = self.capabilities
        findings = [
            Finding(
                "no-image",
                f"{self.title} cannot hold {what}",
                where=self.opened.where,
                key=key,
                fix="merge the adapter into its base and convert the base",
            )
            for key, what in (
                *(
                    (
                        d.key,
                        f"a LoRA of {'an embedding' if d.kind == 'embedding' else 'stacked experts'}",
                    )
                    for d in deltas
                    if d.kind == "embedding" or d.lora.a.ndim == 3
                ),
                *((i.new, "whole weights of the base") for i in saved if not i.rows),
                *((i.new, "some rows of a weight of the base") for i in saved if i.rows),
                *[("layer_replication", "a model of repeated layers")] * bool(self._repeats),
            )
            if not (
                can.embeddings
                if what.endswith("embedding")
                else can.experts
                if what.endswith("experts")
                else can.saved and what.startswith("whole")
            )
        ]
        if findings:
            raise RefusedError(findings)


def adjust(made: Sequence[Images], can: Capabilities) -> None:
    """Give all LoRAs one rank or one scale where a format has one for all, in place.

    Ranks are padded with components of zeros, which add nothing. The ratio of a scale to the common one goes into B;
    it is exact where it is a power of two.
    """
    if not can.ranks:
        make_uniform(made)
    loras = [lora for image in made for lora in image.loras if lora is not None]
    # Most scales are one and the same object, which is told faster than what is equal.
    alike = {(id(lora.scale), lora.a.shape[-2]): lora.scale for lora in loras}
    pairs = {(scale, rank) for (_, rank), scale in alike.items()}
    if can.scales or (len(pairs) < 2 and all(scale.rank == rank for scale, rank in pairs)):
        return
    target = max(loras, key=lambda lora: lora.a.size).scale
    for lora in loras:
        if (lora.scale is target or lora.scale == target) and lora.a.shape[-2] == target.rank:
            continue
        ratio = lora.scale.ratio_to(target)
        lora.b, exact = rescale(lora.b, ratio)
        lora.exact = lora.exact and exact
        lora.scale = target.at_rank(lora.a.shape[-2])


def _deltas(made: Iterable[Images]) -> Iterator[Delta]:
    for image in made:
        for key, lora in zip(image.keys.names(), image.loras, strict=True):
            if lora is not None:
                yield Delta(key, image.kind, lora)


__all__ = [
    "Capabilities",
    "Delta",
    "Dialect",
    "Evidence",
    "Found",
    "PlainFile",
    "PlainNames",
    "PlainWriter",
    "adjust",
    "dialect_of",
    "dialects",
    "sniffed",
]
