"""From the registry's transforms and a model's keys to a rule book with full keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from regraft.bridges.transformers.facts import file_name, module_name, shared_places
from regraft.bridges.transformers.imported import STACKED, Imported, Origin
from regraft.bridges.transformers.operations import UnknownOperationError, knows, run, write_dim
from regraft.bridges.transformers.registry import Transform, check_version
from regraft.bridges.transformers.renaming import Renamed
from regraft.bridges.transformers.scopes import Scoped
from regraft.bridges.transformers.symbolic import (
    Rows,
    columns_of,
    divide,
    holes,
    put,
    rewrite,
    rows_of,
    stand_in,
    writer,
)
from regraft.equation.lower import check_equation
from regraft.equation.notation import parse_equation, parse_key
from regraft.errors import BadInputError
from regraft.rules.book import Book, Carry, Drop, Gap, Parameters, Rule, Shared, library
from regraft.rules.direction import Side
from regraft.rules.kinds import fitting
from regraft.rules.mtp import is_mtp_module
from regraft.rules.releases import layout_of

LEFT, RIGHT = layout_of("transformers", "4"), layout_of("transformers", "5")
"""The registry of a release of 5 converts what releases of 4 saved."""
_LOOPS = "lmnqw"
_DIMS = {
    "linear": "o i",
    "parameter": "o i",
    "conv1d": "i o",
    "embedding": "v d",
    "experts": "e o i",
    "experts-transposed": "e i o",
}
_SEGMENT = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True, slots=True)
class Told:
    """How a file spells an old key, in terms of the model's key."""

    old: str
    fixed: tuple[tuple[int, int], ...]
    """Indices of the model's key for which that holds; for all where it is empty."""


def make_book(
    imported: Imported,
    keys: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    adapter: bool,
    spelled: Sequence[str] = (),
) -> Book:
    """The rule book of a model; see `Imported.book`."""
    maker = _Maker(imported, shapes)
    maker.of_modules = adapter
    maker.partly_new = not adapter and _is_partly_new(imported, spelled or keys)
    maker.listen([*spelled, *keys] if not maker.partly_new else spelled or keys)
    shift = maker.shift if adapter else 0
    for rows, origin in imported.origins:
        maker.add(rows, module_names(origin, imported) if adapter else origin, shift)
    return maker.book()


def _is_partly_new(imported: Imported, keys: Sequence[str]) -> bool:
    """Whether some keys are old, and others, which had another name, are spelled as the model spells them."""
    old = new = False
    for rows, landed in imported.landings(keys):
        if landed is None:
            continue
        old = old or landed.hit is not None or (bool(landed.fired) and landed.key != rows.text)
        new = new or (landed.key == rows.text and rows.name(0) in imported.only_renamed)
        if old and new:
            return True
    return False


def count_rules(imported: Imported) -> dict[str, int]:
    """How many of a model's tensors each target key of its rules stands for."""
    counts: dict[str, int] = {}
    for rows, origin in imported.origins:
        for text in origin.new:
            key = holes(text, _loop)
            counts[key] = counts.get(key, 0) + len(rows.numbers)
    return counts


def module_names(origin: Origin, imported: Imported) -> Origin:
    """Old names as the modules of transformers 4 had them, which its adapters have."""
    return replace(origin, old=tuple(module_name(imported.classes, text) for text in origin.old))


