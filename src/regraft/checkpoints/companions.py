"""Tensors that belong to a quantised weight and move with it.

* scales in a grid (``weight_scale_inv`` of fp8 weights): one number for a block of the weight, so they
  are cut and joined in a grid of their own, where the cuts fall between blocks;
* single scales (0-d, or one number): copied where a weight is split, required equal where some are joined;
* packed state (GPTQ's ``qweight``, MXFP4's ``_blocks``, what bitsandbytes keeps): only with a weight that stays whole.

A weight of which only packed state is there is planned as if it stood there with its true shape.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from regraft.checkpoints.aliases import find_aliases
from regraft.checkpoints.config import V4, V5
from regraft.checkpoints.moves import Moves, Runs, Strided, add_output
from regraft.checkpoints.quantization import (
    BESIDE,
    BITSANDBYTES,
    ONLY_QUANTISED,
    PACKED,
    SINGLES,
    STACKED,
    Quantization,
    bits_of,
    block_size,
    block_step,
    is_fp8,
    name_of,
    read_quantization,
    suffix_of,
)
from regraft.checkpoints.source import Source, Tensors
from regraft.equation.lower import lower
from regraft.equation.notation import Axis, Expr, Product, Sum, Term, axes_of
from regraft.errors import Finding, RefusedError
from regraft.names.keys import Group, Ints, group_names
from regraft.planning.plan import Entry, Headers, Plan
from regraft.planning.steps import Output, output_of, steps_of
from regraft.storage.ranges import open_ranges
from regraft.storage.stamp import changed

_LEAVES = sorted(BESIDE, key=len, reverse=True)
_OF_PARAMETERS = {
    name_of("", suffix_of(leaf)): suffix_of(leaf)
    for leaf in sorted(BESIDE, key=lambda leaf: (-len(leaf), leaf.startswith("weight")))
    if "weight." not in leaf and leaf != "scale"
}
"""What the names of a stacked parameter's companions end in, the longest first, and the suffix that it is."""
_ENDS = (*(f".{leaf}" for leaf in (*BESIDE, *PACKED)), *_OF_PARAMETERS, *STACKED)
_KINDS_OF_ENDS = tuple(group.template for group in group_names(_ENDS))
"""The same with a mark for each number."""
_FIX = (
    "convert the model as it was before it was quantised, or with --dequantize (FP8, MXFP4, NVFP4)"
)
_NARROW = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "F4"})
"""Types that quantised weights are stored in."""
_NAMED_IN_METADATA = frozenset({"torchao"})
"""Methods whose files name every tensor a second time, in the metadata."""
_MODELOPT = "hf_quant_config.json"


class Companions(Struct, frozen=True, eq=False, dict=True):
    """Which tensors belong to which; ``of[suffix]`` maps a weight's row to its companion's."""

    of: Mapping[str, Mapping[int, int]]
    groups: Sequence[Group]
    """All names but the companions', and those that weights stand for."""
    shapes: Sequence[tuple[int, ...]]
    """By id; those that the weights stand for."""
    dtypes: Sequence[str]
    block: tuple[int, ...]
    """The block size that the config gives."""
    aliases: Mapping[int, int]
    """Ids of names that only the metadata knows, and the rows of the tensors that they stand for."""
    quantization: Quantization | None
    """The method; ``None`` where nothing is quantised."""
    packed: frozenset[int]
    """Weights whose elements are packed, so that they cannot be cut or joined."""

    @cached_property
    def headers(self) -> Headers:
        """What to plan from."""
        return Headers(self.groups, self.shapes, self.dtypes)

    def rows(self) -> list[int]:
        """The companions' rows."""
        return [row for table in self.of.values() for row in table.values()]

    def weights(self) -> Ints:
        """The ids of the weights that have companions, in order."""
        found = {owner for table in self.of.values() for owner in table}
        return np.array(sorted(found), dtype=np.int64)


