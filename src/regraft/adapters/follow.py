"""How a family follows its base weights through a plan, in its own form or as a LoRA.

Every target matrix is laid out in blocks, each from one source. What is taken of a source is taken of its adapter,
and what is joined is joined; each family says how. Where one cannot, all of its modules become LoRAs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from msgspec import Struct, field

from regraft.adapters.families.base import Family, NoImageError, Part, Wide, as_wide, narrowed
from regraft.adapters.form import Array, Factors, is_finite, is_float
from regraft.adapters.move import not_finite
from regraft.adapters.scale import Scale
from regraft.adapters.tuned import TunedModules
from regraft.errors import RefusedError
from regraft.names.keys import Ints
from regraft.planning.blocks import Landing, landings
from regraft.planning.plan import Plan
from regraft.rules.kinds import IN, KINDS, OUT
from regraft.values import replace

WeightOf = Callable[[str, str], Wide | None]
"""A base weight as a matrix (out, in), by its key and kind; ``None`` where it is not at hand."""


class Followed(Struct):
    """Parts by the key of their target, and what could not follow."""

    parts: dict[str, Part] = field(default_factory=dict)
    failed: dict[int, tuple[NoImageError, str]] = field(default_factory=dict)
    """By the id of a source: why, and by which rule."""


class _Piece(Struct, frozen=True):
    """A block of a target matrix and where it comes from."""

    source: int
    cross: bool
    rows_to: Ints
    columns_to: Ints
    rows_from: Ints
    columns_from: Ints


def follow(plan: Plan, tuned: TunedModules, family: Family) -> Followed:
    """Carry all modules along in the family."""
    result = Followed()
    for entry in plan.entries:
        for landing in landings(entry):
            (_rename if landing.stays else _carry)(landing, tuned, family, result)
    for carried in plan.carried:
        names = carried.group.names()
        result.parts.update(
            zip(names, (tuned.parts[i] for i in carried.group.ids.tolist()), strict=True)
        )
    return result


def _rename(landing: Landing, tuned: TunedModules, family: Family, result: Followed) -> None:
    entry, kind = landing.entry, landing.kind
    ids = entry.sources[0].reshape(-1).tolist()
    for name, number in zip(landing.keys.names(), ids, strict=True):
        if number < 0:
            continue
        part = tuned.parts[number]
        if KINDS[kind].module or kind == "any":
            old = tuned.headers.name(number)
            try:
                result.parts[name] = (
                    part
                    if name == old
                    else family.rename(
                        part, old.removesuffix(".weight"), name.removesuffix(".weight")
                    )
                )
                continue
            except NoImageError as error:
                why = error
        else:
            why = NoImageError(_PARAMETER)
        result.failed[number] = why, str(entry.rule)


_PARAMETER = "PEFT supports only plain LoRA on stacked expert parameters"


def _carry(landing: Landing, tuned: TunedModules, family: Family, result: Followed) -> None:
    entry, kind, slots = landing.entry, landing.kind, landing.slots
    if all((ids < 0).all() for ids in entry.sources):
        return
    if not KINDS[kind].module or kind == "any":
        failed = NoImageError(_PARAMETER), str(entry.rule)
        for ids in entry.sources:
            result.failed.update(dict.fromkeys(ids[ids >= 0].tolist(), failed))
        return
    out, into = landing.laid.sizes[OUT], landing.laid.sizes[IN]
    for loop in range(len(entry)):
        for slot in range(slots):
            pieces = _pieces(landing, loop, slot)
            present = [p.source for p in pieces if p.source >= 0]
            if not present:
                continue
            try:
                part = _assemble(pieces, tuned, family, out, into)
            except NoImageError as error:
                result.failed.update(dict.fromkeys(present, (error, str(entry.rule))))
                continue
            result.parts[landing.keys.name(loop * slots + slot)] = replace(part, kind=kind)


def _pieces(landing: Landing, loop: int, slot: int) -> list[_Piece]:
    """The blocks of one target; those of one source that share columns or rows are one piece."""
    found: list[_Piece] = []
    for block in landing.blocks:
        ids = landing.entry.sources[block.term][loop].reshape(-1)
        for at in np.flatnonzero(block.target_slot == slot).tolist():
            piece = _Piece(
                int(ids[block.source_slot[at]]),
                block.cross,
                block.rows_to[at],
                block.columns_to[at],
                block.rows_from[at],
                block.columns_from[at],
            )
            for place, other in enumerate(found):
                joined = _joined(other, piece)
                if joined is not None:
                    found[place] = joined
                    break
            else:
                found.append(piece)
    return found


def _joined(one: _Piece, other: _Piece) -> _Piece | None:
    """Two pieces of one source side by side as one."""
    if one.source != other.source or one.source < 0 or one.cross != other.cross:
        return None
    same_columns = np.array_equal(one.columns_to, other.columns_to) and np.array_equal(
        one.columns_from, other.columns_from
    )
    if same_columns:
        return replace(
            one,
            rows_to=np.concatenate([one.rows_to, other.rows_to]),
            rows_from=np.concatenate([one.rows_from, other.rows_from]),
        )
    same_rows = np.array_equal(one.rows_to, other.rows_to) and np.array_equal(
        one.rows_from, other.rows_from
    )
    if same_rows:
        return replace(
            one,
            columns_to=np.concatenate([one.columns_to, other.columns_to]),
            columns_from=np.concatenate([one.columns_from, other.columns_from]),
        )
    return None


def _assemble(
    pieces: Sequence[_Piece], tuned: TunedModules, family: Family, out: int, into: int
) -> Part:
    """The adapter of one target matrix."""
    if len(pieces) == 1:
        (piece,) = pieces
        part = _taken(piece, tuned, family)
        return _ordered(part, family, piece.rows_to, piece.columns_to)
    for piece in pieces:
        if piece.source >= 0 and not all(
            map(_is_sound, tuned.parts[piece.source].tensors.values())
        ):
            raise RefusedError(not_finite(tuned.headers.name(piece.source)))
    by_columns: dict[bytes, list[_Piece]] = {}
    for piece in pieces:
        by_columns.setdefault(piece.columns_to.tobytes(), []).append(piece)
    bands: list[Part | None] = []
    for band in by_columns.values():
        if sum(len(p.rows_to) for p in band) != out:
            raise NoImageError("its blocks stand neither beside nor below each other")
        bands.append(_band(band, tuned, family))
    if len(bands) == 1:
        (only,) = bands
        assert only is not None
        return only
    columns = [band[0].columns_to for band in by_columns.values()]
    joint = family.join_in(bands, [len(c) for c in columns])
    return _ordered(joint, family, None, np.concatenate(columns))


def _is_sound(tensor: Array) -> bool:
    """Whether a tensor holds no NaN and no infinity; indices and seeds hold none."""
    return not is_float(tensor.dtype) or is_finite(tensor)


def _band(band: Sequence[_Piece], tuned: TunedModules, family: Family) -> Part | None:
    """Pieces one below the other."""
    parts = [None if p.source < 0 else _taken(p, tuned, family) for p in band]
    if all(part is None for part in parts):
        return None
    if len(band) == 1:
        (part,) = parts
        assert part is not None
        return _ordered(part, family, band[0].rows_to, None)
    joint = family.join_out(parts, [len(p.rows_to) for p in band])
    return _ordered(joint, family, np.concatenate([p.rows_to for p in band]), None)


def _taken(piece: _Piece, tuned: TunedModules, family: Family) -> Part:
    """What a piece takes of its source's adapter, rows and columns in the order of the piece."""
    part = tuned.parts[piece.source]
    if piece.source in tuned.unknown:
        raise NoImageError(
            "the size of its weight is told neither by its tensors nor by the base's config",
            needs_base=True,
        )
    if piece.cross:
        part = family.turn(part)
    rows = _some(piece.rows_from, part.out)
    columns = _some(piece.columns_from, part.into)
    return part if rows is None and columns is None else family.take(part, rows, columns)


