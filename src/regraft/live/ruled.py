"""What rule books of the user's own say of a live model; they come before transformers' registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from regraft.arrays.apply import apply_plan
from regraft.bridges.transformers.making import RIGHT
from regraft.errors import AmbiguousError
from regraft.layouts.graph import Edge, edges_to
from regraft.names.keys import group_names
from regraft.names.live import LiveModel
from regraft.names.skeleton import Skeleton
from regraft.planning.build import build_plan
from regraft.planning.identify import detect_by_books, make_plan
from regraft.planning.model import ModelConfig, Scope
from regraft.planning.plan import Headers, Plan
from regraft.rules.book import Book, books_for
from regraft.rules.mtp import MtpKeys

_WHERE = "the state dict"


@dataclass(frozen=True)
class Ruled:
    """A live model and the rule books that know it. It answers what `Imported` answers of other models."""

    skeleton: Skeleton
    books: tuple[Book, ...]
    scopes: dict[str, Scope]
    name: str
    """The model's class."""

    @staticmethod
    def of(model: LiveModel, books: Sequence[Book]) -> Ruled | None:
        """What some books say of a model; ``None`` where none of them knows it.

        A class of transformers' own has the layout of that release: a book between two others says nothing of it.
        """
        name = type(model.module).__name__
        config = ModelConfig(model.module.config.to_dict(), f"the {name} in memory")
        known = tuple(books_for(config.model_types(), books))
        if type(model.module).__module__.startswith("transformers."):
            known = tuple(book for book in known if RIGHT in book.layouts)
        if not known:
            return None
        scopes = {book.name: config.scope_of(book.model_types) for book in known}
        return Ruled(model.skeleton, known, scopes, name)

    @cached_property
    def layout(self) -> str:
        """The layout that the model itself has, to which each of the books leads.

        Raises ``BadInputError`` where one does not.
        """
        edges_to(self.books, self.own_layout)
        return self.own_layout

    @cached_property
    def own_layout(self) -> str:
        """The layout that the model itself has, by its names; the newest where they are the same in all."""
        shapes = self._own_shapes()
        try:
            found = detect_by_books(_headers(shapes), self.books, self.scopes, self.name).layout
        except AmbiguousError:
            found = None
        sides = (self.books[0].left, self.books[0].right)
        return found or (RIGHT if RIGHT in sides else self.books[0].right)

    @cached_property
    def ways(self) -> dict[str, tuple[str, ...]]:
        """Each name of the other layout, and the model's own that it gives something to."""
        found: dict[str, tuple[str, ...]] = {}
        plan = self._way_back
        for entry in plan.entries:
            read = np.concatenate([ids.reshape(len(entry), -1) for ids in entry.sources], axis=1)
            for term in entry.written:
                names = entry.keys(term).names()
                each = len(names) // len(entry)
                for number, name in enumerate(names):
                    ids = read[number // each]
                    found[name] = tuple(plan.headers.name(int(i)) for i in ids if i >= 0)
        return found

    @cached_property
    def _way_back(self) -> Plan:
        """From the model's own names to the other layout.

        Raises ``UnmatchedKeysError`` where the books do not explain all of the model's tensors.
        """
        return build_plan(
            _headers(self._own_shapes()),
            [Edge.out_of(book, self.layout) for book in self.books],
            scopes=self.scopes,
            where=self.name,
        )

    def check_known(self) -> None:
        """It is known, by the books."""

    def targets(self, keys: Sequence[str]) -> list[tuple[str, ...]]:
        """All keys of the model that each key gives something to, in either layout's names."""
        own = self.skeleton.tensors
        return [self.ways.get(key, (key,) if key in own else ()) for key in keys]

    def lands(self, keys: Sequence[str]) -> list[bool]:
        """Whether each key, of either layout, is one of the model's."""
        return [bool(new) for new in self.targets(keys)]

    def unwanted(self, key: str) -> tuple[str, bool] | None:
        """Why the model has no place for a key, and whether it computes it; ``None`` if it should have one."""
        return ("the model computes it itself", True) if key in self.skeleton.computed else None

    def mtp_among(self, keys: Sequence[str]) -> MtpKeys:
        """None: what a user's books say of such layers, they say themselves."""
        return MtpKeys()

    @property
    def changed(self) -> frozenset[str]:
        """The model's keys that have another name, or are in other tensors, in the other layout."""
        return frozenset(new for old, names in self.ways.items() for new in names if new != old)

    def convert(
        self, tensors: Mapping[str, Any], layout: str
    ) -> tuple[dict[str, Any], Plan | None]:
        """Tensors of the model in a layout, and the plan; ``None`` where they are in it already.

        Raises what planning raises.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        headers = Headers(
            group_names(tensors), list(shapes.values()), [str(t.dtype) for t in tensors.values()]
        )
        known = detect_by_books(headers, self.books, self.scopes, _WHERE)
        plan = make_plan(headers, known, layout, _WHERE)
        if plan is None:
            return dict(tensors), None
        return apply_plan(plan, list(tensors.values())), plan

    def lines(self) -> list[str]:
        """What applies, in words."""
        said = [f"  (the model): rule book {book.name} ({book.path})" for book in self.books]
        for rule, times in self._way_back.fired().items():
            if times:
                said.append(f"    {rule}  ({times} times)")
        return said

    def _own_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self.skeleton.tensors
        return {k: tuple(s) for k, s in shapes.items() if k not in self.skeleton.computed}


def _headers(shapes: Mapping[str, tuple[int, ...]]) -> Headers:
    return Headers(group_names(shapes), list(shapes.values()), ["F32"] * len(shapes))
