"""What the installed transformers does to the names and tensors of one model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from regraft.bridges.transformers.facts import file_name, module_name, unused
from regraft.bridges.transformers.registry import (
    NEWEST,
    OLDEST,
    check_version,
    digits_spelled,
    has_single_digits,
)
from regraft.bridges.transformers.renaming import WILDCARD, Renamed, Renamer, Split
from regraft.bridges.transformers.scopes import Scoped, Scopes, find_scopes
from regraft.bridges.transformers.symbolic import (
    Judged,
    Rows,
    outcomes,
    put,
    rows_of,
    stand_in,
    writer,
)
from regraft.errors import AmbiguousError, Choice, Finding, RefusedError, UnmatchedKeysError
from regraft.names.skeleton import Skeleton, SubModel
from regraft.planning.model import ModelConfig
from regraft.rules.book import Book
from regraft.rules.mtp import MtpKeys, mtp_among

STACKED = 99
"""The stand-in for the index of a stacked tensor."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Keys of the model and the old keys that they are made of, with stand-ins for indices."""

    new: tuple[str, ...]
    """One key; of a converter, the keys of all its targets."""
    old: tuple[str, ...]
    """One for each of a converter's sources; none where no old name leads there."""
    converter: Scoped | None = None
    fired: tuple[Scoped, ...] = ()
    stuck: str | None = None

    def placed(self, numbers: Sequence[int]) -> Origin:
        """With numbers in place of stand-ins."""
        new, old = (tuple(put(text, numbers) for text in texts) for texts in (self.new, self.old))
        return Origin(new, old, self.converter, self.fired, self.stuck)