def _ordered(part: Part, family: Family, rows: Ints | None, columns: Ints | None) -> Part:
    """A part whose rows and columns stand where they belong."""
    rows = None if rows is None else _some(np.argsort(rows), part.out)
    columns = None if columns is None else _some(np.argsort(columns), part.into)
    return part if rows is None and columns is None else family.take(part, rows, columns)


def _some(index: Ints, size: int) -> Ints | None:
    """``None`` for everything in its order."""
    return None if len(index) == size and np.array_equal(index, np.arange(size)) else index


class Factored(Struct):
    """All modules as LoRAs, or why some are none."""

    factors: Factors
    failed: dict[int, NoImageError] = field(default_factory=dict)
    """By the id of a weight."""
    based: set[str] = field(default_factory=set)
    """Keys of weights that were needed."""


def as_loras(
    tuned: TunedModules, family: Family, weight_of: WeightOf | None, *, dense: bool = False
) -> Factored:
    """Every module's delta as a LoRA of scale 1; ``dense`` allows full rank.

    ``weight_of`` gives base weights; it is asked only by families and modules that need them.
    """
    count = len(tuned.parts)
    none: list[Array] = [np.zeros(0)] * count
    result = Factored(Factors(tuned.headers, none, list(none), [Scale(1, 1)] * count, tuned.kinds))
    for ids in _alike(tuned, family):
        unknown = tuned.unknown.intersection(ids) if tuned.unknown else ()
        for number in unknown:
            result.failed[number] = NoImageError(
                "the size of its weight is told neither by its tensors nor by the base's config",
                needs_base=True,
            )
        ids = [i for i in ids if i not in unknown] if unknown else ids
        if ids:
            _convert(ids, tuned, family, weight_of, dense=dense, result=result)
    return result