@dataclass(slots=True)
class _Maker:
    imported: Imported
    shapes: Mapping[str, tuple[int, ...]]
    told: dict[tuple[str, int], list[Told]] = field(default_factory=dict)
    rules: list[Rule] = field(default_factory=list)
    """Of kinds that need not fit yet."""
    respelled: list[Rule] = field(default_factory=list)
    shift: int = 0
    """1 where the file has the base model's prefix and the model has not, -1 the other way round."""
    partly_new: bool = False
    """Whether the file has old names, and for other parts of the model the model's own."""
    of_modules: bool = False
    """Whether the file's names are those of modules, as in an adapter."""
    gaps: list[Gap] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    carries_made: list[Carry] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.imported.name} (transformers {check_version()})"

    def listen(self, keys: Sequence[str]) -> None:
        """Take over the spelling of a file's keys."""
        base, counts = self.imported.base, {-1: 0, 0: 0, 1: 0}
        for rows, new in self.imported.landings(keys):
            if new is None:
                self._lay_aside(rows)
                continue
            if new.hit is None and set(columns_of(rows.text)) > set(columns_of(new.key)):
                rows, new = self._first_of(rows, new)
            bare = new.key == rows.text
            shift = self._shift_of(new.key, rows.text, base)
            if shift > 0 and self.of_modules and new.key.startswith(f"{base}."):
                continue  # a loader of files reads a prefix that stands twice; PEFT looks for the module itself
            counts[shift] += len(rows.numbers)
            if bare and file_name(self.imported.classes, rows.text) == rows.text:
                if self.partly_new and rows.name(0) in self.imported.only_renamed:
                    self._tell(rows, new.key, 0)
                continue
            self._tell(rows, new.key, new.hit.source if new.hit is not None else 0)
        self.shift = max(counts, key=lambda s: (counts[s], s == 0))

    def _lay_aside(self, rows: Rows) -> None:
        """The line for keys of a file that the model has no place for, where it does not want them either."""
        reasons: dict[tuple[str, bool], list[int]] = {}
        for row, name in enumerate(rows.names()):
            reason = None if is_mtp_module(name) else self.imported.unwanted(name)
            if reason is not None:
                reasons.setdefault(reason, []).append(row)
        for (why, computed), kept in reasons.items():
            whole = len(kept) == len(rows.numbers)
            keys = [holes(rows.text, _loop)] if whole else list(rows.take(kept).names())
            if computed:
                self.drops += (Drop(("left",), parse_key(key), why, self.name) for key in keys)
                continue
            for key in keys:
                self._carry(key, "any", [], why)

    def _first_of(self, rows: Rows, new: Renamed) -> tuple[Rows, Renamed]:
        """The registry makes one tensor of many that are the same: the first is taken."""
        order = np.lexsort(rows.numbers.T[::-1])
        names = [rows.name(int(row)) for row in order]
        why = f"it is the same as {names[0]}; the model has one for all"
        self.drops += (Drop(("left",), parse_key(name), why, self.name) for name in names[1:])
        first = rows.take(order[:1])
        numbers = first.numbers[0].tolist()
        text = put(rows.text, numbers)
        return Rows(text, first.numbers, first.ids), replace(new, key=put(new.key, numbers))

    def _stick(self, why: str, new: Iterable[str], old: Iterable[str] = ()) -> None:
        """Note that there is no rule for keys of the model, nor for the old keys that they are made of."""
        for text in new:
            told = [t.old for n in range(8) for t in self.told.get((text, n), ())]
            keys = [_stack(holes(name, _loop), "e") for name in (text, *old, *told)]
            self.gaps += (Gap(parse_key(key), why) for key in dict.fromkeys(keys))

    def _shift_of(self, new: str, text: str, base: str) -> int:
        if not base:
            return 0
        plain = self.imported.renamer.forward(text).key
        if new in (plain, text):
            return 0
        return -1 if new.startswith(f"{base}.") and new[len(base) + 1 :] in (plain, text) else 1

    def _tell(self, rows: Rows, new: str, source: int) -> None:
        order = columns_of(new)
        if len(set(order)) != len(order):
            return
        loose = [c for c in columns_of(rows.text) if c not in order]
        if len(loose) > 1:
            return
        places: dict[int, str] = {c: stand_in(STACKED) for c in loose}
        fixed: list[tuple[int, int]] = []
        text: list[str] = []
        for segment in new.split("."):
            whole = _SEGMENT.fullmatch(segment)
            if whole is None:
                text.append(segment)
                continue
            column = columns_of(segment)
            place = len([s for s in text if columns_of(s)])
            if column:
                places[column[0]] = stand_in(place)
            else:
                fixed.append((place, int(segment)))
            text.append(stand_in(place))
        old = rewrite(rows.text, places.__getitem__)
        self.told.setdefault((".".join(text), source), []).append(Told(old, tuple(fixed)))

    def add(self, rows: Rows, origin: Origin, shift: int) -> None:
        """The rule or the carry-over for some keys of the model."""
        if origin.stuck is not None:
            self._stick(origin.stuck, [rows.text])
            return
        if origin.converter is not None and rows.text != origin.new[0]:
            if put(origin.new[0], rows.numbers[0].tolist()) not in self.imported.skeleton.tensors:
                self._stick(f"{origin.new[0]} is not there", [rows.text], origin.old)
            return
        for part, spelled in self._spell(rows, origin, shift):
            for alike in divide(part, partial(self._sort, origin)):
                self._write(alike, origin, spelled, shift)

    def _spell(
        self, rows: Rows, origin: Origin, shift: int
    ) -> Iterable[tuple[Rows, tuple[str, ...]]]:
        """Old names for some keys: those of the file where it has some."""
        base = [self._shifted(text, shift) for text in origin.old]
        told = [self._told_of(rows.text, origin.new[0], n) for n in range(len(base))]
        general = [
            next((t.old for t in each if not t.fixed), default)
            for each, default in zip(told, base, strict=True)
        ]
        special = sorted({t.fixed for each in told for t in each if t.fixed})
        left = rows
        for fixed in special:
            part = left
            for column, value in fixed:
                part = part.fix(column, value)
            if not len(part.numbers):
                continue
            names = [
                next((t.old for t in each if t.fixed == fixed), default)
                for each, default in zip(told, general, strict=True)
            ]
            gone = set(part.ids.tolist())
            left = left.take([r for r, i in enumerate(left.ids.tolist()) if i not in gone])
            values = dict(fixed)
            yield part, tuple(_fix(name, values) for name in names)
        if len(left.numbers):
            yield left, tuple(general)

    def _told_of(self, text: str, first: str, source: int) -> list[Told]:
        """How the file spells a key; one with numbers spelled out may be spelled like those without."""
        own = self.told.get((text, source), [])
        if own:
            return own
        parts: list[str] = []
        spelled: dict[int, int] = {}
        for segment in text.split("."):
            whole = _SEGMENT.fullmatch(segment)
            place = sum(bool(columns_of(part)) for part in parts)
            if whole is not None and not columns_of(segment):
                spelled[place] = int(segment)
            parts.append(segment if whole is None else stand_in(place))
        result = []
        for told in self.told.get((".".join(parts), source), []) if spelled else ():
            if any(spelled.get(column, value) != value for column, value in told.fixed):
                continue
            old = _fix(told.old, spelled)
            landed = self.imported.renamer.land(old)
            if landed is not None and landed.key == first:
                left = tuple((c, v) for c, v in told.fixed if c not in spelled)
                result.append(Told(old, left))
        return result

    def _shifted(self, text: str, shift: int) -> str:
        base = self.imported.base
        if shift > 0:
            return f"{base}.{text}"
        return text.removeprefix(f"{base}.") if shift < 0 else text

    def _sort(self, origin: Origin, rows: Rows) -> Sequence[object]:
        """What must be the same of all keys of a rule."""
        skeleton = self.imported.skeleton
        columns: list[Sequence[object]] = []
        texts = [rows.text] if origin.converter is None else origin.new
        for text in texts:
            keys = list(map(writer(text, rows.numbers.shape[1]), rows.numbers.tolist()))
            shapes = [skeleton.tensors.get(key) for key in keys]
            if origin.converter is None:
                columns.append([len(shape or ()) for shape in shapes])
            else:
                columns.append(shapes)
            columns.append([skeleton.kinds.get(key, "any") for key in keys])
        return list(zip(*columns, strict=True))

    def _write(self, rows: Rows, origin: Origin, old: tuple[str, ...], shift: int) -> None:
        skeleton = self.imported.skeleton
        numbers = rows.numbers[0].tolist()
        values = {c: numbers[c] for c in range(len(numbers)) if c not in columns_of(rows.text)}
        actual = [put(text, numbers) for text in origin.new]
        absent = [key for key in actual if key not in skeleton.tensors]
        if absent:
            self._stick(f"{absent[0]}, which is made with it, is not there", [rows.text], old)
            return
        new = tuple(self._shifted(_fix(text, values), shift) for text in origin.new)
        old = tuple(_fix(text, values) for text in old)
        kinds = [skeleton.kinds.get(key, "any") for key in actual]
        shapes = [skeleton.tensors[key] for key in actual]
        where = self._where(origin.fired, origin.converter)
        bounds = self._bounds(rows)
        usual = tuple(_fix(self._shifted(text, shift), values) for text in origin.old)
        self._respell(old, usual, where)
        if origin.converter is None:
            left_kind = _old_kind(kinds[0], old[0])
            if old == new and left_kind == kinds[0]:
                self._carry(holes(new[0], _loop), kinds[0], bounds)
                return
            dims = _DIMS.get(kinds[0], "...")
            text = f"{holes(old[0], _loop)} : {dims} == {holes(new[0], _loop)} : {dims}"
            self._rule(new[0], text, bounds, (left_kind,), (kinds[0],), where)
            return
        turned = self._is_turned(old[0], new[0], shapes[0])
        operations = origin.converter.transform.operations
        try:
            chain = run(
                operations,
                [*origin.converter.transform.forward.sources],
                [*origin.converter.transform.forward.targets],
                shapes,
                skeleton.submodels[0].config,
                turned=turned,
            )
        except UnknownOperationError as error:
            if knows(operations):
                self._stick(f"{origin.converter.transform}: {error}", new, old)
            else:
                self._watch(
                    origin.converter.transform, actual, shapes, kinds, new, old, bounds, where
                )
            return
        index = write_dim(chain.index) if chain.index is not None else "e"
        left = "\n".join(
            f"{_stack(holes(name, _loop), index)} : {chain.write(axes)}"
            for name, axes in zip(old, chain.sources, strict=True)
        )
        right = "\n".join(
            f"{holes(name, _loop)} : {chain.write(dims)}"
            for name, dims in zip(new, chain.targets, strict=True)
        )
        clauses = [*chain.clauses(), *bounds]
        left_kinds = tuple(
            _source_kind(kinds[0], len(axes), len(shapes[0]), name, turned=chain.is_turned)
            for name, axes in zip(old, chain.sources, strict=True)
        )
        self._rule(new[0], f"{left}\n    == {right}", clauses, left_kinds, tuple(kinds), where)

    def _watch(
        self,
        transform: Transform,
        actual: Sequence[str],
        shapes: Sequence[tuple[int, ...]],
        kinds: Sequence[str],
        new: tuple[str, ...],
        old: tuple[str, ...],
        bounds: Sequence[str],
        where: str,
    ) -> None:
        """The rules of a converter that nobody here knows by name, learned by running it."""
        from regraft.bridges.transformers.watching import watch_converter

        try:
            found = watch_converter(transform, actual, shapes, kinds, self.imported.skeleton)
        except (UnknownOperationError, BadInputError) as error:
            self._stick(f"{transform}: {error}", new, old)
            return
        for number in {number for each in found for number in each.unread}:
            names = ", ".join(type(operation).__name__ for operation in transform.operations)
            why = f"{transform}: {names} computes values with it, which no layout change does"
            key = _stack(holes(old[number], _loop), "e")
            self.gaps.append(Gap(parse_key(key), why))
        for each in found:
            left = "\n".join(
                f"{_stack(holes(old[term.number], _loop), term.index or 'e')} : {term.dims}"
                for term in each.left
            )
            right = "\n".join(
                f"{holes(new[term.number], _loop)} : {term.dims}" for term in each.right
            )
            right_kinds = tuple(kinds[term.number] for term in each.right)
            text, clauses = f"{left}\n    == {right}", [*each.clauses, *bounds]
            first = new[each.right[0].number]
            self._rule(first, text, clauses, each.left_kinds, right_kinds, f"{where} (watched)")

    def _respell(self, old: Sequence[str], usual: Sequence[str], where: str) -> None:
        for spelled, name in zip(old, usual, strict=True):
            if spelled != name:
                left, right = (_stack(holes(text, _loop), "e") for text in (spelled, name))
                equation = parse_equation(f"{left} : ... == {right} : ...")
                rule = Rule(left, equation, ("any",), ("any",), self.name, where)
                self.respelled.append(rule)

    def _is_turned(self, old: str, new: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor that may be stored either way is turned in the old layout.

        It was. Only a file whose names are old, and whose shape is already the model's, has it otherwise.
        """
        if old == new:
            return True
        text = _plain_template(old)
        told = [own for key, own in self.shapes.items() if _plain_template(key) == text]
        return not any(tuple(own) == tuple(shape) for own in told)

    def _rule(
        self,
        name: str,
        text: str,
        clauses: Sequence[str],
        left: tuple[str, ...],
        right: tuple[str, ...],
        where: str,
    ) -> None:
        if clauses:
            text += "\nwhere " + ", ".join(clauses)
        equation = parse_equation(text)
        try:
            check_equation(equation)
        except BadInputError as error:
            self._stick(error.findings[0].message, [name])
            return
        self.rules.append(
            Rule(holes(name, _loop), equation, left, right, self.imported.name, where)
        )

    def _carry(
        self, key: str, kind: str, bounds: Sequence[str], why: str = "its name did not change"
    ) -> None:
        text = f"{key} : ... == {key} : ..."
        if bounds:
            text += " where " + ", ".join(bounds)
        equation = parse_equation(text)
        self.carries_made.append(Carry(equation.left[0], equation, why, kind, self.name))

    def _bounds(self, rows: Rows) -> list[str]:
        return [
            f"{_loop(c)} < {int(rows.numbers[:, c].max()) + 1}"
            for c in sorted(set(columns_of(rows.text)))
        ]

    def _where(self, fired: Iterable[Scoped], converter: Scoped | None) -> str:
        used = [*fired, *([converter] if converter is not None and converter not in fired else [])]
        by_entry: dict[str, list[str]] = {}
        for scoped in dict.fromkeys(used):
            by_entry.setdefault(scoped.transform.entry, []).append(f"#{scoped.transform.number}")
        told = "; ".join(f"{entry} {', '.join(numbers)}" for entry, numbers in by_entry.items())
        return f"transformers {check_version()}: {told or 'unchanged'}"

    def book(self) -> Book:
        root = self.imported.skeleton.submodels[0]
        types = tuple(
            dict.fromkeys(m.model_type for m in self.imported.skeleton.submodels if m.model_type)
        )
        known = [b for b in library() if root.model_type in b.reclaimed_model_types]
        reclaimed = tuple(sorted({name for book in known for name in book.reclaimed}))
        shared, parameters = tuple(self._shared()), tuple(self._parameters())
        rules = tuple(
            Rule(
                rule.name,
                rule.equation,
                fitting(rule.left_kinds, rule.equation.left),
                fitting(rule.right_kinds, rule.equation.right),
                rule.book,
                rule.where,
            )
            for rule in self.rules
        )
        return Book(
            self.name,
            f"{self.imported.name}: from the registry of transformers {check_version()}",
            LEFT,
            RIGHT,
            types,
            rules,
            tuple(self.carries_made),
            parameters,
            (),
            reclaimed,
            types[:1] if reclaimed else (),
            self.name,
            f"transformers {check_version()}, conversion_mapping",
            tuple(self.drops),
            tuple(self.gaps),
            tuple({str(rule.equation): rule for rule in self.respelled}.values()),
            left_adapters="peft-0.18",
            right_adapters="peft-0.19",
            shared=shared,
        )

    def _shared(self) -> Iterable[Shared]:
        """What stood in two places, and stands in the second only."""
        tensors = self.imported.skeleton.tensors
        for first, second in shared_places(self.imported.classes):
            places = [
                any(key.startswith(f"{path}.") for key in tensors) for path in (first, second)
            ]
            if places == [False, True]:
                yield Shared(first, second)

    def _parameters(self) -> Iterable[Parameters]:
        skeleton = self.imported.skeleton
        groups: dict[tuple[str, tuple[str, ...]], None] = {}
        for rows in rows_of(skeleton.parameters):
            if rows.text:
                for module in rows.names():
                    names = skeleton.parameters[module]
                    groups.setdefault((holes(rows.text, _loop), names), None)
        kept: dict[str, str] = {
            str(carry.term.key): str(carry.term.key) for carry in self.carries_made
        }
        kept |= {
            str(rule.equation.left[0].key): str(rule.equation.right[0].key)
            for rule in self.rules
            if len(rule.equation.left) == 1
        }
        for module, names in groups:
            same = all(kept.get(f"{module}.{name}") == f"{module}.{name}" for name in names)
            sides: tuple[Side, ...] = ("left", "right") if same else ("right",)
            yield Parameters(sides, parse_key(module), names)


def _plain_template(text: str) -> str:
    return _SEGMENT.sub("#", text)


def _loop(column: int) -> str:
    return _LOOPS[column] if column < len(_LOOPS) else f"l{column}"


def _fix(text: str, values: Mapping[int, int]) -> str:
    return rewrite(text, lambda c: str(values[c]) if c in values else stand_in(c))


def _stack(key: str, index: str) -> str:
    return key.replace("{" + _loop(STACKED) + "}", "{" + index + "}")


def _old_kind(kind: str, old: str) -> str:
    """What a tensor was: a matrix called weight was a Linear's, and no expert said that it is transposed."""
    if kind == "parameter" and old.endswith(".weight"):
        return "linear"
    return "experts-unmarked" if kind == "experts-transposed" else kind


def _source_kind(kind: str, dims: int, target_dims: int, old: str, *, turned: bool) -> str:
    if kind.startswith("experts"):
        if dims == 2:
            return "linear"
        if turned:
            return "experts-unmarked" if kind == "experts" else "experts"
        return _old_kind(kind, old)
    if kind == "linear" and turned:
        return "conv1d"
    return _old_kind(kind, old)
