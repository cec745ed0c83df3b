"""What every family says of itself, and the operations that a layout change is made of.

A base weight is seen as a matrix (out, in). A layout change takes rows and columns of matrices, turns them, and joins
them. A family that can do the same to its own tensors follows exactly; otherwise its delta may be a LoRA of known
rank, with the base's weights or without; otherwise only a dense delta is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
from msgspec import Struct, field

from regraft.adapters.families.settings import Anchored, Patterns
from regraft.adapters.form import Array, cast_down, common_dtype
from regraft.errors import BadInputError, Finding
from regraft.names.keys import Ints
from regraft.values import replace

FAMILY, LORA, BASE, DENSE, NONE = "family", "lora", "base", "dense", "none"
"""The rungs: in the family itself, as a LoRA of known rank, the same with the base's weights, only as a dense delta
(on request), not at all."""

OPERATIONS = (
    "rename",
    "join out",
    "join in",
    "split out",
    "split in",
    "transpose",
    "reorder out",
    "reorder in",
    "stack",
)
"""What a layout change does to a matrix."""

OUT, IN, RANK = "out", "in", "rank"
"""What a dim of a family's tensor can run along."""

Dims = tuple[str | None, ...]
"""What the dims of a tensor run along, ``None`` for what no layout changes."""

_One = TypeVar("_One")
_Other = TypeVar("_Other")

Wide = npt.NDArray[np.float64]


Weight = Callable[[], Wide] | None
"""What gives the base weight (out, in), where it is at hand."""

Pair = tuple[Array, Array]
"""A LoRA of scale 1: A (rank, in) and B (out, rank)."""

Sizes = tuple[int | None, int | None]
"""Out and in of a weight, as far as they are known."""


class Cell(Struct, frozen=True):
    """What a family can do under one operation.

    ``rung`` is reached always; ``better`` is reached where ``when`` holds.
    """

    rung: str
    better: str | None = None
    when: str = ""


class Part(Struct, frozen=True):
    """One module's adapter: tensors by their role, the size of its matrix, and its own settings."""

    tensors: Mapping[str, Array]
    out: int
    into: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "linear"

    def __getitem__(self, role: str) -> Array:
        """A tensor of it. Raises ``BadInputError`` where the file has it not."""
        found = self.tensors.get(role)
        if found is None:
            message = f"a module of the adapter lacks a tensor of its family ({role})"
            fix = "use the adapter_config.json that was saved with these weights, or save the adapter again"
            raise BadInputError(Finding("shape", message, fix=fix))
        return found

    def with_tensors(self, out: int, into: int, **tensors: Array) -> Part:
        """The same settings with other tensors."""
        return replace(self, tensors=tensors, out=out, into=into)

    def grown(self, along: str, size: int, **tensors: Array) -> Part:
        """The same with other tensors, for a weight that has another size along out or in."""
        into = along == IN
        return self.with_tensors(self.out if into else size, size if into else self.into, **tensors)


class NoImageError(Exception):
    """A family has no exact equivalent; ``needs_base`` where the base's weights would give one."""

    def __init__(self, why: str, *, needs_base: bool = False) -> None:
        super().__init__(why)
        self.why, self.needs_base = why, needs_base


class UnreadableError(Exception):
    """A module's tensors are not what this family writes."""


