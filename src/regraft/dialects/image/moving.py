"""Moving an adapter from one layout of its base to another, module by module, each in the best form that is exact.

A layout change of these families renames modules, and takes or joins rows of them. A LoRA follows exactly, and so do
most other algebras where they are split; what cannot follow becomes a LoRA where that is exact. Everything else is
done only by name (``via``), and otherwise refused with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from regraft.adapters.components import Record
from regraft.adapters.families.base import NoImageError, Wide
from regraft.adapters.form import Array, Factors, Images, Lora
from regraft.adapters.move import images
from regraft.adapters.ranks import cut
from regraft.adapters.scale import Scale
from regraft.dialects.image.delta import (
    FULL,
    LORA,
    NOTHING,
    SET,
    Delta,
    dense_lora,
    full_delta,
    join_rows,
    join_vectors,
    plain_lora,
    split_components,
    take_components,
    take_rows,
)
from regraft.dialects.image.families import DENOISER, Family
from regraft.dialects.image.modules import book_of
from regraft.dialects.image.read import Home, model_config
from regraft.dialects.image.weights import ImageBase, as_matrix
from regraft.errors import BadInputError, Finding, RefusedError
from regraft.layouts.graph import Edge
from regraft.names.keys import Ints, group_names
from regraft.planning.blocks import landings, landings_of
from regraft.planning.build import build_plan
from regraft.planning.model import Scope
from regraft.planning.plan import Entry, Headers, Plan

GIVE_BASE = "give the base's weights as --model, and ask for deltas of full rank (--via dense)"
DENSELY = "ask for deltas of full rank (--via dense), or of a lower rank (--via svd:RANK)"
MERGE = "merge the adapter into its base and convert the base"


@dataclass(slots=True)
class Ways:
    """What is allowed besides what is exact, and what became of modules that needed it."""

    where: str
    base: ImageBase | None = None
    via: str | None = None
    """``dense``, or ``svd:`` and a rank or a tolerance."""
    rungs: dict[Home, str] = field(default_factory=dict)
    """How modules that did not stay what they were were reached: ``lora``, ``dense``, ``svd``."""
    errors: dict[Home, float] = field(default_factory=dict)
    reasons: dict[Home, str] = field(default_factory=dict)

    def lower(self, home: Home, delta: Delta, why: NoImageError) -> Delta:
        """A module that cannot stay in its algebra, as a LoRA: exactly, or as was asked for.

        Raises ``NoImageError``.
        """
        if delta.magnitude is None and (delta.algebra != LORA or "mid" in delta.tensors):
            try:
                made = plain_lora(delta)
            except NoImageError as error:
                last = error
            else:
                self.rungs[home], self.reasons[home] = "lora", why.why
                return made
        else:
            last = why
        if self.via is None or delta.algebra == SET or is_vector(delta):
            raise last if last.why == why.why else _both(why, last)
        return self.densely(home, delta, why)

    def exactly(self, home: Home, delta: Delta, why: NoImageError) -> Delta:
        """A module as a plain LoRA with what stands around it; its algebra alone could not stay.

        Raises ``NoImageError``.
        """
        try:
            made = plain_lora(delta)
        except NoImageError as error:
            if self.via is None or delta.algebra == SET or is_vector(delta):
                raise _both(why, error) from None
            return self.densely(home, delta, why)
        if made is not delta:
            self.rungs[home], self.reasons[home] = "lora", why.why
        return made

    def densely(self, home: Home, delta: Delta, why: NoImageError) -> Delta:
        """A module as a delta of full rank, or as the best one of a lower rank.

        Raises ``NoImageError`` where a base weight is missing.
        """
        sized = delta
        weight = None
        if delta.needs_weight:
            if self.base is None:
                raise NoImageError("its delta depends on the base weight", needs_base=True)
            array = self.base.weight(home.component, home.layout, home.key, delta.shape)
            sized = _as_large_as(delta, array)
            matrix = as_matrix(array)

            def weight() -> Array:
                return matrix

        made = dense_lora(sized, weight)
        self.rungs[home], self.reasons[home] = "dense", why.why
        if self.via is not None and self.via.startswith("svd:") and made.algebra == LORA:
            made = self._cut(home, made)
        return made

    def _cut(self, home: Home, delta: Delta) -> Delta:
        down, up = delta.tensors["down"], delta.tensors["up"]
        lora = Lora(down.reshape(len(down), -1), up.reshape(len(up), -1), delta.scale)
        assert self.via is not None
        self.errors[home] = cut(lora, self.via.removeprefix("svd:"))
        self.rungs[home] = "svd"
        rank = len(lora.a)
        tensors = {
            "down": lora.a.reshape(rank, *down.shape[1:]),
            "up": lora.b.reshape(len(up), rank, *up.shape[2:]),
        }
        return replace(delta, tensors=tensors, alpha=lora.scale.alpha, exact=False)

    def elsewhere(self, home: Home, delta: Delta, why: str, dialects: str, title: str) -> Finding:
        """That a format has no place for a component, and which have one."""
        return Finding(
            "no-image",
            f"{delta.name} has no exact equivalent in {title}: {why}",
            where=self.where,
            key=f"{home.component}.{home.key}",
            fix=f"convert it to {dialects}, or take the {home.component}'s tensors out first",
        )

    def finding(self, home: Home, delta: Delta, error: NoImageError, what: str = "") -> Finding:
        """Why a module has no exact equivalent."""
        if delta.algebra == SET or is_vector(delta):
            fix = MERGE
        elif error.why.endswith(_LENGTHS):
            fix = "give the base's weights as --model"
        elif error.needs_base or delta.needs_weight:
            fix = GIVE_BASE
        else:
            fix = DENSELY if self.via is None else MERGE
        return Finding(
            "needs-base-weights" if fix == GIVE_BASE and self.via is not None else "no-image",
            f"{delta.name} has no exact equivalent {what or 'there'}: {error.why}",
            where=self.where,
            key=home.key if home.component == DENOISER else f"{home.component}.{home.key}",
            fix=fix,
        )


def _both(why: NoImageError, last: NoImageError) -> NoImageError:
    return NoImageError(f"{why.why}; {last.why}", needs_base=last.needs_base)


def _as_large_as(delta: Delta, weight: Array) -> Delta:
    """A delta with the sizes of its base weight, where its own tensors do not show them.

    Raises ``NoImageError`` where they contradict each other.
    """
    out, into, kernel = len(weight), prod(weight.shape[1:]), tuple(weight.shape[2:])
    if (delta.out, delta.into) != (out, into) and (1 not in (delta.out, delta.into)):
        raise NoImageError(f"the base's weight has the shape {weight.shape}, which it does not fit")
    return replace(delta, out=out, into=into, kernel=kernel, conv=len(kernel) > 0)


def with_kernels(deltas: Mapping[Home, Delta], ways: Ways) -> dict[Home, Delta]:
    """The same, where a convolution's tensors do not show its kernel with the one that the base has."""
    made = dict(deltas)
    for home, delta in deltas.items():
        if ways.base is None or not delta.conv or delta.kernel or delta.algebra in (FULL, SET):
            continue
        try:
            weight = ways.base.weight(home.component, home.layout, home.key, delta.shape)
            made[home] = _as_large_as(delta, weight)
        except NoImageError:
            continue  # what needs the kernel will say so
    return made