def _alike(tuned: TunedModules, family: Family) -> Iterator[list[int]]:
    """Modules of one form, which are converted at once."""
    if not family.batches:
        yield from ([i] for i in range(len(tuned.parts)))
        return
    forms: dict[object, list[int]] = {}
    for number, form in enumerate(tuned.forms):
        forms.setdefault(form, []).append(number)
    yield from forms.values()


def _convert(
    ids: Sequence[int],
    tuned: TunedModules,
    family: Family,
    weight_of: WeightOf | None,
    *,
    dense: bool,
    result: Factored,
) -> None:
    first = tuned.parts[ids[0]]
    try:
        if family.batches and len(ids) > 1:
            stacked = {
                role: np.stack([tuned.parts[i].tensors[role] for i in ids])
                for role in first.tensors
            }
            a, b = family.lora(replace(first, tensors=stacked), None)
            pairs = [(a[n], b[n]) for n in range(len(ids))]
        else:
            pairs = [family.lora(first, _weight(tuned, ids[0], weight_of, result))]
    except NoImageError as error:
        for number in ids:
            _densely(number, tuned, family, weight_of, dense=dense, why=error, result=result)
        return
    rank, most = pairs[0][0].shape[0], min(first.out, first.into)
    if rank > most:
        pairs = [full_rank(b.astype(np.float64) @ a.astype(np.float64), a, b) for a, b in pairs]
    scale = Scale(min(rank, most), min(rank, most))
    for number, (one, other) in zip(ids, pairs, strict=True):
        result.factors.a[number], result.factors.b[number] = one, other
        result.factors.scales[number] = scale


def _densely(
    number: int,
    tuned: TunedModules,
    family: Family,
    weight_of: WeightOf | None,
    *,
    dense: bool,
    why: NoImageError,
    result: Factored,
) -> None:
    """One module by itself: with its base weight, or as a delta of full rank."""
    part = tuned.parts[number]
    weight = _weight(tuned, number, weight_of, result)
    try:
        if not dense:
            if weight is None or not why.needs_base:
                raise why
            _put(number, family.lora(part, weight), result)
            return
        delta = family.delta(part, weight)
    except NoImageError as error:
        result.failed[number] = error
        return
    _put(number, full_rank(delta, *_floats(part)), result)


def _floats(part: Part) -> list[Array]:
    return [t for t in part.tensors.values() if t.dtype.kind != "i"]


def _weight(
    tuned: TunedModules, number: int, weight_of: WeightOf | None, result: Factored
) -> Callable[[], Wide] | None:
    if weight_of is None:
        return None
    name, kind = tuned.headers.name(number), tuned.parts[number].kind

    def read() -> Wide:
        found = weight_of(name, kind)
        if found is None:
            raise NoImageError("the base's folder has not this weight", needs_base=True)
        result.based.add(name)
        return found

    return read


def _put(number: int, pair: tuple[Array, Array], result: Factored) -> None:
    result.factors.a[number], result.factors.b[number] = pair
    rank = pair[0].shape[0]
    result.factors.scales[number] = Scale(rank, rank)


def full_rank(delta: Wide, *like: Array) -> tuple[Array, Array]:
    """A delta as a LoRA of full rank: itself beside the identity.

    >>> a, b = full_rank(np.ones((2, 3)))
    >>> a.shape, b.tolist()
    ((2, 3), [[1.0, 0.0], [0.0, 1.0]])
    """
    out, into = delta.shape
    made = narrowed(delta, *like)
    one = np.eye(min(out, into), dtype=made.dtype)
    return (made, one) if out <= into else (one, made)


def trimmed(a: Array, b: Array) -> tuple[Array, Array] | None:
    """Factors of more components than the matrix has rows or columns as a delta beside the identity."""
    if a.shape[-2] <= min(b.shape[-2], a.shape[-1]) or a.ndim != 2:
        return None
    wide_a, wide_b = as_wide(a, b)
    return full_rank(wide_b @ wide_a, a, b)
