"""The certificate: what two adapters add to their bases, compared entry by entry in float64.

What each adds is read from its files by PEFT's formulas (`peft_deltas`). The source's is laid out by the arrays
reader, as a base tensor is, in slices; the converter's own geometry, ranks and packing have no part in it. Where time
is short, 16 random vectors stand for an axis, and the result names the targets that were compared so.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import inf, isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np

from regraft.adapters.base_weights import BaseWeights
from regraft.adapters.deltas import Deltas
from regraft.adapters.detect import (
    Detected,
    Known,
    base_names,
    detect_layout,
    find_books,
)
from regraft.adapters.families.base import NoImageError
from regraft.adapters.form import Array, Saved
from regraft.adapters.home import at_home
from regraft.adapters.protocol import Opened
from regraft.adapters.roundtrip import comes_back, take_back
from regraft.arrays.apply import apply_plan
from regraft.arrays.pieces import (
    Ask,
    Make,
    Piece,
    Take,
    Want,
    Wide,
    carry_pieces,
    cut,
    every_entry,
    same_pieces,
    take_part,
)
from regraft.dialects.names import SourceName
from regraft.dialects.opening import Opening, find_source
from regraft.dialects.peft.saved import owner_of, token_rows
from regraft.dialects.peft.source import Source
from regraft.dialects.registry import IMAGE
from regraft.errors import BadInputError, Finding
from regraft.errors.codes import Status
from regraft.layouts.graph import route_between
from regraft.layouts.names import joined_to
from regraft.names.keys import group_names
from regraft.planning.build import build_plan
from regraft.planning.compose import plan_along
from regraft.planning.detect import detect_layouts
from regraft.planning.model import Foreign, ModelConfig, load_model
from regraft.planning.plan import Headers
from regraft.rules.book import library
from regraft.rules.kinds import BATCH, KINDS
from regraft.shown import Shown
from regraft.values import replace

TOLERANCE = 1e-5
"""The relative error of a matrix, in its Frobenius norm and in each entry (of the greatest one), up to which two
deltas count as equal."""

BUDGET = 300.0
"""Seconds after which random vectors stand for the rest."""

PACE = 4e6
"""Entries that are compared in a second, at least. What may take longer than there is time is compared by random
vectors first, so that the time is enough for all of it."""


@dataclass(slots=True)
class Compared:
    """One target."""

    key: str
    error: float
    """The largest relative error of its matrices."""
    matrices: int = 1
    adapter: str = ""
    """The folder of its adapter, relative to the source, where that holds several."""


@dataclass(slots=True, repr=False)
class AdapterVerification(Shown):
    """What comparing two adapters found."""

    source: str
    destination: str
    source_layout: str
    target_layout: str
    tolerance: float
    targets: list[Compared] = field(default_factory=list)
    others: int = 0
    """How many other tensors were compared, bit for bit."""
    differences: list[Finding] = field(default_factory=list)
    sampled: list[str] = field(default_factory=list)
    """Targets that were compared by random vectors, because the time for comparing every entry was spent."""

    @property
    def equal(self) -> bool:
        """Whether every delta is the same within the tolerance, and nothing is missing or too many."""
        return not self.differences

    @property
    def status(self) -> Status:
        """The exit status of the command that found it."""
        return Status.DONE if self.equal else Status.NO

    def __bool__(self) -> bool:
        """Whether nothing differs."""
        return self.equal

    @property
    def error(self) -> float:
        """The largest relative error; infinite where one cannot be told."""
        errors = [target.error for target in self.targets]
        return max((e if isfinite(e) else inf for e in errors), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data; an error that is no number is ``None``."""
        data = asdict(self)
        data["equal"], data["error"] = self.equal, _finite(self.error)
        data["tolerance"] = _finite(self.tolerance)
        data["targets"] = [{**asdict(t), "error": _finite(t.error)} for t in self.targets]
        data["differences"] = [finding.to_dict() for finding in self.differences]
        return data


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