# -- moving


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of one target and where they come from; ``source`` is -1 where that is not adapted."""

    source: int
    rows_to: Ints
    rows_from: Ints


@dataclass(slots=True)
class _Moved:
    deltas: dict[str, Delta] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    joins: list[tuple[list[_Piece], str, int]] = field(default_factory=list)
    failed: dict[int, NoImageError] = field(default_factory=dict)


def move_deltas(
    deltas: Mapping[Home, Delta], family: Family, to: str, ways: Ways
) -> dict[Home, Delta]:
    """All modules of a denoiser in another layout.

    Raises ``RefusedError`` with everything that has no exact equivalent there.
    """
    book = book_of(family)
    made: dict[Home, Delta] = {}
    moving: dict[tuple[str, str], dict[Home, Delta]] = {}
    for home, delta in deltas.items():
        if book is None or home.layout == to or home.component.startswith("text_encoder"):
            made[home] = delta
        else:
            moving.setdefault((home.component, home.layout), {})[home] = delta
    for (component, _), some in moving.items():
        assert book is not None
        config = Scope(model_config(family, some))
        route = _Route((Edge.to(book, to),), {book.name: config})
        for key, (delta, kind) in _move(some, route, ways).items():
            home = Home(component, to, key, kind)
            if home in made:
                raise BadInputError(_doubled(home, ways.where))
            made[home] = delta
    return made


def _doubled(home: Home, where: str) -> Finding:
    return Finding(
        "doubled-target",
        f"the file adapts {home.key} twice, once by its name in another layout, and one would be lost",
        where=where,
        key=home.key,
        fix="take one of the two out",
    )


@dataclass(frozen=True, slots=True)
class _Route:
    """The rules to move along, and what is known of the base's config."""

    edges: tuple[Edge, ...]
    scopes: dict[str, Scope]

    def plan(self, headers: Headers, where: str) -> Plan:
        """What becomes of some weights, of which some parts may be absent."""
        return build_plan(headers, self.edges, scopes=self.scopes, partial=True, where=where)


