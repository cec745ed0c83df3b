"""The certificate: every target's delta before and after, compared in float64, one matrix at a time.

What the source adds to its base is laid out by the plan, block by block, and compared with what the result adds: for
stacked experts one expert after the other, so that a wrong order is seen. No rank, scale or packing of the one is used
for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import inf, prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from regraft.adapters.base_weights import BaseWeights
from regraft.adapters.detect import Known, base_names, detect_layout, find_books, load_model
from regraft.adapters.families.base import Family, NoImageError, as_wide
from regraft.adapters.families.table import family_of
from regraft.adapters.form import Array, Factors
from regraft.adapters.kept import drop_stand_ins
from regraft.adapters.ladder import Carrier
from regraft.adapters.move import Block, blocks_of
from regraft.adapters.saved import move_others
from regraft.adapters.tuned import TunedModules
from regraft.arrays.apply import apply_plan
from regraft.dialects.peft.reading import FactorReader
from regraft.dialects.peft.scan import PREFIX, Scan, scan_names
from regraft.dialects.peft.source import Source, find_adapters, open_adapter
from regraft.errors import BadInputError, Finding
from regraft.layouts import other_layout
from regraft.names.keys import group_names
from regraft.planning.build import build_plan
from regraft.planning.model import Foreign, ModelConfig
from regraft.planning.plan import Entry, Headers
from regraft.planning.side import Side
from regraft.rules.kinds import BATCH, IN, KINDS, OUT

TOLERANCE = 1e-5
"""The relative error, in the Frobenius norm of one matrix, up to which two deltas count as equal."""

Wide = npt.NDArray[np.float64]


@dataclass(slots=True)
class Compared:
    """One target."""

    key: str
    error: float
    """The largest relative error of its matrices."""
    matrices: int = 1


@dataclass(slots=True)
class AdapterVerification:
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

    @property
    def equal(self) -> bool:
        """Whether every delta is the same within the tolerance, and nothing is missing or too many."""
        return not self.differences

    @property
    def error(self) -> float:
        """The largest relative error."""
        return max((target.error for target in self.targets), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        data = asdict(self)
        data["equal"], data["error"] = self.equal, self.error
        data["differences"] = [finding.to_dict() for finding in self.differences]
        return data


class Deltas:
    """What one adapter adds to its base, by base tensor, in its own layout."""

    def __init__(self, source: Source, known: Known, layout: str) -> None:
        self.source, self.known, self.layout = source, known, layout
        self.family = family_of(source.config)
        plain = source.peft_type == "LORA" and self.family is None
        prefix = self.family.prefix if self.family is not None else None
        self.scan, findings = scan_names(list(source.tensors), source.where, plain, prefix)
        if findings:
            raise BadInputError(findings)
        self.base = BaseWeights.of(known, layout)
        self.side = Side(known.books, layout, known.scopes)
        self.factors: Factors | None = None
        self.tuned: TunedModules | None = None
        self.tuner: Family | None = None
        if self.family is not None:
            carrier = Carrier(
                self.family,
                source.config,
                source.tensors,
                self.scan,
                known,
                layout,
                layout,
                source.where,
            )
            self.tuned, self.tuner = carrier.read(), carrier.family
            self.headers = self.tuned.headers
            groups = self.tuned.kinds
        else:
            config = source.config if plain else {"r": 1, "lora_alpha": 1}
            reader = FactorReader(
                self.scan,
                list(source.tensors.values()),
                list(source.tensors),
                config,
                self.side,
                source.where,
            )
            self.factors = reader.read()
            self.headers = self.factors.headers
            groups = self.factors.kinds
        self.ids: dict[str, int] = {}
        self.kinds: dict[int, str] = {}
        for keys, kind in groups:
            ids = keys.ids.tolist()
            self.ids.update(zip(keys.names(), ids, strict=True))
            self.kinds.update(dict.fromkeys(ids, kind))
        self._last: tuple[int, Wide] | None = None

    def matrix(self, number: int, batch: int) -> Wide:
        """What is added to a weight (or to one of its experts), (out, in)."""
        if self.factors is not None:
            a, b = self.factors.a[number], self.factors.b[number]
            if a.ndim == 3:
                a, b = a[batch], b[batch]
            a = a.reshape(len(a), -1)
            b = b.reshape(len(b), -1)
            scale = self.factors.scales[number].value
            return np.asarray(b.astype(np.float64) @ a.astype(np.float64) * scale)
        if self._last is None or self._last[0] != number:
            assert self.tuned is not None
            assert self.tuner is not None
            part = self.tuned.parts[number]
            name = self.headers.name(number)
            self._last = number, self.tuner.delta(part, lambda: self._weight(name, part.kind))
        return self._last[1]

    def batches(self, number: int) -> int:
        """How many matrices a weight has."""
        if self.factors is not None and self.factors.a[number].ndim == 3:
            return len(self.factors.a[number])
        return 1

    def _weight(self, name: str, kind: str) -> Wide:
        found = self.base.matrix(name, kind)
        if found is None:
            raise NoImageError("the base's weights are needed", needs_base=True)
        return found

    def biases(self) -> dict[str, Array]:
        """The biases of modules whose family changes them, as they are to be."""
        tuned, family = self.tuned, self.tuner
        if tuned is None or family is None or not family.changes_bias:
            return {}
        made = {}
        for number, part in enumerate(tuned.parts):
            name = tuned.headers.name(number).removesuffix("weight") + "bias"
            bias = self.base.find(name)
            if bias is not None:
                made[name] = family.bias(part, bias.astype(np.float64)).astype(bias.dtype)
        return made

    def bare_biases(self) -> Iterator[str]:
        """The names of biases that a family makes for modules that have none in the base.

        Without the base's weights any module may have one, and there are none.
        """
        tuned, family = self.tuned, self.tuner
        if tuned is None or family is None or not family.changes_bias or self.base.weights is None:
            return
        for number, part in enumerate(tuned.parts):
            name = tuned.headers.name(number).removesuffix("weight") + "bias"
            if self.base.find(name) is None and family.bias(part, np.zeros(part.out)).any():
                yield name

    def added_bias(self, number: int, batch: int = 0) -> Wide:
        """What a module's bias of zeros becomes, (out, in): the same for each column of its weight."""
        if self.tuned is None or self.tuner is None or not self.tuner.changes_bias:
            return np.zeros((1, 1))
        part = self.tuned.parts[number]
        made = self.tuner.bias(part, np.zeros(part.out))
        return np.broadcast_to(made[:, None], (part.out, part.into))

    def others(self) -> dict[str, Array]:
        """Tensors that are no part of a delta, by their base names."""
        tensors = list(self.source.tensors.values())
        return {
            name: tensors[i]
            for other in self.scan.others
            for name, i in zip(other.keys.names(), other.keys.ids.tolist(), strict=True)
        }