class Budget:
    """Time for comparing every entry; it begins to run when it is made."""

    def __init__(self, seconds: float = BUDGET) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that are left."""
        return self._end - time.monotonic()

    def spent(self) -> bool:
        """Whether random vectors have to do from now on."""
        return self.left() <= 0


def verify_adapters(
    src: Path,
    dst: Path,
    model: Path | None = None,
    tolerance: float = TOLERANCE,
    progress: Callable[[str, int, int], None] | None = None,
    foreign: Foreign | None = None,
    budget: float = BUDGET,
    said: SourceName | None = None,
) -> AdapterVerification:
    """Check that every adapter of ``dst`` adds to its base what that of ``src`` adds to its own.

    Every entry is compared for ``budget`` seconds; random vectors stand for the rest. ``said`` is what was said of the
    source.

    Raises ``BadInputError`` and its kin where one of them cannot be read.
    """
    left = Budget(budget)
    opened, there_opened = find_source(src, said), find_source(dst)
    if opened.dialect.name in IMAGE or there_opened.dialect.name in IMAGE:
        from regraft.bridges.diffusers import family_of_base
        from regraft.checking.image import verify_images
        from regraft.dialects.image.families import only_image_family

        with only_image_family(family_of_base(model)):
            return verify_images(opened, there_opened, model, tolerance, left, said)
    packing = said.packing if said is not None else None
    first, second = opened.found, there_opened.found
    config = load_model(model) if model is not None else None
    result: AdapterVerification | None = None
    missing: list[Finding] = []
    there = {str(folder.relative_to(second.root)): folder for folder in second.folders}
    for number, folder in enumerate(first.folders):
        if progress is not None:
            progress(folder.name, number, len(first.folders))
        name = str(folder.relative_to(first.root))
        other = there.pop(name, None)
        if other is None and len(first.folders) == len(second.folders) == 1:
            other = there.popitem()[1]
        if other is None:
            missing.append(Finding("missing", "this adapter is not there", where=str(dst / name)))
            continue
        pair = [
            at_home(_open_for_reading(opening, each), config, foreign)[0]
            for opening, each in ((opened, folder), (there_opened, other))
        ]
        share = Budget(max(0.0, left.left() / (len(first.folders) - number)))
        done = compare(pair[0], pair[1], config, tolerance, foreign, share, packing)
        for target in done.targets if len(first.folders) > 1 else ():
            target.adapter = name
        if result is None:
            result = done
        else:
            result.targets += done.targets
            result.differences += done.differences
            result.others += done.others
            result.sampled += done.sampled
    if result is None:  # none of them is there
        raise BadInputError(missing)
    result.source, result.destination = str(src), str(dst)
    result.differences += missing
    result.differences += [
        Finding("extra", "nothing in the source leads to this adapter", where=str(folder))
        for folder in there.values()
    ]
    return result


def _open_for_reading(opening: Opening, folder: Path) -> Opened:
    """An adapter of which one tensor after the other is read, where its dialect can do so."""
    by_tensor = getattr(opening.dialect, "open_by_tensor", None)
    if by_tensor is None:
        return opening.open(folder)
    opened: Opened = by_tensor(folder, opening.found.root, opening.found.weights)
    return opened


def compare(
    one: Opened,
    other: Opened,
    model: ModelConfig | None,
    tolerance: float = TOLERANCE,
    foreign: Foreign | None = None,
    budget: Budget | None = None,
    packing: str | None = None,
) -> AdapterVerification:
    """Compare two adapters of one base, each in its own layout.

    ``packing`` is how experts are packed in the first, where that was given.

    Raises ``BadInputError`` and its kin where one of them cannot be read.
    """
    known, layouts = _layouts(one, other, model, foreign)
    one, kept = _without_stand_ins(one, known, layouts)
    before, after = (
        source.deltas(known, layout, given)
        for source, layout, given in zip((one, other), layouts, (packing, None), strict=True)
    )
    result = AdapterVerification(one.where, other.where, *layouts, tolerance)
    try:
        Comparison(before, after, result, budget or Budget()).run(kept)
    except NoImageError as error:
        raise BadInputError(
            Finding(
                "needs-base-weights" if error.needs_base else "no-image",
                f"what it adds cannot be told: {error.why}",
                where=one.where,
                fix="give the base's folder with its weights as --model",
            )
        ) from None
    return result


def _without_stand_ins(
    source: Opened, known: Known, layouts: tuple[str, str]
) -> tuple[Opened, dict[str, Wide]]:
    """A source without what only stands in for something in the other layout, and the deltas that it stands for."""
    returns = isinstance(source, Source) and comes_back(source, layouts[1])
    if layouts[0] == layouts[1] or not returns or not isinstance(source, Source):
        return source, {}
    without, returned = take_back(source, BaseWeights.of(known, layouts[0]))
    if not returned.tensors:
        return without, {}
    deltas: dict[str, Wide] = {}
    factors: set[str] = set()
    for item in returned.written:
        names = source.spelling.factor_names(item.module)
        a, b = (returned.tensors[name].astype(np.float64) for name in names)
        deltas[item.key] = np.asarray(b @ a * item.scale.value)
        factors.update(names)
    more = {name: x for name, x in returned.tensors.items() if name not in factors}
    return dataclasses.replace(without, tensors={**without.tensors, **more}), deltas


def _layouts(
    one: Opened, other: Opened, model: ModelConfig | None, foreign: Foreign | None
) -> tuple[Known, tuple[str, str]]:
    names = [source.names() for source in (one, other)]
    hints = one.hints()
    spelled = (*base_names(names[1]), *other.hints().remembered.names)
    known = find_books(names[0], replace(hints, spelled=spelled), model, one.where, foreign)
    found = [
        detect_layout(
            detect_layouts(each.lookup(known.books, known.scopes)),
            source.hints(),
            known.books,
            source.where,
        )
        for each, source in zip(names, (one, other), strict=True)
    ]
    first, second = (detected.layout for detected in found)
    if second is None:
        newest = next(book.right for book in (*known.books, *library()))
        second = _fitting(newest if first is None else first, found[1])
    if first is None:
        same = one.tensors.keys() == other.tensors.keys()
        first = second if same else joined_to(second, known.books)[0]
        first = first if same else _fitting(first, found[0])
    return known, (first, second)


def _fitting(layout: str, detected: Detected) -> str:
    """A layout if names that are the same in several may be of it; otherwise the last one that they may be of."""
    fits = detected.possible
    return layout if layout in fits or not fits else fits[-1]


class _Tally:
    """How far the matrices of one target are off, slice by slice."""

    def __init__(self, matrices: int) -> None:
        self.largest, self.off, self.norm, self.off_norm = np.zeros((4, matrices))

    def add(self, want: Wide, got: Wide, matrices: Take) -> None:
        """Compare a slice; ``matrices`` tells which of them its first dim is, where there are several."""
        rows = len(self.largest) if matrices is None else len(matrices)
        at = slice(None) if matrices is None else matrices
        want, got = (np.ascontiguousarray(x).reshape(rows, -1) for x in (want, got))
        with np.errstate(all="ignore"):
            pairs = [(want, self.largest, self.norm)]
            if not np.array_equal(want, got):
                pairs.append((want - got, self.off, self.off_norm))
            for values, most, norm in pairs:
                # A maximum hands on NaN, and so does everything that is compared with it.
                largest = np.abs(np.maximum(values.max(axis=1), -values.min(axis=1)))
                most[at] = np.maximum(most[at], largest)
                norm[at] = np.hypot(norm[at], _norms(values, largest))

    @property
    def zero(self) -> bool:
        """Whether nothing is wanted."""
        return not self.largest.any()

    def error(self) -> tuple[float, float]:
        """The largest relative error of a matrix, and of an entry; infinite where something is no number."""
        with np.errstate(all="ignore"):
            errors = []
            for off, whole in ((self.off_norm, self.norm), (self.off, self.largest)):
                ratio = np.where((off == 0) & (whole == 0), 0.0, off / whole)
                errors.append(np.where(np.isfinite(self.largest) & np.isfinite(off), ratio, inf))
            # Norms of numbers near the limits of float64 are none; their entries still tell.
            matrix = np.where(
                np.isfinite(errors[0]) | ~np.isfinite(self.off_norm - self.norm),
                errors[0],
                errors[1],
            )
        found = [float(np.where(np.isnan(e), inf, e).max(initial=0.0)) for e in (matrix, errors[1])]
        return found[0], found[1]


def _norms(values: Wide, largest: Wide) -> Wide:
    """The Frobenius norm of each row; those of very large and very small numbers do not overflow."""
    squares = np.einsum("ij,ij->i", values, values)
    odd = ~((squares > 1e-280) & (squares < 1e300)) & (largest > 0)
    norms = np.sqrt(squares)
    for row in np.flatnonzero(odd).tolist():
        if isfinite(largest[row]):
            norms[row] = largest[row] * np.linalg.norm(values[row] / largest[row])
    return np.asarray(norms)


class Comparison:
    """Two adapters of one base, compared target by target; `run` puts what it finds into ``result``."""

    def __init__(
        self, before: Deltas, after: Deltas, result: AdapterVerification, budget: Budget
    ) -> None:
        self.before, self.after, self.result, self.budget = before, after, result, budget
        self.left = dict(after.ids)
        self.others = after.others()
        self.tallies: dict[str, _Tally] = {}
        self.whole: set[str] = set()
        """Targets of which every entry was compared."""
        self.saved: dict[str, Wide | None] = {}
        self.other_shape: set[str] = set()

    def run(self, kept: Mapping[str, Wide]) -> None:
        """Compare everything; ``kept`` are deltas of the source that other tensors stand in for."""
        self._add_all(_pieces_of(kept))
        self._compare_deltas()
        for key, number in self.left.items():
            if key not in self.tallies and self._adds(number, key):
                self._differs("extra", key, "nothing in the source leads to this delta")
        self._judge()
        self.result.sampled += [key for key in self.tallies if key not in self.whole]
        self._compare_biases()
        moved = self.before.moved_others(self.after.layout)
        self._compare_others(moved)
        self._compare_switches(moved)

    def _compare_deltas(self) -> None:
        """Compare every entry while there is time, and by random vectors what was not reached.

        Where the time may be too short for every entry the vectors come first, so that none is needed at its end.
        """
        before, entries = self.before, 0
        if before.tuned is None:
            entries = sum(prod(before.shape(number)) for number in before.ids.values())
        pieces = carried(before, self.after.layout)
        if entries > PACE * self.budget.left():
            self._add_all(pieces(self._vectors))
        self._add_all(pieces(self._entries))
        self._add_all(pieces(self._vectors))

    def _entries(self, keys: Sequence[str]) -> Want:
        """Every entry, while there is time."""
        return "nothing" if self.budget.spent() or self.whole.issuperset(keys) else "entries"

    def _vectors(self, keys: Sequence[str]) -> Want:
        """Random vectors for what nothing is known of; every entry of what is no factors' product."""
        if all(key in self.tallies for key in keys):
            return "nothing"
        return "vectors" if all(key in self.left for key in keys) else "entries"

    def _add_all(self, pieces: Iterable[Piece]) -> None:
        """Compare slices of what the source adds; a target of which entries are missing counts for nothing."""
        tallies: dict[str, _Tally] = {}
        missing: dict[str, int] = {}
        for piece in pieces:
            self._add(piece, tallies)
            if not piece.sampled:
                rest = missing.get(piece.key, prod(piece.shape))
                missing[piece.key] = rest - piece.values.size
        self.whole.update(key for key, count in missing.items() if not count)
        self.tallies.update((k, t) for k, t in tallies.items() if not missing.get(k))

    def _add(self, piece: Piece, tallies: dict[str, _Tally]) -> None:
        """Compare a slice of what the source adds."""
        tally = tallies.get(piece.key)
        stacked = KINDS[piece.kind].roles is not None and KINDS[piece.kind].role(0) == BATCH
        if tally is None:
            tally = tallies[piece.key] = _Tally(piece.shape[0] if stacked else 1)
        want, got = self._both(piece)
        tally.add(want, got, piece.takes[0] if stacked else None)

    def _both(self, piece: Piece) -> tuple[Wide, Wide]:
        number = self.left.get(piece.key)
        if number is None:
            return self._with_saved(piece)
        if self.after.shape(number) != piece.shape:
            self.other_shape.add(piece.key)
            return piece.values, np.full_like(piece.values, np.nan)
        return piece.values, self.after.part(number, piece.takes)

    def _with_saved(self, piece: Piece) -> tuple[Wide, Wide]:
        """The same of a weight that is saved as a sum, which was rounded to the weight's dtype."""
        if piece.key not in self.saved:
            self.saved[piece.key] = self.after.base.matrix(piece.key, "linear")
        base, saved = self.saved[piece.key], self.others.get(piece.key)
        if base is None or saved is None or saved.shape != piece.shape:
            return piece.values, np.zeros_like(piece.values)
        weight, there = take_part(base, piece.takes), take_part(saved, piece.takes)
        rounded = (weight + piece.values).astype(saved.dtype).astype(np.float64)
        return rounded - weight, there - weight

    def _adds(self, number: int, key: str) -> bool:
        """Whether a target of the result that nothing leads to adds anything; what is no number does.

        What multiplies its base weight by 1 leaves it as it is to rounding.
        """
        shape, least = self.after.shape(number), self._rounding(number)
        want: Want = "vectors" if self.budget.spent() else "entries"
        return any(
            not (abs(piece.values) <= least).all()
            for piece in same_pieces(
                {key: number}, self.after.part, lambda _: shape, self.after.kind, lambda _: want
            )
        )

    def _rounding(self, number: int) -> float:
        """How much of a delta is rounding: nothing, where it does not depend on the base's weight."""
        tuner = self.after.tuner
        if tuner is None or tuner.adds:
            return 0.0
        weight = self.after.base.find(self.after.headers.name(number))
        if weight is None:
            return 0.0
        return self.result.tolerance * float(abs(weight).max(initial=0))

    def _judge(self) -> None:
        for key, tally in self.tallies.items():
            if key not in self.left:
                if tally.zero and not np.isnan(tally.largest).any():
                    continue
                if self.saved.get(key) is None or key not in self.others:
                    self._differs("missing", key, "it is not adapted there")
                    continue
                del self.others[key]
            error, entry = tally.error()
            self.result.targets.append(Compared(key, error, len(tally.largest)))
            if key in self.other_shape:
                self._differs("differs", key, "its delta has another shape")
            elif not np.isfinite(tally.largest).all() or not np.isfinite(tally.off).all():
                self._differs("differs", key, "its delta has entries that are no finite numbers")
            elif not error <= self.result.tolerance:
                self._differs("differs", key, f"its delta differs (relative error {error:.3g})")
            elif not entry <= self.result.tolerance:
                self._differs(
                    "differs",
                    key,
                    f"an entry of its delta differs (off by {entry:.3g} of the greatest)",
                )

    def _compare_biases(self) -> None:
        if self.before.changes_bias or self.after.changes_bias:
            self._compare_added_biases()
        mine = self.after.biases()
        for name, want in moved_biases(self.before, self.after.layout).items():
            got = mine.pop(name, None)
            if got is None:
                got = self.after.base.find(name)
            error = inf if got is None else relative(want, got)
            if not error <= self.result.tolerance:
                self._differs(
                    "differs", name, f"the bias is another one (relative error {error:.3g})"
                )
        for name, bias in mine.items():
            base = self.after.base.find(name)
            if base is not None and not relative(base, bias) <= self.result.tolerance:
                self._differs("extra", name, "nothing in the source changes this bias")

    def _compare_added_biases(self) -> None:
        """What modules add to a bias, whether the base has one or not, and whether its weights are at hand or not."""
        before, after = self.before, self.after
        tallies: dict[str, _Tally] = {}
        moved = moved_pieces(before, after.layout, before.bias_part, before.bias_shape)
        for piece in moved:
            number = after.ids.get(piece.key)
            got = np.zeros_like(piece.values)
            if number is not None:
                got = after.bias_part(number, piece.takes)
            same = got.shape == piece.values.shape
            tally = tallies.setdefault(piece.key, _Tally(1))
            tally.add(piece.values, got if same else np.full_like(piece.values, np.nan), None)
        ids = {key: number for key, number in after.ids.items() if key not in tallies}
        for piece in same_pieces(ids, after.bias_part, after.bias_shape, after.kind):
            zero = np.zeros_like(piece.values)
            tallies.setdefault(piece.key, _Tally(1)).add(zero, piece.values, None)
        for key, tally in tallies.items():
            error = max(tally.error())
            if not error <= self.result.tolerance:
                message = f"what it adds to the bias is another (relative error {error:.3g})"
                self._differs("differs", key, message)

    def _compare_others(self, moved: Sequence[Saved]) -> None:
        before, after = self.before, self.after
        shared = set(before.family.shared) if before.family is not None else set()
        for item in moved:
            if item.old in shared and item.new not in self.others:
                continue
            got = self.others.pop(item.new, None)
            if got is None:
                self._differs("missing", item.new, "it is not there")
                continue
            self.result.others += 1
            if not _same_bits(got, item.tensor):
                self._differs("differs", item.new, "it is another tensor")
            elif got.dtype.kind not in "iub" and not np.isfinite(got.astype(np.float64)).all():
                self._differs("differs", item.new, "it has entries that are no finite numbers")
        for name, tensor in self.others.items():
            # A module that is saved as a whole may hold more tensors here; those of the base change nothing.
            own = after.base.find(name)
            if own is None or not _same_bits(own, tensor):
                self._differs("extra", name, _EXTRA if own is None else _EXTRA[: _EXTRA.index(";")])

    def _compare_switches(self, moved: Sequence[Saved]) -> None:
        """Fields of the configs that change what PEFT does, and of which no tensor tells."""
        before, after = self.before.source, self.after.source
        if not isinstance(before, Source) or not isinstance(after, Source):
            return
        for name in ("layer_replication", "token_indices"):
            one, other = (s.config.get(name) or None for s in (before, after))
            if one != other:
                message = f"{name} is {other!r} there, and {one!r} in the source"
                self._differs("differs", "adapter_config.json", message)
        idle = _idle(before, self.before.others())
        for entry in sorted(_idle(after, self.after.others()) - idle):
            self._differs(
                "extra",
                "adapter_config.json",
                f"it names {entry!r} as saved or as trained, and its file has no tensor for it",
            )
        for item in moved:
            if not item.rows:
                continue
            rows = [token_rows(before.config, item.old), token_rows(after.config, item.new)]
            if rows[0] != rows[1]:
                self._differs("differs", item.new, "trainable_token_indices names other rows")

    def _differs(self, code: str, key: str, message: str) -> None:
        self.result.differences.append(
            Finding(code, message, where=self.after.source.where, key=key)
        )