def _move(deltas: Mapping[Home, Delta], route: _Route, ways: Ways) -> dict[str, tuple[Delta, str]]:
    homes = list(deltas)
    parts = list(deltas.values())
    keys = [home.key for home in homes]
    shapes = [_shape(home, delta) for home, delta in deltas.items()]
    headers = Headers(group_names(keys), shapes, ["float32"] * len(keys))
    plan = route.plan(headers, ways.where)
    findings: list[Finding] = []
    for _ in range(3):
        moved = _once(plan, parts)
        if not moved.failed:
            break
        for number, error in moved.failed.items():
            try:
                parts[number] = _lowered(ways, homes[number], parts[number], error)
            except NoImageError as last:
                findings.append(ways.finding(homes[number], parts[number], last))
        if findings:
            raise RefusedError(findings)
    for carried in plan.carried:
        for name, number in zip(carried.group.names(), carried.group.ids.tolist(), strict=True):
            moved.deltas[name], moved.kinds[name] = parts[number], homes[number].kind
    _join(moved, headers, route, parts, homes, ways)
    by_target = _sources(plan)
    for name in moved.deltas:
        for number in by_target.get(name, ()):
            _inherit(
                ways,
                homes[number],
                Home(homes[number].component, route.edges[0].target, name, moved.kinds[name]),
            )
    return {name: (delta, moved.kinds[name]) for name, delta in moved.deltas.items()}


def _inherit(ways: Ways, old: Home, new: Home) -> None:
    """What is known of a module is known of what became of it."""
    tables: tuple[dict[Home, Any], ...] = (ways.rungs, ways.reasons, ways.errors)
    for table in tables:
        if old in table and new not in table:
            table[new] = table[old]


