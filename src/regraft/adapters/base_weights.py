"""The base's own weights, under the names and in the shapes of either layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from regraft.adapters.detect import Known
from regraft.adapters.form import Array
from regraft.arrays.apply import apply_plan
from regraft.errors import Finding, RefusedError
from regraft.layouts.graph import route_between
from regraft.names.keys import group_names
from regraft.planning.compose import plan_along
from regraft.planning.detect import detect_layouts
from regraft.planning.lookup import Lookup
from regraft.planning.model import Weights
from regraft.planning.plan import Entry, Headers, Plan
from regraft.rules.kinds import IN, KINDS, OUT
from regraft.storage.checkpoint import Checkpoint
from regraft.values import replace


class _Lazy:
    """The tensors of a base by number, read when they are asked for."""

    def __init__(self, weights: Weights, names: list[str]) -> None:
        self.weights, self.names = weights, names

    def __getitem__(self, number: int) -> Array:
        return self.weights.read(self.names[number])

    def __len__(self) -> int:
        return len(self.names)


class BaseWeights:
    """The base's tensors under the names of a layout, whichever of the two the checkpoint is in."""

    def __init__(self, known: Known, layout: str, weights: Weights | None) -> None:
        self.known, self.layout, self.weights = known, layout, weights
        self._moved: Plan | None = None
        self._places: dict[str, tuple[int, int]] | None = None
        self._last: tuple[tuple[int, int], dict[str, Any]] | None = None

    @staticmethod
    def of(known: Known, layout: str) -> BaseWeights:
        """The weights beside the base's config, where there are any."""
        model = known.model
        weights = model.weights if model is not None else None
        if model is not None and weights is None:
            weights = Checkpoint.find(Path(model.path).parent)
        if weights is None or known.foreign is None or model is None:
            return BaseWeights(known, layout, weights)
        # An adapter has the names of modules, and a book made for it has them; the base's files may have others.
        names = weights.names()
        shapes = {name: weights.read(name).shape for name in names}
        classes = [known.architecture] if known.architecture else model.architectures()
        asked = known.foreign.book(model, names, shapes, classes, adapter=False)
        if asked is None:
            return BaseWeights(known, layout, weights)
        of_files = replace(known, books=(asked.book,), foreign=None)
        return BaseWeights(known, layout, BaseWeights(of_files, asked.book.right, weights))

    def names(self) -> list[str]:
        """The names of all tensors in the layout."""
        if self.weights is None:
            return []
        if self._places is None:
            self._plan(self.weights)
        return list(self._places or ()) if self._moved is not None else self.weights.names()

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def find(self, name: str) -> Array | None:
        """A tensor by its name in the layout; ``None`` where the checkpoint has it not.

        Raises ``RefusedError`` where it is quantised: then its numbers are others than those that stand there.
        """
        found = self._find(name)
        if found is not None and found.dtype.itemsize == 1 and found.dtype != np.bool_:
            raise RefusedError(
                Finding(
                    "needs-base-weights",
                    f"the base's weight is quantised ({found.dtype}), and its true numbers are needed",
                    where=self.known.model.path if self.known.model is not None else None,
                    key=name,
                    fix="give with --model the base as it was before it was quantised",
                )
            )
        return found

    def _find(self, name: str) -> Array | None:
        if self.weights is None:
            return None
        if self._places is None:
            self._plan(self.weights)
        assert self._places is not None
        for spelled in spellings(name):
            if spelled in self._places:
                return self._made(self._places[spelled], spelled)
            if self._moved is None and spelled in self.weights:
                return self.weights.read(spelled)
        return None

    def read(self, name: str) -> Array:
        """A tensor that is there."""
        found = self.find(name)
        if found is None:
            raise KeyError(name)
        return found

    def matrix(self, name: str, kind: str) -> npt.NDArray[np.float64] | None:
        """A weight as (out, in), or (experts, out, in), in float64."""
        tensor = self.find(name)
        if tensor is None:
            return None
        return as_matrix(tensor, kind)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of everything, under the layout's names with and without a leading ``model.``."""
        if self.weights is None:
            return {}
        if self._places is None:
            self._plan(self.weights)
        found: dict[str, tuple[int, ...]] = {}
        if self._moved is None:
            found = {name: self.weights.read(name).shape for name in self.weights.names()}
        else:
            found = self._moved.result_shapes()
        return {spelled: shape for name, shape in found.items() for spelled in spellings(name)}

    def _plan(self, weights: Weights) -> None:
        """How the checkpoint becomes the layout; nothing where it is in it already."""
        self._places = {}
        names = list(weights.names())
        groups = group_names(names)
        where = self.known.model.path if self.known.model is not None else ""
        books = self.known.books
        told = detect_layouts(Lookup.of(books, groups)).checked(where)
        if self.layout == told.layout or self.layout in told.possible or not told.evidence:
            return
        arrays = _Lazy(weights, names)
        shapes = [arrays[i].shape for i in range(len(names))]
        headers = Headers(groups, shapes, [arrays[i].dtype.name for i in range(len(names))])
        self._moved = plan_along(
            headers,
            route_between(books, told.layout, self.layout, where).steps,
            scopes=self.known.scopes,
            mixed=bool(told.mixed),
            where=where or None,
        )
        self._arrays = arrays
        for number, entry in enumerate(self._moved.entries):
            for term in entry.written:
                keys = entry.keys(term)
                each = len(keys) // len(entry)
                for row, name in enumerate(keys.names()):
                    self._places[name] = number, row // each
        for carried in self._moved.carried:
            for name, number in zip(carried.group.names(), carried.group.ids.tolist(), strict=True):
                self._places[name] = -1, number

    def _made(self, place: tuple[int, int], name: str) -> Array:
        number, row = place
        assert self._moved is not None
        if number < 0:
            return self._arrays[row]
        if self._last is None or self._last[0] != place:
            entry = self._moved.entries[number]
            alone: Entry = replace(
                entry,
                loops=entry.loops[row : row + 1],
                sources=tuple(ids[row : row + 1] for ids in entry.sources),
            )
            part = replace(self._moved, entries=(alone,), carried=())
            self._last = place, apply_plan(part, self._arrays)  # type: ignore[arg-type]
        return np.asarray(self._last[1][name])


def spellings(name: str) -> tuple[str, ...]:
    """A name with and without the leading ``model.`` that a head or its absence makes of it."""
    return tuple(dict.fromkeys((name, name.removeprefix("model."), f"model.{name}")))


def as_matrix(tensor: Array, kind: str) -> npt.NDArray[np.float64]:
    """A stored tensor as (out, in), or (batch, out, in), in float64."""
    return oriented(tensor.astype(np.float64), kind)


def oriented(tensor: npt.NDArray[Any], kind: str) -> npt.NDArray[Any]:
    """The same in the type that it has: a view, where its dims need not be joined."""
    roles = KINDS[kind].roles or (OUT, IN)
    if tensor.ndim > len(roles):
        tensor = tensor.reshape(*tensor.shape[: len(roles) - 1], -1)
    out, into = roles.index(OUT), roles.index(IN)
    return tensor if out < into else tensor.swapaxes(-1, -2)