class Family:
    """A tuner family. Subclasses declare what its tensors are, and define the operations that they can follow."""

    types: ClassVar[tuple[str, ...]] = ()
    """Its values of ``peft_type``."""
    title: ClassVar[str] = ""
    prefix: ClassVar[str] = ""
    """What the first segment after a module's path begins with."""
    roles: ClassVar[Mapping[str, Dims]] = {}
    """Tensors by the end of their key, and what their dims run along; a role that ends in a dot stands for all that
    begin so."""
    fields: ClassVar[Mapping[str, str | None]] = {}
    """Config fields that hold for a module, and the fields that override them by patterns."""
    shared: ClassVar[tuple[str, ...]] = ()
    """Tensors that all modules share; one that ends in a dot stands for all that begin so."""
    formula: ClassVar[str] = ""
    """What it makes of a base weight W."""
    rank: ClassVar[str] = ""
    """The rank of its delta, where it is a LoRA's."""
    in_peft: ClassVar[bool] = True
    """Whether PEFT has it."""
    adds: ClassVar[bool] = True
    """Whether it adds a delta that does not depend on the base's weights."""
    merges: ClassVar[bool] = True
    """Whether PEFT can merge it into the base."""
    changes_bias: ClassVar[bool] = False
    """Whether it changes the module's bias as well."""
    batches: ClassVar[bool] = True
    """Whether ``lora`` takes many modules at once, their tensors stacked."""
    anchored: ClassVar[bool] = False
    """Whether PEFT wants a dot before what its patterns match, and takes a whole path as it is."""
    fixed: ClassVar[str] = ""
    """Why it follows a weight's new name and nothing else; empty where it can do more."""
    base_helps: ClassVar[bool] = False
    """Whether the base's weights give an exact image where the family itself has none."""
    table: ClassVar[Mapping[str, Cell]] = {}
    """What it can do under each operation."""

    def __init__(self, config: Mapping[str, Any], shared: Mapping[str, Array]) -> None:
        self.config, self.common = config, shared
        reader = Anchored if self.anchored else Patterns
        self._patterns = {
            field: reader(config.get(pattern), pattern)
            for field, pattern in self.fields.items()
            if pattern is not None
        }

    @classmethod
    def cell(cls, operation: str) -> Cell:
        """What it can do under an operation."""
        return cls.table[operation]

    @classmethod
    def covers(cls, config: Mapping[str, Any]) -> bool:
        """Whether an adapter with this config is of the family."""
        return config.get("peft_type") in cls.types

    @classmethod
    def shares(cls, name: str) -> bool:
        """Whether a tensor is one that all modules share."""
        return any(name == x or (x.endswith(".") and name.startswith(x)) for x in cls.shared)

    # -- reading and writing

    def survey(self, parts: Mapping[str, Part]) -> None:
        """Look at all modules, by path, before any of them moves; for families whose modules depend on each other."""

    def varies(self) -> bool:
        """Whether settings differ from module to module."""
        return any(self._patterns.values())

    def settings(self, path: str) -> dict[str, Any]:
        """What the config says of a module."""
        found = {}
        for name in self.fields:
            value = self._patterns[name].find(path) if name in self._patterns else None
            found[name] = self.config.get(name) if value is None else value
        return found

    @classmethod
    def spell(cls, patterns: Mapping[str, Any]) -> dict[str, Any]:
        """Patterns (endings of paths, or ``^`` and a path) as PEFT reads this family's."""
        return dict(patterns)

    def read(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """A module's tensors by role, from the ends of their keys."""
        return dict(tensors)

    def write(self, part: Part) -> dict[str, Array]:
        """A module's tensors by the ends of their keys."""
        return dict(part.tensors)

    def sizes(self, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Sizes:
        """How large out and in are, as far as a module's tensors say it."""
        found: dict[str, int] = {}
        for role, tensor in tensors.items():
            dims = self.dims(role, tensor)
            if dims is None:
                continue
            if tensor.ndim != len(dims):
                raise UnreadableError(
                    f"{role} has {tensor.ndim} dims, and {len(dims)} were expected"
                )
            for size, name in zip(tensor.shape, dims, strict=True):
                if name is not None and found.setdefault(name, size) != size:
                    raise UnreadableError(f"its tensors disagree on the size of {name}")
        self.check_rank(found.get(RANK), settings)
        return found.get(OUT), found.get(IN)

    def check_rank(self, rank: int | None, settings: Mapping[str, Any]) -> None:
        """Raise ``UnreadableError`` where a module's tensors have another rank than the config gives them.

        PEFT makes tensors of that rank before it loads a file. Families where a module's rank depends on the
        training say nothing here.
        """
        told = settings.get("r", self.config.get("r"))
        if rank is not None and told is not None and rank != told:
            raise UnreadableError(
                f"adapter_config.json gives the rank {told}, its tensors have {rank}"
            )

    def check_field(self, name: str, have: int, settings: Mapping[str, Any]) -> None:
        """Raise ``UnreadableError`` where a field of the config gives a module's tensors another size than they have.

        As ``check_rank``; a field that is absent says nothing.
        """
        told = settings.get(name, self.config.get(name))
        if told is not None and told != have:
            raise UnreadableError(
                f"adapter_config.json gives {name} {told}, its tensors have {have}"
            )

    # -- following the base

    def rename(self, part: Part, old: str, new: str) -> Part:
        """The adapter of the same weight under another name; the paths of its module before and after."""
        return part

    @classmethod
    def dims(cls, role: str, tensor: Array) -> Dims | None:
        """What the dims of a tensor run along; ``None`` where the family does not know it."""
        found = cls.roles.get(role)
        if found is None:
            found = next(
                (d for r, d in cls.roles.items() if r.endswith(".") and role.startswith(r)), None
            )
        return found

    def along(self, role: str, tensor: Array) -> Dims:
        """What the dims of a tensor run along.

        Raises ``NoImageError`` where the family does not know it.
        """
        found = self.dims(role, tensor)
        if found is None:
            raise self.refusal(f"no rule says what {role} stands on")
        return found

    def take(self, part: Part, rows: Ints | None, columns: Ints | None) -> Part:
        """The adapter of some rows and columns of the weight, in some order; ``None`` stands for all as they are."""
        self.may_take(part, rows, columns)
        index = {OUT: rows, IN: columns}
        tensors = {}
        for role, tensor in part.tensors.items():
            for dim, name in enumerate(self.along(role, tensor)):
                wanted = index.get(name or "")
                if wanted is not None:
                    tensor = tensor.take(wanted, axis=dim)
            tensors[role] = tensor
        out = part.out if rows is None else len(rows)
        into = part.into if columns is None else len(columns)
        return part.with_tensors(out, into, **tensors)

    def may_take(self, part: Part, rows: Ints | None, columns: Ints | None) -> None:
        """Raise ``NoImageError`` where rows and columns cannot be taken, or, with ``None``, nothing can be done."""
        if self.fixed:
            raise self.refusal(self.fixed)

    def turn(self, part: Part) -> Part:
        """The adapter of the transposed weight."""
        raise self.refusal(self.fixed or "it cannot follow a transposed weight")

    def join_out(self, parts: Sequence[Part | None], outs: Sequence[int]) -> Part:
        """The adapter of weights one below the other; ``None`` where one is not adapted."""
        raise self.refusal(self.fixed or "it cannot follow weights that are joined along out")

    def join_in(self, parts: Sequence[Part | None], intos: Sequence[int]) -> Part:
        """The adapter of weights side by side."""
        raise self.refusal(self.fixed or "it cannot follow weights that are joined along in")

    def join_alike(
        self, parts: Sequence[Part | None], sizes: Sequence[int], along: str, why: str
    ) -> Part:
        """Weights joined along out or in, whose adapters agree in everything that does not run along the joint.

        Raises ``NoImageError`` with ``why`` where one is not adapted, or they do not agree.
        """
        there = present(parts)
        tensors = {}
        for role, tensor in there[0].tensors.items():
            own, dims = [part[role] for part in there], self.along(role, tensor)
            if along in dims:
                tensors[role] = joined(own, axis=dims.index(along))
            elif same_bits(own):
                tensors[role] = own[0]
            else:
                raise self.refusal(why)
        if len(there) < len(parts):
            raise self.refusal(why)
        return there[0].grown(along, sum(sizes), **tensors)

    def refusal(self, why: str) -> NoImageError:
        """That there is no exact image, to be raised."""
        return NoImageError(why, needs_base=self.base_helps)

    def settle(self, parts: dict[str, Part]) -> tuple[dict[str, Part], dict[str, Any]]:
        """Make parts agree on what the config has only once; the parts, and the config fields that change."""
        return parts, {}

    def confirm(self, config: Mapping[str, Any], parts: Mapping[str, Part]) -> None:
        """Raise ``NoImageError`` where PEFT would not read from a new config what these parts, by path, say."""

    # -- leaving the family

    def lora(self, part: Part, weight: Weight) -> Pair:
        """The delta as ``B @ A``, (rank, in) and (out, rank); leading dims are batches.

        ``weight`` gives the base weight (out, in), where it is at hand.
        """
        raise NoImageError("its delta is not a LoRA of lower rank")

    def delta(self, part: Part, weight: Weight) -> Wide:
        """The delta in float64; multiplicative families need the weight."""
        a, b = self.lora(part, weight)
        return np.asarray(b.astype(np.float64) @ a.astype(np.float64))

    def bias(self, part: Part, bias: Wide) -> Wide:
        """The module's bias as it is to be; families with ``changes_bias`` change it."""
        return bias


def present(parts: Sequence[Part | None]) -> list[Part]:
    """The parts that are adapted."""
    return [part for part in parts if part is not None]


def each(function: Callable[[_One], _Other], parts: Sequence[_One | None]) -> list[_Other | None]:
    """What a function makes of every part; ``None`` stays.

    >>> each(len, ["ab", None])
    [2, None]
    """
    return [None if part is None else function(part) for part in parts]


def tensors_of(parts: Sequence[Part | None], role: str) -> list[Array | None]:
    """One tensor of every part."""
    return each(lambda part: part[role], parts)


def need(weight: Weight, why: str = "it multiplies the base weight") -> Wide:
    """The base weight, or a refusal that says that it is needed."""
    if weight is None:
        raise NoImageError(why, needs_base=True)
    return weight()


def is_order(index: Ints | None, size: int) -> bool:
    """Whether an index takes everything once, in whatever order."""
    return index is None or (len(index) == size and bool((np.sort(index) == np.arange(size)).all()))


def whole_groups(index: Ints, size: int) -> Ints | None:
    """Which groups of ``size`` neighbours an index takes, each whole and in order; ``None`` where it does not.

    >>> whole_groups(np.array([4, 5, 0, 1]), 2).tolist()
    [2, 0]
    """
    starts = index[::size]
    whole = len(index) % size == 0 and not (starts % size).any()
    if whole and np.array_equal(index, (starts[:, None] + np.arange(size)).reshape(-1)):
        return np.asarray(starts // size)
    return None


def as_wide(*arrays: Array) -> tuple[Wide, ...]:
    """Arrays in float64."""
    return tuple(array.astype(np.float64) for array in arrays)


def narrowed(array: Wide, *like: Array) -> Array:
    """A computed array in float32, or float64 where one of its origins is.

    Raises ``RefusedError`` where a finite number would become infinite.
    """
    wide = any(x.dtype == np.float64 for x in like)
    return array if wide else cast_down(array, np.dtype(np.float32))


def block_diagonal(blocks: Sequence[Array]) -> Array:
    """Matrices along the diagonal of a larger one.

    >>> block_diagonal([np.ones((1, 1)), np.ones((1, 2))]).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
    """
    shape = sum(b.shape[0] for b in blocks), sum(b.shape[1] for b in blocks)
    result = np.zeros(shape, common_dtype({b.dtype for b in blocks}))
    row = column = 0
    for block in blocks:
        result[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return result


def joined(arrays: Sequence[Array], axis: int = 0) -> Array:
    """Arrays one after the other, in the narrowest dtype that holds them all."""
    dtype = common_dtype({a.dtype for a in arrays})
    return np.concatenate([a.astype(dtype, copy=False) for a in arrays], axis=axis)


def same_bits(arrays: Sequence[Array]) -> bool:
    """Whether arrays are the same, bit for bit."""
    first = arrays[0]
    return all(
        x.shape == first.shape
        and x.dtype == first.dtype
        and np.ascontiguousarray(x).tobytes() == np.ascontiguousarray(first).tobytes()
        for x in arrays[1:]
    )


def cells(**given: Cell | str) -> dict[str, Cell]:
    """A table: ``rename`` is always in the family, ``rest`` stands for operations that are not named.

    >>> cells(stack=LORA, rest=FAMILY)["split in"].rung
    'family'
    """
    told = {
        name.replace("_", " "): cell if isinstance(cell, Cell) else Cell(cell)
        for name, cell in {"rename": FAMILY, "rest": NONE, **given}.items()
    }
    rest = told.pop("rest")
    unknown = set(told) - set(OPERATIONS)
    assert not unknown, unknown
    return {operation: told.get(operation, rest) for operation in OPERATIONS}