def find_companions(source: Source, config: Mapping[str, Any] | None) -> Companions:
    """Tell companions from what rules speak of."""
    tensors = source.tensors
    found = _Found(source, config)
    if any(group.template.endswith(_KINDS_OF_ENDS) for group in tensors.groups):
        found.search()
    taken = {row for table in found.of.values() for row in table.values()}
    shapes, virtual = found.shapes, found.virtual
    named = find_aliases(source)
    first = len(shapes)
    owners = {first + at: row for at, row in enumerate(named.values()) if row not in taken}
    shapes += [shapes[row] for row in named.values()]
    if taken or virtual or named:
        own = [i for i in range(len(tensors)) if i not in taken]
        kept = np.array([*own, *virtual.values(), *owners], dtype=np.int64)
        names = [*tensors.names, *virtual, *named]
        groups = group_names([names[i] for i in kept.tolist()])
        groups = [Group(g.template, kept[g.ids], g.numbers) for g in groups]
    else:
        groups = tensors.groups
    dtypes = [*tensors.dtypes, *("U8" for _ in virtual)]
    dtypes += [tensors.dtypes[row] for row in named.values()]
    return Companions(
        found.of,
        groups,
        shapes,
        dtypes,
        block_size(config),
        owners,
        found.quantization(),
        frozenset(found.packed),
    )