def _same_bits(one: Array, other: Array) -> bool:
    same = one.shape == other.shape and one.dtype == other.dtype
    return same and np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()


_EXTRA = (
    "nothing in the source leads to it; only the base's weights could tell whether it is the base's own "
    "(give its folder as --model)"
)


def _idle(source: Source, others: Mapping[str, Array]) -> set[str]:
    """Entries of ``modules_to_save`` and ``trainable_token_indices`` that no tensor of the file belongs to."""
    saved = source.config.get("modules_to_save")
    found = {
        entry
        for entry in (saved if isinstance(saved, list) else ())
        if all(owner_of(name, entry) is None for name in others)
    }
    tokens = source.config.get("trainable_token_indices")
    modules = [
        name.removesuffix(".weight")
        for group in source.saved()
        for name in (group.keys.names() if group.rows else ())
    ]
    if isinstance(tokens, list) and tokens and not modules:
        found.add("trainable_token_indices")
    if isinstance(tokens, dict):
        found |= {e for e in tokens if not any(module.endswith(e) for module in modules)}
    return found


def _pieces_of(deltas: Mapping[str, Wide]) -> Iterator[Piece]:
    for key, delta in deltas.items():
        for takes in cut(delta.shape, sampled=False):
            yield Piece(key, "linear", "", delta.shape, takes, take_part(delta, takes))


