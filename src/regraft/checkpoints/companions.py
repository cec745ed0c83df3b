"""Tensors that belong to a quantised weight and move with it.

* block scales (``weight_scale_inv`` of fp8 weights): one number for a block of the weight, so they
  are cut and joined in a grid of their own, where the cuts fall between blocks;
* single scales (0-d, or one number): copied where a weight is split, required equal where some are joined;
* packed state (MXFP4's ``_blocks`` and ``_scales``, what bitsandbytes keeps): only with a weight that stays whole.

Source: what transformers 5.23 and bitsandbytes 0.49 save.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regraft.checkpoints.aliases import find_aliases
from regraft.checkpoints.moves import Moves, Runs, Strided, add_entry, is_whole
from regraft.checkpoints.source import Source, Tensors
from regraft.equation.lower import lower
from regraft.equation.notation import Axis, Expr, Sum, axes_of
from regraft.errors import Finding, RefusedError
from regraft.names.keys import Group, Ints, group_names
from regraft.planning.plan import Entry, Headers, Plan

_GRID = ("_scale_inv", "_scale")
_SINGLE = ("_scale_2", "_input_scale")
_MXFP4 = ("_blocks", "_scales")
_BNB = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
)
_INPUT = ".input_scale"
_ANY = (*_GRID, *_SINGLE, *_MXFP4, *_BNB, _INPUT)
_FIX = "convert the model before it is quantised"


@dataclass(frozen=True, slots=True, eq=False)
class Companions:
    """Which tensors belong to which; ``of[suffix]`` maps a weight's row to its companion's."""

    of: Mapping[str, Mapping[int, int]]
    headers: Headers
    """What to plan from: all tensors but the companions, with the shapes that the weights stand for."""
    block: tuple[int, ...]
    """The block size that the config gives."""
    aliases: Mapping[int, int]
    """Ids of names that only the metadata knows, and the rows of the tensors that they stand for."""

    def rows(self) -> list[int]:
        """The companions' rows."""
        return [row for table in self.of.values() for row in table.values()]


def find_companions(source: Source, config: Mapping[str, Any] | None) -> Companions:
    """Tell companions from what rules speak of."""
    tensors = source.tensors
    found: dict[str, dict[int, int]] = {}
    shapes = list(tensors.shapes)
    rows: dict[str, int] = {}
    virtual: dict[str, int] = {}
    for row, name in enumerate(tensors.names):
        if not name.endswith(_ANY):
            continue
        rows = rows or {name: row for row, name in enumerate(tensors.names)}
        suffix = next(s for s in (_INPUT, *reversed(_ANY)) if name.endswith(s))
        base = name.removesuffix(suffix) + (".weight" if suffix == _INPUT else "")
        owner = rows.get(base)
        if suffix in _MXFP4 and owner is None and rows.keys() >= {base + s for s in _MXFP4}:
            owner = virtual.get(base)
            if owner is None:
                owner = virtual[base] = len(shapes)
                shapes.append(_mxfp4_shape(tensors.shapes[rows[base + "_blocks"]]))
        if owner is None:
            continue
        suffix = "_input_scale" if suffix == _INPUT else suffix
        found.setdefault(suffix, {})[owner] = row
        if suffix.startswith(".quant_state"):
            shapes[owner] = _bnb_shape(source, row) or shapes[owner]
    taken = {row for table in found.values() for row in table.values()}
    named = find_aliases(source)
    first = len(shapes)
    owners = {first + at: row for at, row in enumerate(named.values()) if row not in taken}
    shapes += [shapes[row] for row in named.values()]
    own = [i for i in range(len(tensors)) if i not in taken]
    kept = np.array([*own, *virtual.values(), *owners], dtype=np.int64)
    names = [*tensors.names, *virtual, *named]
    if len(kept) == len(names):
        groups = group_names(names)
    else:
        groups = group_names([names[i] for i in kept.tolist()])
        groups = [Group(g.template, kept[g.ids], g.numbers) for g in groups]
    dtypes = [*tensors.dtypes, *("U8" for _ in virtual)]
    dtypes += [tensors.dtypes[row] for row in named.values()]
    return Companions(found, Headers(groups, shapes, dtypes), _block_of(config), owners)