class _Found:
    """Companions while they are looked for."""

    def __init__(self, source: Source, config: Mapping[str, Any] | None) -> None:
        self.source, self.config, self.tensors = source, config, source.tensors
        self.of: dict[str, dict[int, int]] = {}
        self.shapes = list(source.tensors.shapes)
        self.virtual: dict[str, int] = {}
        self.packed: set[int] = set()
        self.like_awq = False
        self.is_fp8 = is_fp8(config)

    def search(self) -> None:
        """Sort the companions among the tensors, and add the weights of which only packed state is there."""
        self.rows = {name: row for row, name in enumerate(self.tensors.names)}
        modules = self._packed_modules()
        for row, name in enumerate(self.tensors.names):
            module = next((m for m in _parents(name) if m in modules), None) if modules else None
            if module is not None:
                leaf = name[len(module) + 1 :]
                if leaf != "bias":
                    self._add(modules[module], suffix_of(leaf), row)
            elif name.endswith(_ENDS):
                self._sort(name, row)

    def quantization(self) -> Quantization | None:
        """The method, as far as the config and the tensors tell; none without tensors that it adds."""
        if not self.of:
            return None
        algorithm = None
        try:
            told = msgspec.json.decode((self.source.root / _MODELOPT).read_bytes())
            algorithm = str(told["quantization"]["quant_algo"])
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            pass
        return read_quantization(
            self.config, self.of.keys(), algorithm, packed_like_awq=self.like_awq
        )

    def _packed_modules(self) -> dict[str, int]:
        """The modules that keep packed state only, and the ids of their weights."""
        modules: dict[str, int] = {}
        for leaf in PACKED:
            for name, row in self.rows.items():
                if name.endswith("." + leaf):
                    module = name.removesuffix("." + leaf)
                    if f"{module}.weight" not in self.rows:
                        shape = self._unpacked(module, leaf, row)
                        modules[module] = self._new(f"{module}.weight", shape)
        return modules

    def _new(self, name: str, shape: tuple[int, ...]) -> int:
        number = self.virtual[name] = len(self.shapes)
        self.shapes.append(shape)
        self.packed.add(number)
        return number

    def _add(self, owner: int, suffix: str, row: int) -> None:
        self.of.setdefault(suffix, {})[owner] = row
        if suffix.startswith(".quant_state"):
            self.shapes[owner] = _shape_in_json(self.source, row) or self.shapes[owner]
        if suffix in BITSANDBYTES:
            self.packed.add(owner)
        if self._has_pairs(owner, suffix):
            *lead, last = self.tensors.shapes[owner]
            self.shapes[owner] = (*lead, 2 * last)
            self.packed.add(owner)

    def _has_pairs(self, owner: int, suffix: str) -> bool:
        """Whether a companion tells that each byte of its weight is two numbers: NVFP4's, and FP4's among FP8."""
        if owner in self.packed or owner >= len(self.tensors) or not self.tensors.shapes[owner]:
            return False
        dtype = self.tensors.dtypes[owner]
        return (suffix == "_scale_2" and dtype == "U8") or (dtype == "I8" and self.is_fp8)

    def _sort(self, name: str, row: int) -> None:
        for leaf in _LEAVES:
            if name.endswith("." + leaf):
                owner = self.rows.get(name.removesuffix(leaf) + "weight")
                if owner is not None and self._fits(suffix_of(leaf), owner):
                    if leaf == "weight_scales":  # EETQ keeps the weight transposed
                        self.shapes[owner] = self.tensors.shapes[owner][::-1]
                        self.packed.add(owner)
                    self._add(owner, suffix_of(leaf), row)
                    return
        for suffix in STACKED:
            base = name.removesuffix(suffix)
            if base != name and base not in self.rows and self.rows.keys() >= _parts(base):
                owner = self.virtual.get(base)
                if owner is None:
                    blocks = self.tensors.shapes[self.rows[base + "_blocks"]]
                    owner = self._new(base, _mxfp4_shape(blocks))
                self._add(owner, suffix, row)
                return
        for ending, suffix in _OF_PARAMETERS.items():
            owner = self.rows.get(name.removesuffix(ending)) if name.endswith(ending) else None
            if owner is not None and self._fits(suffix, owner):
                self._add(owner, suffix, row)
                return

    def _fits(self, suffix: str, owner: int) -> bool:
        return suffix not in ONLY_QUANTISED or self.tensors.dtypes[owner] in _NARROW

    def _unpacked(self, module: str, leaf: str, row: int) -> tuple[int, ...]:
        """The shape of the weight that packed state stands for."""
        shape = self.tensors.shapes[row]
        if leaf == "qweight" and len(shape) == 2:
            scales = self._shape(f"{module}.scales")
            zeros = self._shape(f"{module}.qzeros")
            if len(zeros) == len(scales) == 2 and 0 not in zeros:
                if zeros[1] == shape[1] != scales[1]:
                    self.like_awq = True
                    return scales[1], shape[0]
                return shape[1], shape[0] * shape[1] // zeros[1]
            bits = bits_of(self.config)
            return (shape[1], shape[0] * 32 // bits) if bits else shape[::-1]
        order = self._shape(f"{module}.q_invperm")
        if leaf == "q_weight" and len(shape) == 2 and len(order) == 1:
            return shape[1], order[0]
        if leaf in ("weight_packed", "W_q"):
            told = self.rows.get(
                f"{module}.{'weight_shape' if leaf == 'weight_packed' else 'shape'}"
            )
            if told is not None:
                return _numbers(self.source, told) or shape
            if leaf == "weight_packed" and self.tensors.dtypes[row] == "U8":
                return (*shape[:-1], 2 * shape[-1])
        return shape

    def _shape(self, name: str) -> tuple[int, ...]:
        row = self.rows.get(name)
        return () if row is None else self.tensors.shapes[row]


def _parents(name: str) -> list[str]:
    """What may be the module of a tensor: its name without the last one or two parts.

    >>> _parents("a.b.weight._data")
    ['a.b.weight', 'a.b']
    """
    first = name.rpartition(".")[0]
    return [first, first.rpartition(".")[0]]


def _parts(base: str) -> set[str]:
    return {base + suffix for suffix in STACKED}


def _mxfp4_shape(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """The weight's shape: blocks are (experts, out, groups, 16 bytes) of an (experts, in, out) weight."""
    if len(blocks) != 4:
        return blocks
    return (blocks[0], blocks[2] * blocks[3] * 2, blocks[1])


def _shape_in_json(source: Source, row: int) -> tuple[int, ...] | None:
    data = _read(source, row, 10_000)
    try:
        shape = json.loads(data)["shape"]
        return tuple(int(size) for size in shape)
    except (ValueError, RecursionError, OverflowError, KeyError, TypeError):
        return None


def _numbers(source: Source, row: int) -> tuple[int, ...] | None:
    """A few whole numbers that a tensor holds."""
    kinds = {"I64": "<i8", "I32": "<i4"}
    kind = kinds.get(source.tensors.dtypes[row])
    if kind is None or int(source.tensors.sizes[row]) > 64:
        return None
    return tuple(np.frombuffer(_read(source, row, 64), kind).tolist())


def _read(source: Source, row: int, limit: int) -> bytes:
    tensors = source.tensors
    number = int(tensors.files[row])
    data = bytearray(min(int(tensors.sizes[row]), limit))
    file = open_ranges(source.files[number].path, source.files[number].stamp)
    try:
        file.fill([memoryview(data)], int(tensors.starts[row]))
    except EOFError:
        raise changed(source.files[number].path, "it ended early") from None
    finally:
        file.close()
    return bytes(data)


def check_step_by_step(plan: Plan, companions: Companions, where: str) -> None:
    """Raises ``RefusedError`` for quantised weights on a way over several layouts: scales move along one step only."""
    if companions.rows() and plan.is_composed:
        raise RefusedError(
            Finding(
                "companion",
                "it is quantised, and its scales move from one layout to the next only",
                where=where,
                fix="convert step by step, from layout to layout",
            )
        )


def check_quantised(plan: Plan, companions: Companions) -> None:
    """Raises ``RefusedError`` where a quantised weight would be cut or joined, and no loader could read the result.

    What only renames is exact for every method.
    """
    told = companions.quantization
    if told is None:
        return
    weights = companions.weights()
    findings = []
    for entry in plan.entries:
        used = np.concatenate([ids.reshape(-1) for ids in entry.sources])
        used = used[np.isin(used, weights)]
        if not len(used):
            continue
        packed = next((i for i in used.tolist() if i in companions.packed), None)
        target = _unread(entry, plan)
        if entry.renames:
            if told.method in _NAMED_IN_METADATA and entry.read[0].key != entry.written[0].key:
                why = "the file's metadata names its tensors, and they get other names"
                findings.append(_refused(int(used[0]), "packed", why, entry, plan, told))
        elif packed is not None:
            why = "its numbers are packed, and it would be cut or joined"
            findings.append(_refused(packed, "packed", why, entry, plan, told))
        elif target is not None:
            why = f"{plan.target_layout} reads no scales beside {target.key}"
            findings.append(_refused(int(used[0]), "companion", why, entry, plan, told))
    if findings:
        raise RefusedError(findings)


def _unread(entry: Entry, plan: Plan) -> Term | None:
    """A target for which transformers reads no scales: it does for modules' weights alone."""
    if plan.target_layout not in (V4, V5):
        return None
    return next((t for t in entry.written if not str(t.key).endswith(".weight")), None)


def _refused(
    number: int,
    code: str,
    why: str,
    entry: Entry,
    plan: Plan,
    told: Quantization,
) -> Finding:
    if plan.target_layout == V5 and told.obstacle is not None:
        why += f"; one by one they cannot stay either: {told.obstacle}"
    return Finding(
        code,
        f"it is quantised with {told.title} ({told.evidence}); {why}",
        key=plan.headers.name(number),
        rule=str(entry.rule),
        fix=_FIX,
    )


def add_companions(moves: Moves, plan: Plan, companions: Companions, source: Source) -> None:
    """Add to what a plan moves what belongs to it.

    Raises ``RefusedError`` where a companion has no exact equivalent.
    """
    findings: list[Finding] = []
    for entry in plan.entries:
        for suffix, table in companions.of.items():
            if entry.renames:
                keys = entry.keys(entry.written[0])
                _add_whole(moves, keys, entry.sources[0].reshape(-1), suffix, table, source)
                continue
            try:
                _add(moves, entry, suffix, table, companions, source)
            except RefusedError as error:
                findings += error.findings
    for carried in plan.carried:
        for suffix, table in companions.of.items():
            _add_whole(moves, carried.group, carried.group.ids, suffix, table, source)
    if findings:
        raise RefusedError(findings)


def _add_whole(
    moves: Moves, keys: Group, ids: Ints, suffix: str, table: Mapping[int, int], source: Source
) -> None:
    names = keys.names()
    pairs = [
        (name_of(names[at], suffix), table[row])
        for at, row in enumerate(ids.tolist())
        if row in table
    ]
    if pairs:
        rows = np.array([row for _, row in pairs], dtype=np.int64)
        moves.add_whole([name for name, _ in pairs], rows, source.tensors)


def _add(
    moves: Moves,
    entry: Entry,
    suffix: str,
    table: Mapping[int, int],
    companions: Companions,
    source: Source,
) -> None:
    sources = [
        np.array([table.get(i, -1) for i in ids.reshape(-1).tolist()]).reshape(ids.shape)
        for ids in entry.sources
    ]
    if all((ids < 0).all() for ids in sources):
        return
    tensors = source.tensors
    example = next(int(i) for ids in sources for i in ids.reshape(-1) if i >= 0)

    told = companions.quantization
    title = f"it is quantised with {told.title}" if told is not None else "it is quantised"

    def refuse(message: str, row: int = example) -> RefusedError:
        message = f"{title}: {message}"
        return RefusedError(
            Finding("companion", message, key=tensors.names[row], rule=str(entry.rule), fix=_FIX)
        )

    if any((ids < 0).any() for ids in sources):
        raise refuse("some of the weights that move together have such a tensor, and some have not")
    if any(int(i) in companions.packed for ids in entry.sources for i in ids.reshape(-1)):
        raise refuse("it belongs to a packed weight, which would be cut or joined")
    rows = [int(i) for ids in sources for i in ids.reshape(-1)]
    shapes = {tensors.shapes[row] for row in rows}
    keys = [_renamed(entry.keys(term), suffix) for term in entry.written]
    if suffix in SINGLES or all(shape in ((), (1,)) for shape in shapes):
        if len(shapes) > 1 or not shapes <= {(), (1,)}:
            raise refuse(f"these tensors have the shapes {shapes}")
        _add_single(moves, entry, keys, sources, source, refuse)
        return
    sizes = _grid(entry, sources, tensors, companions.block, refuse)
    copies = lower(entry.rule.equation, sizes, reverse=entry.way.direction.backward)
    grid = entry.resized(sizes, copies=tuple(copies), sources=tuple(sources))
    made = tuple(grid.shape(term) for term in grid.written)
    names = tuple(group.names() for group in keys)
    add_output(moves, Output(grid, names, made, tuple(steps_of(grid))), tensors)


def _renamed(keys: Group, suffix: str) -> Group:
    return Group(name_of(keys.template, suffix), keys.ids, keys.numbers)


def _add_single(
    moves: Moves,
    entry: Entry,
    keys: Sequence[Group],
    sources: Sequence[Ints],
    source: Source,
    refuse: Any,
) -> None:
    """One number for each target: that of all its sources."""
    tensors = source.tensors
    like = int(sources[0].reshape(-1)[0])
    part = Moves()
    add_output(part, output_of(entry), tensors)
    weights = {
        int(w): int(c)
        for ids, rows in zip(entry.sources, sources, strict=True)
        for w, c in zip(ids.reshape(-1), rows.reshape(-1), strict=True)
    }
    chosen: dict[int, int] = {}
    values: dict[int, bytes] = {}
    moved: list[Runs | Strided] = [*part.runs, *part.strided]
    for move in moved:
        for target, weight in set(zip(move.targets.tolist(), move.sources.tolist(), strict=True)):
            row = weights[weight]
            values[row] = values.get(row) or _read(source, row, 64)
            first = chosen.setdefault(target, row)
            if values[first] != values[row]:
                raise refuse(
                    f"it would be joined with {tensors.names[first]}, and they are not equal", row
                )
    at = len(moves.names)
    for group in keys:
        moves.add(group.names(), tensors.shapes[like], len(group))
    moves.whole = False
    targets = np.array(sorted(chosen), dtype=np.int64)
    rows = np.array([chosen[t] for t in targets.tolist()], dtype=np.int64)
    none = np.zeros(len(rows), dtype=np.int64)
    moves.runs.append(Runs(rows, none, at + targets, none, tensors.sizes[rows]))
    moves.wholes.append((at, rows))


def _grid(
    entry: Entry, sources: Sequence[Ints], tensors: Tensors, block: tuple[int, ...], refuse: Any
) -> dict[str, int]:
    """The sizes of the axes in the grid of blocks."""
    sizes = dict(entry.sizes)
    steps: dict[str, int] = {}
    for term, ids in zip(entry.read, sources, strict=True):
        whole = entry.shape(term)
        found = {tensors.shapes[int(i)] for i in ids.reshape(-1)}
        if term.ends_open or len(found) > 1 or len(next(iter(found))) != len(whole):
            raise refuse(f"its shape {found} is no grid over {list(whole)}")
        shape = next(iter(found))
        told: tuple[int | None, ...] = (None,) * len(whole)
        if block and len(block) <= len(whole):
            told = (1,) * (len(whole) - len(block)) + block
        for dim, size, cells, known in zip(term.dims, whole, shape, told, strict=True):
            step = block_step(size, cells, known)
            if step is None:
                raise refuse(f"{cells} cells do not say what part of {size} each stands for")
            inner = _innermost(dim)
            for name in axes_of(dim):
                own = step if name in inner else 1
                if steps.setdefault(name, own) != own:
                    raise refuse(f"the blocks differ along the axis {name}")
    for name, step in steps.items():
        sizes[name] = -(-entry.sizes[name] // step)
    for term in (*entry.read, *entry.written):
        for dim in term.dims:
            inner = _innermost(dim)
            several = len({steps.get(name, 1) for name in inner}) > 1
            cut = not isinstance(dim, Axis) and any(
                entry.sizes[name] % steps.get(name, 1) for name in axes_of(dim)
            )
            outer = any(steps.get(n, 1) > 1 for n in axes_of(dim) if n not in inner)
            if several or cut or outer:
                raise refuse(f"a block would be cut: {term} with {dict(entry.sizes)}")
    return sizes


def _innermost(expr: Expr) -> frozenset[str]:
    """The axes that move by one element: of a product those of its last factor, of a sum those of all its terms."""
    if isinstance(expr, Axis):
        return frozenset({expr.name})
    if isinstance(expr, Sum):
        return frozenset().union(*(_innermost(term) for term in expr.terms))
    return (
        _innermost(expr.factors[-1]) if isinstance(expr, Product) and expr.factors else frozenset()
    )