def moved_pieces(
    before: Deltas,
    target: str,
    make: Make | None = None,
    shape_of: Callable[[int], tuple[int, ...]] | None = None,
) -> Iterator[Piece]:
    """What an adapter adds to the tensors of a layout, in slices.

    ``make`` gives something else of a base tensor than what is added to it, laid out like it.
    """
    return carried(before, target, make, shape_of)(every_entry)


def carried(
    before: Deltas,
    target: str,
    make: Make | None = None,
    shape_of: Callable[[int], tuple[int, ...]] | None = None,
) -> Callable[[Ask], Iterator[Piece]]:
    """The same for who says how much of it is wanted."""
    make, shape_of = make or before.part, shape_of or before.shape
    if before.layout == target:
        return partial(same_pieces, before.ids, make, shape_of, before.kind)
    known, headers, kind_of = before.known, before.headers, before.kind
    steps = route_between(known.books, before.layout, target, before.source.where).steps
    for number, edges in enumerate(steps, 1):
        plan = build_plan(
            headers,
            edges,
            scopes=known.scopes,
            partial=True,
            all_seen=True,
            where=before.source.where,
            unmatched_fix=known.unmatched_fix,
        )
        pieces = partial(carry_pieces, plan, make, shape_of, kind_of)
        if number < len(steps):
            there = _Between(pieces(every_entry))
            headers, make, shape_of, kind_of = there.headers, there.part, there.shape, there.kind
    return pieces