def _mxfp4_shape(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """The weight's shape: blocks are (experts, out, groups, 16 bytes) of an (experts, in, out) weight."""
    if len(blocks) != 4:
        return blocks
    return (blocks[0], blocks[2] * blocks[3] * 2, blocks[1])


def _bnb_shape(source: Source, row: int) -> tuple[int, ...] | None:
    data = _read(source, row, 10_000)
    try:
        shape = json.loads(data)["shape"]
        return tuple(int(size) for size in shape)
    except (ValueError, KeyError, TypeError):
        return None


def _read(source: Source, row: int, limit: int) -> bytes:
    tensors = source.tensors
    file = os.open(source.files[int(tensors.files[row])].path, os.O_RDONLY)
    try:
        return os.pread(file, min(int(tensors.sizes[row]), limit), int(tensors.starts[row]))
    finally:
        os.close(file)


def _block_of(config: Mapping[str, Any] | None) -> tuple[int, ...]:
    quantization = (config or {}).get("quantization_config")
    block = quantization.get("weight_block_size") if isinstance(quantization, Mapping) else None
    if isinstance(block, list) and all(isinstance(n, int) and n > 0 for n in block):
        return tuple(block)
    return ()


def add_companions(moves: Moves, plan: Plan, companions: Companions, source: Source) -> None:
    """Add to what a plan moves what belongs to it.

    Raises ``RefusedError`` where a companion has no exact image.
    """
    findings: list[Finding] = []
    for entry in plan.entries:
        for suffix, table in companions.of.items():
            if is_whole(entry):
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


def name_of(base: str, suffix: str) -> str:
    """The name of a weight's companion.

    >>> name_of("a.weight", "_scale_inv"), name_of("a.weight", "_input_scale"), name_of("a.up", "_input_scale")
    ('a.weight_scale_inv', 'a.input_scale', 'a.up_input_scale')
    """
    if suffix == "_input_scale" and base.endswith(".weight"):
        return base.removesuffix(".weight") + _INPUT
    return base + suffix


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

    def refuse(message: str, row: int = example) -> RefusedError:
        return RefusedError(
            Finding("companion", message, key=tensors.names[row], rule=str(entry.rule), fix=_FIX)
        )

    if any((ids < 0).any() for ids in sources):
        raise refuse("some of the weights that move together have such a tensor, and some have not")
    if suffix in (*_BNB, *_MXFP4):
        raise refuse("it belongs to a packed weight, which would be cut or joined")
    rows = [int(i) for ids in sources for i in ids.reshape(-1)]
    shapes = {tensors.shapes[row] for row in rows}
    keys = [_renamed(entry.keys(term), suffix) for term in entry.written]
    if all(shape in ((), (1,)) for shape in shapes):
        if len(shapes) > 1:
            raise refuse(f"these tensors have the shapes {shapes}")
        _add_single(moves, entry, keys, sources, source, refuse)
        return
    sizes = _grid(entry, sources, tensors, companions.block, refuse)
    copies = lower(entry.rule.equation, sizes, entry.reverse)
    add_entry(moves, entry, keys, copies, sizes, sources, tensors)


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
    add_entry(
        part,
        entry,
        [entry.keys(term) for term in entry.written],
        entry.copies,
        entry.sizes,
        entry.sources,
        tensors,
    )
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


def entry_keys(entry: Entry) -> list[Group]:
    """The keys that an entry writes, term by term."""
    return [entry.keys(term) for term in entry.written]


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
        told = (1,) * (len(whole) - len(block)) + block if block else (128,) * len(whole)
        for dim, size, cells, known in zip(term.dims, whole, shape, told, strict=True):
            step = _step(size, cells, known)
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


def _step(size: int, cells: int, known: int) -> int | None:
    if cells == size:
        return 1
    if -(-size // known) == cells:
        return known
    return size // cells if cells and size % cells == 0 else None


def _innermost(expr: Expr) -> frozenset[str]:
    """The axes that move by one element: of a product those of its last factor, of a sum those of all its terms."""
    if isinstance(expr, Axis):
        return frozenset({expr.name})
    if isinstance(expr, Sum):
        return frozenset().union(*(_innermost(term) for term in expr.terms))
    return _innermost(expr.factors[-1])
