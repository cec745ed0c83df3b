"""The modules that a family other than plain LoRA adapts: their tensors, settings, and the size of their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from operator import attrgetter
from typing import Any

import numpy as np

from regraft.adapters.families.base import RANK, Family, Part, UnreadableError
from regraft.adapters.form import Array
from regraft.adapters.tuned import TunedModules
from regraft.dialects.peft.config import targets_module
from regraft.dialects.peft.scan import PREFIX, Scan, Tuned
from regraft.dialects.peft.targeting import Targeting, untargeted
from regraft.equation.sizes import known_dims
from regraft.errors import BadInputError, Finding
from regraft.names.keys import Group, Ints
from regraft.planning.plan import Headers
from regraft.planning.side import Side
from regraft.rules.kinds import IN, KINDS, OUT

_AGAIN = "use the adapter_config.json that was saved with these weights, or save the adapter again"

_SHAPE, _DTYPE = attrgetter("shape"), attrgetter("dtype")

Sizes = tuple[int | None, int | None]


class ModuleReader:
    """Turns scanned modules into parts; all problems of the adapter are collected."""

    def __init__(
        self,
        scan: Scan,
        tensors: Sequence[Array],
        family: Family,
        side: Side,
        where: str,
        shape_of: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.scan, self.tensors, self.family, self.side = scan, tensors, family, side
        self.where, self.shape_of = where, shape_of or {}
        self.findings: list[Finding] = []

    def read(self) -> TunedModules:
        """The modules.

        Raises ``BadInputError`` with everything that is wrong.
        """
        groups: list[Group] = []
        shapes: list[tuple[int, ...]] = []
        made = TunedModules(Headers((), [], []), [])
        for tuned in self.scan.tuned:
            for rows, kind, known in self._known(tuned.modules):
                modules = tuned.modules.take(rows)
                start = len(made.parts)
                ids = np.arange(start, start + len(modules))
                keys = Group(modules.template + ".weight", ids, modules.numbers)
                part = Tuned(modules, {end: ids[rows] for end, ids in tuned.tensors.items()})
                self._read_group(part, kind, known, made, shapes)
                groups.append(keys)
                made.kinds.append((keys, kind))
        self._check_targets()
        if self.findings:
            raise BadInputError(self.findings)
        made.headers = Headers(groups, shapes, ["float32"] * len(shapes))
        return made

    def _known(self, modules: Group) -> Iterator[tuple[Ints, str, list[int | None]]]:
        """Some modules at a time: their rows, the kind of their weights, and the dims that the base's config says."""
        left = np.arange(len(modules))
        keys = Group(modules.template + ".weight", left, modules.numbers)
        for found, match in self.side.matching(keys):
            rows = np.intersect1d(left, match.rows)
            if len(rows):
                left = np.setdiff1d(left, rows)
                look_up = self.side.scope_of(found.rule.book).look_up
                yield rows, found.kind, known_dims(found.rule.equation, found.term, look_up)
        for book in self.side.books:
            look_up = self.side.scope_of(book.name).look_up
            for carry, match in book.carried.matching(keys):
                rows = np.intersect1d(left, match.rows)
                if len(rows):
                    left = np.setdiff1d(left, rows)
                    dims = known_dims(carry.equation, carry.term, look_up)
                    yield rows, carry.kind or "any", dims
        if len(left):
            yield left, "any", []

    def _read_group(
        self,
        tuned: Tuned,
        kind: str,
        known: list[int | None],
        made: TunedModules,
        shapes: list[tuple[int, ...]],
    ) -> None:
        count = len(tuned.modules)
        paths = tuned.modules.names()
        columns = {suffix: ids.tolist() for suffix, ids in tuned.tensors.items()}
        varies = self.family.varies()
        settings = self.family.settings(paths[0])
        told = _flat(settings)
        cache: dict[object, Sizes | None] = {}
        kind = "linear" if kind == "any" else kind
        whole = all((ids >= 0).all() for ids in tuned.tensors.values())
        ends, rows = list(columns), list(zip(*columns.values(), strict=True))
        for row in range(count):
            found = {e: self.tensors[i] for e, i in zip(ends, rows[row], strict=True) if i >= 0}
            tensors = self.family.read(found)
            if varies:
                settings = self.family.settings(paths[row])
                told = _flat(settings)
            arrays = found.values()
            form = (
                None if whole else tuple(found),
                told,
                *map(_SHAPE, arrays),
                *map(_DTYPE, arrays),
            )
            if form not in cache:
                cache[form] = self._sizes(tensors, settings, paths[row])
            sizes = cache[form]
            if sizes is None:
                sizes = 1, 1
            if None in sizes or self.shape_of:
                shape = self._shape(sizes, kind, known, paths[row], len(made.parts), made)
            else:
                shape = sizes if KINDS[kind].role(0) == OUT else sizes[::-1]  # type: ignore[assignment]
            out, into = _matrix(shape, kind)
            shapes.append(shape)
            made.parts.append(Part(tensors, out, into, settings, kind))
            made.forms.append((kind, form, shape))

    def _sizes(
        self, tensors: Mapping[str, Array], settings: Mapping[str, Any], path: str
    ) -> Sizes | None:
        try:
            self._check_filled(tensors)
            return self.family.sizes(tensors, settings)
        except (UnreadableError, KeyError, StopIteration, ValueError, IndexError) as error:
            what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            self.findings.append(
                Finding(
                    "shape",
                    f"these are no tensors of {self.family.title}: {what or 'one is missing'}",
                    where=self.where,
                    key=PREFIX + path,
                    fix=_AGAIN,
                )
            )
            return None

    def _check_filled(self, tensors: Mapping[str, Array]) -> None:
        """Raise ``UnreadableError`` for an empty tensor; only a rank may be 0, where all of it was pruned."""
        for role, tensor in tensors.items():
            if 0 in tensor.shape and RANK not in (self.family.dims(role, tensor) or ()):
                raise UnreadableError(f"one is empty ({role}, {list(tensor.shape)})")

    def _shape(
        self,
        sizes: Sizes,
        kind: str,
        known: list[int | None],
        path: str,
        number: int,
        made: TunedModules,
    ) -> tuple[int, ...]:
        """The shape of a base weight: what the tensors say, then the base's config, then its weights."""
        given = self.shape_of.get(path + ".weight")
        if given is not None and len(given) > 2:
            return given
        roles = KINDS[kind].roles or (OUT, IN)
        if len(roles) != 2:
            roles = (OUT, IN)
        shape = []
        for dim, role in enumerate(roles):
            size = sizes[0 if role == OUT else 1]
            if size is None and dim < len(known):
                size = known[dim]
            if size is None and given is not None:
                size = given[dim]
            if size is None:
                made.unknown.add(number)
            shape.append(1 if size is None else size)
        return tuple(shape)

    def _check_targets(self) -> None:
        entries = self.family.config.get("target_modules")
        if entries is None:
            return
        missed: list[Finding] = []
        targeted = 0
        targeting = Targeting(self.family.config)
        for tuned in self.scan.tuned:
            if targeting.leaves_out:
                found = untargeted(tuned.modules.names(), targeting, self.where, PREFIX + "{}")
                if found is not None:
                    self.findings.append(found)
                    targeted += len(tuned.modules)
                    continue
            leaf = tuned.modules.template.rpartition(".")[2]
            if isinstance(entries, list) and "\0" not in leaf and leaf in entries:
                targeted += len(tuned.modules)
                continue
            missing = [p for p in tuned.modules.names() if not targets_module(entries, p)]
            targeted += len(tuned.modules) - len(missing)
            if missing:
                missed.append(
                    Finding(
                        "not-targeted",
                        "target_modules of adapter_config.json does not name this module, so PEFT would "
                        "ignore its tensors",
                        where=self.where,
                        key=PREFIX + missing[0],
                        fix="add it to target_modules, or remove its tensors from the weights file",
                    )
                )
        if missed and not targeted:
            self.findings.append(
                Finding(
                    "targets-nothing",
                    f"target_modules = {entries!r} names nothing that is in the weights file "
                    f"({missed[0].key}, …)",
                    where=self.where,
                    key="adapter_config.json",
                    fix="use the config that was saved with these weights",
                )
            )
        else:
            self.findings += missed


def _matrix(shape: tuple[int, ...], kind: str) -> tuple[int, int]:
    """Out and in of a stored shape; whatever follows the second dim counts as in."""
    if kind in ("conv1d", "embedding"):
        return shape[1], shape[0]
    return shape[0], prod(shape[1:])


def _flat(settings: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple(v if isinstance(v, (int, float, str, bool)) else str(v) for v in settings.values())