class _Between:
    """What is added to the tensors of a layout on the way, held as a whole."""

    def __init__(self, pieces: Iterator[Piece]) -> None:
        self.arrays: dict[str, Wide] = {}
        kinds: dict[str, str] = {}
        for piece in pieces:
            whole = self.arrays.setdefault(piece.key, np.zeros(piece.shape))
            takes = (
                np.arange(size) if take is None else take
                for size, take in zip(piece.shape, piece.takes, strict=True)
            )
            whole[np.ix_(*takes)] = piece.values
            kinds[piece.key] = piece.kind
        self.names, self.kinds = list(self.arrays), list(kinds.values())
        shapes = [self.shape(number) for number in range(len(self.names))]
        self.headers = Headers(group_names(self.names), shapes, ["float64"] * len(shapes))

    def part(self, number: int, takes: Sequence[Take]) -> Wide:
        """Part of a tensor, dim by dim."""
        return take_part(self.arrays[self.names[number]], takes)

    def shape(self, number: int) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.arrays[self.names[number]].shape

    def kind(self, number: int) -> str:
        """The kind of a tensor."""
        return self.kinds[number]


def moved_biases(before: Deltas, target: str) -> dict[str, Array]:
    """Biases that a family changes, as they are to be, under the names of a layout; where the base is at hand."""
    biases = before.biases()
    if before.layout == target or not biases:
        return biases
    values = list(biases.values())
    headers = Headers(
        group_names(list(biases)), [b.shape for b in values], [b.dtype.name for b in values]
    )
    known = before.known
    plan = plan_along(
        headers,
        route_between(known.books, before.layout, target, before.source.where).steps,
        scopes=known.scopes,
        where=before.source.where,
        unmatched_fix=known.unmatched_fix,
    )
    return apply_plan(plan, values)


def relative(want: Array, got: Array) -> float:
    """How far an array is off, relative to its norm or its greatest entry, whichever is worse."""
    if want.shape != got.shape:
        return inf
    tally = _Tally(1)
    tally.add(want.astype(np.float64), got.astype(np.float64), None)
    return max(tally.error())