def verify_adapters(
    src: Path,
    dst: Path,
    model: Path | None = None,
    tolerance: float = TOLERANCE,
    progress: Callable[[str, int, int], None] | None = None,
    foreign: Foreign | None = None,
) -> AdapterVerification:
    """Check that every adapter of ``dst`` adds to its base what that of ``src`` adds to its own.

    Raises ``BadInputError`` and its kin where one of them cannot be read.
    """
    first, second = find_adapters(src), find_adapters(dst)
    config = load_model(model) if model is not None else None
    result: AdapterVerification | None = None
    there = {str(folder.relative_to(second.root)): folder for folder in second.folders}
    for number, folder in enumerate(first.folders):
        if progress is not None:
            progress(folder.name, number, len(first.folders))
        name = str(folder.relative_to(first.root))
        one = open_adapter(folder, first.root, first.weights)
        other = there.pop(name, None)
        if other is None:
            raise BadInputError(
                Finding("not-found", "this adapter is not there", where=str(dst / name))
            )
        done = compare(
            one, open_adapter(other, second.root, second.weights), config, tolerance, foreign
        )
        if result is None:
            result = done
        else:
            result.targets += done.targets
            result.differences += done.differences
            result.others += done.others
    assert result is not None
    result.source, result.destination = str(src), str(dst)
    result.differences += [
        Finding("extra", "nothing in the source leads to this adapter", where=str(folder))
        for folder in there.values()
    ]
    return result