@dataclass(frozen=True)
class Imported:
    """The registry's transforms for one model, and its keys."""

    skeleton: Skeleton
    scopes: Scopes

    @cached_property
    def renamer(self) -> Renamer:
        """One key at a time."""
        texts = {rows.text for rows in self._rows}
        tensors, base = self.skeleton.tensors, self.base
        is_head = bool(base) and any(key.startswith(f"{base}.") for key in tensors)
        return Renamer(self.scopes, texts.union(tensors), base, is_head)

    @cached_property
    def _rows(self) -> list[Rows]:
        return rows_of(self.skeleton.tensors)

    @cached_property
    def keys(self) -> list[str]:
        """The model's keys."""
        return list(self.skeleton.tensors)

    @property
    def classes(self) -> tuple[str, ...]:
        """The model's class and its bases."""
        return self.skeleton.submodels[0].classes

    @property
    def base(self) -> str:
        """What a head model calls the base model in it."""
        return self.skeleton.submodels[0].base_model_prefix

    @property
    def name(self) -> str:
        """The model's class, or its type."""
        root = self.skeleton.submodels[0]
        return root.classes[0] if root.classes else root.model_type or "model"

    @property
    def held(self) -> SubModel | None:
        """The model of transformers in a class of somebody's own that was not built, but told by its names."""
        models, path = self.skeleton.submodels, self.skeleton.holds
        return next((m for m in models if path is not None and m.path == path), None)

    @property
    def layout(self) -> str:
        """The layout of the model itself."""
        from regraft.bridges.transformers.making import RIGHT

        return RIGHT

    @property
    def is_known(self) -> bool:
        """Whether somebody says what became of its names: transformers, its users, or a ``key_mapping``."""
        return bool(self.scopes.all_own()) or any(a.known for a in self.scopes.applied)

    def check_known(self) -> None:
        """Raises ``UnmatchedKeysError`` for a model that no rule speaks of: nobody knows whether it changed."""
        if not self.is_known:
            raise UnmatchedKeysError(
                Finding(
                    "unknown-model",
                    f"{self.name} is not a class of transformers and has no rules, so nothing says whether its "
                    "layout changed",
                    fix="give a rule book for it, as regraft.load_book and regraft.only_books take it, or register "
                    "its conversions with transformers",
                )
            )

    def rename(self, keys: Sequence[str]) -> list[str | None]:
        """The model's key for each old or new key; of a split tensor the first part, ``None`` where none lands."""
        found = self._spread(keys, lambda rows, landed: (landed.key,))
        return [new[0] if new else None for new in found]

    def targets(self, keys: Sequence[str]) -> list[tuple[str, ...]]:
        """All keys of the model that each old or new key gives something to."""

        def texts(rows: Rows, landed: Renamed) -> tuple[str, ...]:
            split = self.renamer.split(landed.key) if landed.hit is not None else None
            return (landed.key,) if split is None else split.targets

        return self._spread(keys, texts)

    def as_own(self, keys: Sequence[str]) -> list[str | None]:
        """Each key that is spelled as the model spells it, but for the base model's prefix; ``None`` for old ones."""
        base = f"{self.base}." if self.base else ""

        def texts(rows: Rows, landed: Renamed) -> tuple[str, ...]:
            same = landed.key in (rows.text, base + rows.text) or base + landed.key == rows.text
            return (landed.key,) if same and landed.hit is None else ()

        return [new[0] if new else None for new in self._spread(keys, texts)]

    def _spread(
        self, keys: Sequence[str], texts: Callable[[Rows, Renamed], tuple[str, ...]]
    ) -> list[tuple[str, ...]]:
        """For each key what is made of its template, with its own numbers; nothing where none lands."""
        result: list[tuple[str, ...]] = [()] * len(keys)
        for rows, landed in self.landings(keys):
            made = () if landed is None else texts(rows, landed)
            if made:
                writers = [writer(text, rows.numbers.shape[1]) for text in made]
                for number, row in zip(rows.ids.tolist(), rows.numbers.tolist(), strict=True):
                    result[number] = tuple(write(row) for write in writers)
        return result

    @cached_property
    def changed(self) -> frozenset[str]:
        """The model's keys that had another name, or were in other tensors."""
        return frozenset(
            name
            for rows, origin in self.origins
            if origin.converter is not None or origin.old != origin.new
            for name in rows.names()
        )

    @cached_property
    def only_renamed(self) -> frozenset[str]:
        """The model's keys that had another name, and are the same tensors otherwise."""
        return frozenset(
            name
            for rows, origin in self.origins
            if origin.converter is None and origin.old != origin.new
            for name in rows.names()
        )

    @cached_property
    def turned(self) -> frozenset[str]:
        """The model's keys that had the same name and were stored turned: only a shape tells old from new."""
        return frozenset(
            name
            for rows, origin in self.origins
            if origin.converter is not None and origin.old == origin.new
            for name in rows.names()
        )

    def sort(
        self, shapes: Mapping[str, tuple[int, ...]], layout: str
    ) -> tuple[list[str], frozenset[str]]:
        """Keys under the model's names, as far as they are spelled so, and those of these names that stay as they are.

        ``shapes`` are those of the keys, ``layout`` is what they are wanted in: transformers 4's, or the model's own.

        Raises ``AmbiguousError`` where shapes alone could tell tensors that are stored turned, and do not.
        """
        from regraft.bridges.transformers.making import RIGHT

        own = self.as_own(list(shapes))
        names = [key if name is None else name for key, name in zip(shapes, own, strict=True)]
        named = dict(zip(names, shapes.values(), strict=True))
        here = {name for name in own if name is not None}
        here -= self._still_turned({name: named[name] for name in here & self.turned})
        if layout == RIGHT:
            return names, frozenset(here)
        same = {name: named[name] for name in self.turned & named.keys()}
        if here & self.changed or same.keys() - self._still_turned(same):
            return names, frozenset()
        return list(shapes), frozenset(shapes)

    def _still_turned(self, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
        """Tensors that are called as they always were, and have their old shape.

        Raises ``AmbiguousError`` where all of them are square in the dims that changed places.
        """
        own = self.skeleton.tensors
        old = {key for key, shape in shapes.items() if shape != tuple(own[key])}
        square = {key for key in shapes if len(set(own[key][-2:])) == 1}
        if old:
            return old | square
        if shapes and len(square) == len(shapes):
            raise AmbiguousError(_square(next(iter(shapes))))
        return set()

    def counts(self) -> dict[str, int]:
        """How many of the model's tensors each rule's key stands for."""
        from regraft.bridges.transformers.making import count_rules

        return count_rules(self)

    def unwanted(self, key: str) -> tuple[str, bool] | None:
        """Why the model has no place for a key of a file, and whether it computes it; ``None`` if it should have one.

        Source: ``PreTrainedModel._adjust_missing_and_unexpected_keys``: these are the keys that are ignored there. What
        a pattern of the model's class ignores stays in the file, and is there for the way back; a buffer that only
        stands elsewhere, or in the model alone, would be left over.
        """
        if unused(self.classes, key):
            return "transformers 4 had it and did not use it, and the model has it no longer", False
        new = self.renamer.forward(key)
        names = [way.key for way in self.renamer.ways(key, new)]
        leaf = key.rpartition(".")[2]
        leaves = {name.rpartition(".")[2] for name in self.skeleton.computed}
        models = self.skeleton.submodels
        known = next((model for model in models if _ignores(model, models, names)), None)
        is_computed = any(name in self.skeleton.computed for name in names) or leaf in leaves
        if known is not None and is_computed:
            return "the model computes it itself, and leaves it aside when it loads", False
        if is_computed and (leaf in _MOVED or any(n in self.skeleton.computed for n in names)):
            return "the model computes it itself", True
        if known is None:
            return None
        return f"{known.classes[0]} has no place for it, and does not want it", False

    def mtp_among(self, keys: Sequence[str]) -> MtpKeys:
        """The layers for predicting further tokens among keys, of which the model has none."""
        left = [key for key, lands in zip(keys, self.lands(keys), strict=True) if not lands]
        if not left:
            return MtpKeys()
        config = self.skeleton.submodels[0].config
        data = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
        return mtp_among(left, (part for _, part in ModelConfig(data, "").parts()))

    def lands(self, keys: Sequence[str]) -> list[bool]:
        """Whether each key, in an old spelling or the new one, is one of the model's."""
        result = [False] * len(keys)
        for rows, landed in self.landings(keys):
            if landed is not None:
                for number in rows.ids.tolist():
                    result[number] = True
        return result

    def book(
        self,
        keys: Iterable[str] = (),
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        *,
        adapter: bool = False,
        spelled: Iterable[str] = (),
    ) -> Book:
        """The rule book between the old names and the model's.

        ``keys`` are names of the file at hand, ``spelled`` those that it had: where an old name can be spelled in
        several ways, the book has their spelling. Where some names of a file are old and others are the model's own
        already (as models of transformers 4.52 to 4.57 had them in memory), these are old names, too. ``shapes`` are
        theirs, and tell whether a tensor is stored turned. An ``adapter`` has the names of modules, which in
        transformers 4 are not always those of files; and one that has ``base_model_prefix`` where the model has not,
        or the other way round, keeps it so.
        """
        from regraft.bridges.transformers.making import make_book

        return make_book(self, list(keys), shapes or {}, adapter=adapter, spelled=list(spelled))

    @cached_property
    def origins(self) -> list[tuple[Rows, Origin]]:
        """Every key of the model and what it is made of, as the registry's way back spells it."""
        return list(self._outcomes(self._rows, self._undo, Origin.placed))

    def landings(self, keys: Sequence[str]) -> Iterator[tuple[Rows, Renamed | None]]:
        """Where keys of a file go, many at once; ``None`` for those that the model has no key for."""
        guards = self.renamer.guards(keys)

        def judge(key: str) -> Renamed:
            return self.renamer.forward(key, guards)

        def place(new: Renamed, numbers: Sequence[int]) -> Renamed:
            return new.at(put(new.key, numbers))

        for rows, new in self._outcomes(rows_of(keys), judge, place):
            yield from self._land(rows, new)

    def _outcomes(
        self,
        table: Iterable[Rows],
        judge: Callable[[str], Judged],
        place: Callable[[Judged, Sequence[int]], Judged],
    ) -> Iterator[tuple[Rows, Judged]]:
        spelled, each = self._digits
        for rows in table:
            yield from outcomes(rows, judge, place, spelled, each=each)

    @cached_property
    def _digits(self) -> tuple[frozenset[int], bool]:
        """The numbers that patterns spell out, and whether one looks at single digits."""
        transforms = self.scopes.all()
        return digits_spelled(transforms), has_single_digits(transforms)

    def _undo(self, key: str) -> Origin:
        split = self.renamer.split(key)
        if split is None:
            old = self.renamer.backward(key)
            if old is None:
                return Origin((key,), (), stuck="no old name leads to it")
            return Origin((key,), (self._written(old),), fired=old.fired)
        old_names: list[str] = []
        fired: dict[Scoped, None] = {}
        for number, name in enumerate(split.sources):
            found = self._lead_back(name.replace(WILDCARD, stand_in(STACKED)), split, number)
            if found is None:
                why = f"no old name leads to it through {split.scoped.transform}"
                return Origin((key,), (), split.scoped, stuck=why)
            old_names.append(found.key)
            fired.update(dict.fromkeys(found.fired))
        return Origin(split.targets, tuple(old_names), split.scoped, tuple(fired))

    def _written(self, old: Renamed) -> str:
        """The name of a file for an old key, where it leads to the same."""
        name = file_name(self.classes, old.key)
        new, same = self.renamer.land(name), self.renamer.land(old.key)
        return name if new is not None and same is not None and new.key == same.key else old.key

    def _lead_back(self, name: str, split: Split, source: int) -> Renamed | None:
        for old in self.renamer.undone(name):
            new = self.renamer.land(old)
            if new is None or new.hit is None or new.key != split.targets[0]:
                continue
            if new.hit.scoped is split.scoped and new.hit.source == source:
                return new.at(old)
        return None

    def _land(self, rows: Rows, new: Renamed) -> Iterator[tuple[Rows, Renamed | None]]:
        """Which keys the model has; an old name that no rule reads is tried as its module was called."""
        tensors = self.skeleton.tensors
        ways = list(self.renamer.ways(rows.text, new))
        module = module_name(self.classes, rows.text)
        if module != rows.text:
            ways += self.renamer.ways(module, self.renamer.forward(module))
        writers = [writer(way.key, rows.numbers.shape[1]) for way in ways]
        places: dict[int, list[int]] = {}
        for row, numbers in enumerate(rows.numbers.tolist()):
            found = (n for n, write in enumerate(writers) if write(numbers) in tensors)
            places.setdefault(next(found, -1), []).append(row)
        for number, kept in places.items():
            part = rows if len(places) == 1 else rows.take(kept)
            yield part, (ways[number] if number >= 0 else None)


_MOVED = ("inv_freq", "position_ids")
"""Buffers that were saved, and stand elsewhere now."""


def _ignores(model: SubModel, models: Sequence[SubModel], names: Sequence[str]) -> bool:
    """Whether a model does not want a key; of what lies in a model beside it, it says nothing."""
    own = [name for name in names if _is_around(model.path, _innermost(models, name))]
    return any(re.search(pattern, name) for pattern in model.ignored for name in own)


def _innermost(models: Sequence[SubModel], name: str) -> str:
    paths = (m.path for m in models if name.startswith(f"{m.path}."))
    return max(paths, key=len, default="")


def _is_around(one: str, other: str) -> bool:
    """Whether one of two paths is in the other."""
    short, long = sorted((one, other), key=len)
    return not short or f"{long}.".startswith(f"{short}.")


def _square(key: str) -> Finding:
    """What is said of a tensor of which nothing tells whether it is stored turned."""
    from regraft.bridges.transformers.making import LEFT, RIGHT

    return Finding(
        "which-layout",
        "its name is the same in both layouts, and it is square, so its shape does not tell either",
        key=key,
        fix="convert the file first, and say with --from which layout it is in",
        choices=tuple(
            Choice(name, "its shape fits", "its last two dims are the other way round")
            for name in (LEFT, RIGHT)
        ),
    )


def import_model(skeleton: Skeleton, key_mapping: dict[str, str] | None = None) -> Imported:
    """What the installed transformers does to one model.

    Raises ``BadInputError`` where the installed release has no registry that is known, and ``RefusedError`` where
    it changes this model in a way that is not known.
    """
    check_version()
    imported = Imported(skeleton, find_scopes(skeleton, key_mapping))
    unknown = imported.scopes.unknown()
    if unknown:
        raise RefusedError(_unknown_transform(imported.name, scoped) for scoped in unknown)
    return imported


def _unknown_transform(model: str, scoped: Scoped) -> Finding:
    low, high = (".".join(map(str, release)) for release in (OLDEST, NEWEST))
    return Finding(
        "unknown-transform",
        f"transformers {check_version()} changes {model} by a rule that cannot be read: "
        f"{scoped.transform} ({scoped.transform.unknown})",
        fix=f"convert with transformers {low} to {high}, or write a rule book for the model",
    )