def _sources(plan: Plan) -> dict[str, set[int]]:
    """The sources of every target."""
    found: dict[str, set[int]] = {}
    for entry in plan.entries:
        for term in entry.written:
            keys = entry.keys(term)
            each = len(keys) // len(entry)
            for row, name in enumerate(keys.names()):
                ids = {int(i) for s in entry.sources for i in s[row // each].reshape(-1) if i >= 0}
                found.setdefault(name, set()).update(ids)
    return found


def _lowered(ways: Ways, home: Home, delta: Delta, error: NoImageError) -> Delta:
    """A module that cannot follow, in a form that can."""
    if delta.magnitude is not None and (error.needs_base or delta.algebra == LORA):
        return ways.lower(home, delta, error)
    return ways.exactly(home, delta, error)


def _shape(home: Home, delta: Delta) -> tuple[int, ...]:
    """The shape of the base weight as far as an adapter shows it; ones stand for the rest."""
    if home.kind == "vector":
        return (delta.out,)
    if home.kind == "conv" and len(delta.shape) == 2:
        return (*delta.shape, 1, 1)
    return delta.shape


def _once(plan: Plan, parts: Sequence[Delta]) -> _Moved:
    """Move everything that can follow; plain LoRAs that are joined are left for `_join`."""
    moved = _Moved()
    for entry in plan.entries:
        if entry.moves_nothing or entry.renames:
            names = entry.keys(entry.written[0]).names()
            ids = entry.sources[0].reshape(-1).tolist()
            for name, number in zip(names, ids, strict=True):
                if number >= 0:
                    moved.deltas[name], moved.kinds[name] = parts[number], entry.written_kinds[0]
            continue
        for loop in range(len(entry)):
            _move_loop(entry, loop, parts, moved)
    return moved


def _move_loop(entry: Entry, loop: int, parts: Sequence[Delta], moved: _Moved) -> None:
    """One value of an entry's loops: everything that its sources become."""
    targets: list[tuple[str, str, list[_Piece]]] = []
    for number, (term, kind) in enumerate(zip(entry.written, entry.written_kinds, strict=True)):
        keys = entry.keys(term)
        slots = prod(entry.stack(term))
        for slot in range(slots):
            pieces = _pieces(entry, number, loop, slot)
            if any(piece.source >= 0 for piece in pieces):
                targets.append((keys.name(loop * slots + slot), kind, pieces))
    components = _components(targets, parts)
    for name, kind, pieces in targets:
        sources = {piece.source for piece in pieces if piece.source >= 0}
        try:
            if len({piece.source for piece in pieces}) == 1:
                delta = _taken(pieces, parts, components.get((next(iter(sources)), name)))
                if delta is None:
                    continue
            elif all(parts[i].algebra == LORA and "mid" not in parts[i].tensors for i in sources):
                moved.joins.append((pieces, name, len(moved.joins)))
                moved.kinds[name] = kind
                continue
            else:
                delta = _joined(pieces, parts)
        except NoImageError as error:
            moved.failed.update(dict.fromkeys(sources, error))
            continue
        moved.deltas[name], moved.kinds[name] = delta, kind


def _pieces(entry: Entry, number: int, loop: int, slot: int) -> list[_Piece]:
    """Where the rows of a target come from, in their order there."""
    found: dict[int, list[tuple[Ints, Ints]]] = {}
    order: list[int] = []
    for block in landings(entry)[number].blocks:
        ids = entry.sources[block.term][loop].reshape(-1)
        for at in np.flatnonzero(block.target_slot == slot).tolist():
            columns = block.columns_from[at], block.columns_to[at]
            if block.cross or not np.array_equal(*columns):
                raise RefusedError(
                    Finding(
                        "no-image",
                        "a rule changes the in dims of this weight, and such adapters follow rows only",
                        rule=str(entry.rule),
                        fix=MERGE,
                    )
                )
            source = int(ids[block.source_slot[at]])
            place = source if source >= 0 else -2 - len(order)
            found.setdefault(place, []).append((block.rows_to[at], block.rows_from[at]))
            order.append(place)
    made = []
    for place in dict.fromkeys(order):
        to = np.concatenate([rows for rows, _ in found[place]])
        rows_from = np.concatenate([rows for _, rows in found[place]])
        by_place = np.argsort(to, kind="stable")
        made.append(_Piece(max(place, -1), to[by_place], rows_from[by_place]))
    return sorted(made, key=lambda piece: int(piece.rows_to[0]))


def _components(
    targets: Sequence[tuple[str, str, list[_Piece]]], parts: Sequence[Delta]
) -> dict[tuple[int, str], Ints]:
    """Which components of a LoRA go to which target, where its blocks say it."""
    rows: dict[int, list[tuple[str, Ints]]] = {}
    for name, _, pieces in targets:
        if len(pieces) == 1:
            rows.setdefault(pieces[0].source, []).append((name, pieces[0].rows_from))
    found = {}
    for source, given in rows.items():
        delta = parts[source]
        if delta.algebra != LORA or "mid" in delta.tensors or len(given) < 2:
            continue
        in_order = sorted(given, key=lambda pair: int(pair[1][0]))
        alive = split_components(delta, [each for _, each in in_order])
        if alive is not None:
            found.update({(source, name): a for (name, _), a in zip(in_order, alive, strict=True)})
    return found


def _taken(
    pieces: Sequence[_Piece], parts: Sequence[Delta], components: Ints | None
) -> Delta | None:
    """The adapter of a target that is rows of one source; ``None`` where these rows are not adapted."""
    (piece,) = pieces
    delta = take_rows(parts[piece.source], piece.rows_from)
    if delta.padded and delta.algebra == LORA and not delta.tensors["up"].any():
        return None
    if components is not None:
        delta = take_components(delta, components)
    return replace(delta, padded=False)


def _joined(pieces: Sequence[_Piece], parts: Sequence[Delta]) -> Delta:
    """The adapter of a target that is several sources one below the other."""
    _check_order(pieces)
    return join_rows(
        [None if p.source < 0 else take_rows(parts[p.source], p.rows_from) for p in pieces]
    )


def _check_order(pieces: Sequence[_Piece]) -> None:
    rows = np.concatenate([piece.rows_to for piece in pieces])
    if not np.array_equal(rows, np.arange(len(rows))):
        raise NoImageError("the rows of its parts are interleaved in the fused weight")


def _join(
    moved: _Moved,
    headers: Headers,
    route: _Route,
    parts: list[Delta],
    homes: Sequence[Home],
    ways: Ways,
) -> None:
    """Plain LoRAs that are joined: ranks add, equal factors are one, scales are made one."""
    if not moved.joins:
        return
    findings: list[Finding] = []
    magnitudes: dict[str, Array | None] = {}
    home = replace(homes[0], layout=route.edges[-1].target)

    def lengths(name: str, pieces: Sequence[_Piece]) -> _Lengths | None:
        return _Lengths(replace(home, key=name), pieces, parts, ways.base) if ways.base else None

    for _ in range(2):
        failed: dict[int, NoImageError] = {}
        for pieces, name, _ in moved.joins:
            try:
                magnitudes[name] = _magnitudes(pieces, parts, lengths(name, pieces))
            except NoImageError as error:
                failed.update({p.source: error for p in pieces if p.source >= 0})
        for number, why in failed.items():
            try:
                parts[number] = ways.lower(homes[number], parts[number], why)
            except NoImageError as last:
                findings.append(ways.finding(homes[number], parts[number], last))
        if findings:
            raise RefusedError(findings)
    ids = sorted({p.source for pieces, _, _ in moved.joins for p in pieces if p.source >= 0})
    keys = [homes[i].key for i in ids]
    shapes = [headers.shapes[i] for i in ids]
    some = Headers(group_names(keys), shapes, ["float32"] * len(ids))
    plan = route.plan(some, ways.where)
    factors = Factors(
        some,
        [parts[i].tensors["down"] for i in ids],
        [parts[i].tensors["up"] for i in ids],
        [parts[i].scale for i in ids],
    )
    made: dict[str, Lora] = {}
    for landed in landings_of(plan):
        for image in images(landed, factors, keys, Record()):
            made.update(_loras(image))
    for pieces, name, _ in moved.joins:
        moved.deltas[name] = _with_vectors(made.get(name), pieces, parts, magnitudes.get(name))


def _loras(image: Images) -> Iterator[tuple[str, Lora]]:
    for row, lora in enumerate(image.loras):
        if lora is not None:
            yield image.keys.name(row), lora


_LENGTHS = "and the others would need the lengths of their rows"


@dataclass(frozen=True, eq=False)
class _Lengths:
    """The lengths that rows of a fused weight have with what is added to them: a magnitude that changes nothing."""

    home: Home
    """Of the fused weight."""
    pieces: Sequence[_Piece]
    parts: Sequence[Delta]
    base: ImageBase

    @cached_property
    def _weight(self) -> Wide:
        home = self.home
        into = max(self.parts[p.source].into for p in self.pieces if p.source >= 0)
        shape = (sum(len(p.rows_to) for p in self.pieces), into)
        return as_matrix(self.base.weight(home.component, home.layout, home.key, shape))

    def of(self, piece: _Piece) -> Array:
        """Those of a part without DoRA, or without an adapter.

        Raises ``NoImageError`` where the base does not have the weight.
        """
        rows = self._weight[piece.rows_to]
        if piece.source >= 0:
            rows = rows + full_delta(take_rows(self.parts[piece.source], piece.rows_from), None)
        return np.asarray(np.linalg.norm(rows, axis=1).astype(np.float32))


def _magnitudes(
    pieces: Sequence[_Piece], parts: Sequence[Delta], lengths: _Lengths | None
) -> Array | None:
    """DoRA's magnitudes of a fused weight, row by row; where some parts have none, the lengths of the base's rows.

    Raises ``NoImageError`` where there is no base to tell those.
    """
    there = [parts[p.source] if p.source >= 0 else None for p in pieces]
    if all(part is None or part.magnitude is None for part in there):
        return None
    _check_order(pieces)
    if any(part is not None and part.magnitude is not None and part.magnitude_in for part in there):
        raise NoImageError(
            "DoRA on the in axis divides by the length of columns, which would be those of all parts",
            needs_base=True,
        )
    rows = [
        part.magnitude[piece.rows_from]
        if part is not None and part.magnitude is not None
        else None
        if lengths is None
        else lengths.of(piece)
        for part, piece in zip(there, pieces, strict=True)
    ]
    return join_vectors(rows, f"DoRA's magnitudes, {_LENGTHS}")


def _with_vectors(
    lora: Lora | None, pieces: Sequence[_Piece], parts: Sequence[Delta], magnitude: Array | None
) -> Delta:
    """A joined LoRA with the magnitudes and the deltas of biases of its parts."""
    there = [parts[p.source] for p in pieces if p.source >= 0]
    first = there[0]
    out = sum(len(p.rows_to) for p in pieces)
    if lora is None:
        rank = 1
        down = np.zeros((1, first.into), first.tensors["down"].dtype)
        lora = Lora(down, np.zeros((out, rank), first.tensors["up"].dtype), Scale(1, 1))
    bias = None
    if any(part.bias is not None for part in there):
        rows = [
            np.zeros(len(p.rows_to))
            if p.source < 0 or parts[p.source].bias is None
            else np.asarray(parts[p.source].bias_delta)[p.rows_from]
            for p in pieces
        ]
        bias = np.concatenate(rows).astype(np.float32)
    return Delta(
        LORA,
        {"down": lora.a, "up": lora.b},
        out,
        first.into,
        alpha=lora.scale.alpha,
        rslora=lora.scale.rslora,
        alpha_dtype=first.alpha_dtype,
        magnitude=magnitude,
        bias=bias,
        exact=lora.exact and all(part.exact for part in there),
    )


def is_vector(delta: Delta) -> bool:
    """Whether it is for a weight of one dimension: a norm's, or a bias alone."""
    return delta.algebra == NOTHING or (
        delta.algebra in (FULL, SET) and len(next(iter(delta.tensors.values())).shape) < 2
    )