def compare(
    one: Source,
    other: Source,
    model: ModelConfig | None,
    tolerance: float = TOLERANCE,
    foreign: Foreign | None = None,
) -> AdapterVerification:
    """Compare two adapters of one base, each in its own layout.

    Raises ``BadInputError`` and its kin where one of them cannot be read.
    """
    known, layouts = _layouts(one, other, model, foreign)
    one, kept = _without_stand_ins(one, layouts)
    before, after = (
        Deltas(source, known, layout) for source, layout in zip((one, other), layouts, strict=True)
    )
    result = AdapterVerification(one.where, other.where, *layouts, tolerance)
    try:
        _Comparison(before, after, result).run(kept)
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


def _without_stand_ins(source: Source, layouts: tuple[str, str]) -> tuple[Source, dict[str, Wide]]:
    """A source without what only stands in for something in the other layout, and the deltas that it stands for."""
    remembered = source.remembered()
    if layouts[0] == layouts[1] or remembered.source.layout != layouts[1]:
        return source, {}
    drop, factors, written = drop_stand_ins(source.tensors, remembered.kept, source.aside)
    deltas = {}
    for item in written:
        a, b = (factors[f"{PREFIX}{item.module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        deltas[item.key] = np.asarray(b @ a * item.scale.value)
    tensors = {name: x for name, x in source.tensors.items() if name not in drop}
    factor = tuple(f".lora_{x}.weight" for x in "AB")
    tensors.update((name, x) for name, x in factors.items() if not name.endswith(factor))
    return replace(source, tensors=tensors), deltas


def _layouts(
    one: Source, other: Source, model: ModelConfig | None, foreign: Foreign | None
) -> tuple[Known, tuple[str, str]]:
    scans: list[Scan] = []
    for source in (one, other):
        family = family_of(source.config)
        plain = source.peft_type == "LORA" and family is None
        prefix = family.prefix if family is not None else None
        scan, findings = scan_names(list(source.tensors), source.where, plain, prefix)
        if findings:
            raise BadInputError(findings)
        scans.append(scan)
    spelled = [*base_names(scans[1]), *one.remembered().names, *other.remembered().names]
    known = find_books(scans[0], one.config, model, one.where, foreign, spelled)
    found = [
        detect_layout(scan, source, known.books).layout
        for scan, source in zip(scans, (one, other), strict=True)
    ]
    first, second = found
    if second is None:
        second = "transformers-v5" if first is None else first
    if first is None:
        first = second if one.tensors.keys() == other.tensors.keys() else other_layout(second)
    return known, (first, second)


class _Comparison:
    def __init__(self, before: Deltas, after: Deltas, result: AdapterVerification) -> None:
        self.before, self.after, self.result = before, after, result
        self.left = dict(after.ids)
        self.others = after.others()

    def run(self, kept: Mapping[str, Wide]) -> None:
        for key, delta in kept.items():
            self._check(key, iter([delta]))
        for key, _, _, matrices in moved_deltas(self.before, self.after.layout):
            self._check(key, matrices)
        for key, number in self.left.items():
            zero = all(
                not self.after.matrix(number, e).any() for e in range(self.after.batches(number))
            )
            if not zero:
                self._differs("extra", key, "nothing in the source leads to this delta")
        self._compare_biases()
        self._compare_others()

    def _compare_biases(self) -> None:
        if any(d.tuner is not None and d.tuner.changes_bias for d in (self.before, self.after)):
            self._compare_added_biases()
        mine = self.after.biases()
        for name, want in moved_biases(self.before, self.after.layout).items():
            got = mine.pop(name, None)
            if got is None:
                got = self.after.base.find(name)
            error = inf if got is None else relative(*as_wide(want, got))
            if not error <= self.result.tolerance:
                self._differs(
                    "differs", name, f"the bias is another one (relative error {error:.3g})"
                )
        for name, bias in mine.items():
            base = self.after.base.find(name)
            if base is not None and relative(*as_wide(base, bias)) > self.result.tolerance:
                self._differs("extra", name, "nothing in the source changes this bias")

    def _compare_added_biases(self) -> None:
        """What modules add to a bias, whether the base has one or not, and whether its weights are at hand or not."""
        ids = dict(self.after.ids)
        moved = moved_deltas(self.before, self.after.layout, self.before.added_bias)
        wanted = {key: list(matrices) for key, _, _, matrices in moved}
        for key in wanted | ids:
            for batch, want in enumerate(wanted.get(key, [None])):
                got = self.after.added_bias(ids[key], batch) if key in ids else None
                one, other = (np.zeros(1) if m is None else m[:, 0] for m in (want, got))
                error = relative(*np.broadcast_arrays(one, other))
                if not error <= self.result.tolerance:
                    message = f"what it adds to the bias is another (relative error {error:.3g})"
                    self._differs("differs", key, message)
                    break

    def _check(self, key: str, expected: Iterator[Wide | None]) -> None:
        number = self.left.pop(key, None)
        worst, count = 0.0, 0
        for batch, want in enumerate(expected):
            count = batch + 1
            if want is None:
                want = np.zeros((1, 1))
            if number is not None:
                got: Wide = self.after.matrix(number, batch)
            elif not want.any():
                continue
            else:
                saved = self._saved(key)
                if saved is None:
                    self._differs("missing", key, "it is not adapted there")
                    return
                got = saved
            worst = max(worst, relative(want, got))
        self.result.targets.append(Compared(key, worst, count))
        if not worst <= self.result.tolerance:
            self._differs("differs", key, f"its delta is another one (relative error {worst:.3g})")

    def _saved(self, key: str) -> Wide | None:
        """The delta of a weight that is saved as a sum, rounded to the weight's dtype."""
        saved = self.others.pop(key, None)
        base = self.after.base.matrix(key, "linear")
        if saved is None or base is None:
            return None
        return np.asarray(saved.astype(np.float64) - base)

    def _compare_others(self) -> None:
        before, after = self.before, self.after
        shared = set(before.family.shared) if before.family is not None else set()
        moved = move_others(
            before.scan,
            before.source,
            before.known,
            before.side,
            after.layout,
            in_place=before.layout == after.layout,
        )
        filled = set(after.source.remembered().kept.filled)
        for item in moved:
            if item.old in shared and item.new not in self.others:
                continue
            got = self.others.pop(item.new, None)
            if got is None:
                self._differs("missing", item.new, "it is not there")
                continue
            self.result.others += 1
            same = got.shape == item.tensor.shape and got.dtype == item.tensor.dtype
            if not same or got.tobytes() != np.ascontiguousarray(item.tensor).tobytes():
                self._differs("differs", item.new, "it is another tensor")
        companions = {
            f"{name}.{leaf}"
            for name in after.source.remembered().kept.modules
            for leaf in ("bias", "weight")
        }
        for name in self.others.keys() - filled - companions:
            self._differs("extra", name, "nothing in the source leads to it")

    def _differs(self, code: str, key: str, message: str) -> None:
        self.result.differences.append(
            Finding(code, message, where=self.after.source.where, key=key)
        )


def moved_deltas(
    before: Deltas, target: str, matrix: Callable[[int, int], Wide] | None = None
) -> Iterator[tuple[str, str, str, Iterator[Wide | None]]]:
    """What an adapter adds to the tensors of a layout: key, kind, rule, and the delta matrix by matrix.

    ``None`` stands for a matrix that no source adapts. ``matrix`` gives something else of a weight, laid out like it.
    """
    matrix = matrix or before.matrix
    if before.layout == target:
        for key, number in before.ids.items():
            matrices = (matrix(number, e) for e in range(before.batches(number)))
            yield key, before.kinds[number], "carried over", matrices
        return
    known = before.known
    plan = build_plan(
        before.headers,
        known.books,
        target_layout=target,
        scopes=dict(known.scopes),
        partial=True,
        guess=lambda rule, axis, seen: seen,
        where=before.source.where,
        unmatched_fix=known.unmatched_fix,
    )
    for entry in plan.entries:
        for number, (term, kind) in enumerate(zip(entry.written, entry.written_kinds, strict=True)):
            if all((ids < 0).all() for ids in entry.sources):
                continue
            if kind == "any" and entry.moves_nothing:
                for key, source in zip(
                    entry.keys(term).names(), entry.sources[0].flat, strict=True
                ):
                    if source >= 0:
                        yield key, kind, str(entry.rule), iter([matrix(int(source), 0)])
                continue
            layout = _Layout(entry, number, matrix)
            for row, key in enumerate(entry.keys(term).names()):
                yield key, kind, str(entry.rule), layout.matrices(row)
    for carried in plan.carried:
        for key, number in zip(carried.group.names(), carried.group.ids.tolist(), strict=True):
            kind = before.kinds[number]
            kind = carried.carry.kind if kind == "any" and carried.carry.kind else kind
            yield key, kind, carried.carry.why, iter([matrix(number, 0)])


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
    plan = build_plan(
        headers,
        known.books,
        target_layout=target,
        scopes=dict(known.scopes),
        where=before.source.where,
        unmatched_fix=known.unmatched_fix,
    )
    return apply_plan(plan, values)


class _Layout:
    """One term of an entry: where the blocks of its matrices come from."""

    def __init__(self, entry: Entry, number: int, matrix: Callable[[int, int], Wide]) -> None:
        self.entry, self.matrix = entry, matrix
        term, kind = entry.written[number], entry.written_kinds[number]
        self.blocks: list[Block] = blocks_of(entry, number)
        shape = entry.flat_shape(term)
        roles = [KINDS[kind].role(dim) for dim in range(len(shape))]
        self.batch = shape[roles.index(BATCH)] if BATCH in roles else 1
        self.size = KINDS[kind].size(shape, OUT), KINDS[kind].size(shape, IN)
        self.slots = prod(entry.stack(term))

    def matrices(self, row: int) -> Iterator[Wide | None]:
        """The delta of one target, matrix by matrix; ``None`` where no source adapts it."""
        loop, slot = divmod(row, self.slots)
        for batch in range(self.batch):
            made: Wide | None = None
            for block in self.blocks:
                ids = self.entry.sources[block.term][loop].reshape(-1)
                here = (block.target_slot == slot) & (block.target_batch == batch)
                for at in np.flatnonzero(here).tolist():
                    source = int(ids[block.source_slot[at]])
                    if source < 0:
                        continue
                    if made is None:
                        made = np.zeros(self.size)
                    delta = self.matrix(source, int(block.source_batch[at]))
                    rows, columns = block.rows_from[at], block.columns_from[at]
                    piece = (
                        delta[np.ix_(columns, rows)].T
                        if block.cross
                        else delta[np.ix_(rows, columns)]
                    )
                    made[np.ix_(block.rows_to[at], block.columns_to[at])] = piece
            yield made


def relative(want: Wide, got: Wide) -> float:
    """How far a matrix is off, relative to its Frobenius norm."""
    whole, size = float(np.linalg.norm(want)), float(np.linalg.norm(got))
    if not whole:
        return inf if size else 0.0
    if want.shape != got.shape:
        return inf
    return float(np.linalg.norm(want - got)) / whole
