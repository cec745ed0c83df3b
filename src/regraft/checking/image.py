"""The certificate for LoRAs of image and video models: what two files add, each read by the tools' own formulas.

A file has parts of several models (a denoiser, text encoders), and each part is compared by itself. The converter's
algebra has no share in it: deltas come from `regraft.dialects.image.formulas`, and the arrays reader lays them out.
What depends on the base's weights is compared without them, too: with random weights in their place, laid out for
both files alike, two formulas that differ do not give the same.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from regraft.adapters.base_weights import BaseWeights
from regraft.adapters.deltas import Deltas
from regraft.adapters.detect import Known
from regraft.adapters.families.base import NoImageError
from regraft.adapters.form import Array, Saved
from regraft.arrays.apply import apply_plan
from regraft.arrays.pieces import Piece, Take, Wide, every_entry, take_along, take_part
from regraft.checking.certificate import (
    TOLERANCE,
    AdapterVerification,
    Budget,
    Comparison,
    carried,
)
from regraft.dialects.image.convert import OpenedImage
from regraft.dialects.image.delta import FULL, SET, Delta
from regraft.dialects.image.dialect import ImageFile
from regraft.dialects.image.families import DENOISER, Family
from regraft.dialects.image.formulas import (
    bias_of,
    delta_of_tensors,
    multiplies,
    said_alpha,
    scale_of,
)
from regraft.dialects.image.modules import book_of
from regraft.dialects.image.read import Fit, Home, candidates, model_config, read_adapter
from regraft.dialects.image.weights import ImageBase
from regraft.dialects.names import SourceName
from regraft.dialects.opening import Opening
from regraft.errors import AmbiguousError, BadInputError, Choice, Finding
from regraft.layouts.graph import Edge
from regraft.names.keys import group_names
from regraft.planning.build import build_plan
from regraft.planning.model import Scope
from regraft.planning.plan import Headers

_SHARED = "diffusers"
"""The layout that random base weights are made in; every family's book leads to it."""


def verify_images(
    src: Opening,
    dst: Opening,
    base: Path | None,
    tolerance: float,
    budget: Budget,
    said: SourceName | None = None,
) -> AdapterVerification:
    """Check that one file adds what another one adds.

    Raises what `compare_images` raises, and ``BadInputError`` where only one of them is for an image model.
    """
    pair = src.one(), dst.one()
    for opening, opened in zip((src, dst), pair, strict=True):
        if not isinstance(opened, ImageFile):
            raise BadInputError(
                Finding(
                    "wrong-base",
                    "this is not a LoRA of an image or video model, and the other file is one",
                    where=str(opening.src),
                    fix="give two files of one model",
                )
            )
    one, other = pair
    assert isinstance(one, ImageFile)
    assert isinstance(other, ImageFile)
    family = None if said is None else said.family
    result = compare_images(one, other, base, tolerance, budget, family)
    result.source, result.destination = str(src.src), str(dst.src)
    return result


def compare_images(
    one: ImageFile,
    other: ImageFile,
    base: Path | None = None,
    tolerance: float = TOLERANCE,
    budget: Budget | None = None,
    family: str | None = None,
) -> AdapterVerification:
    """Compare what two files add to a base model, whatever tools they are of.

    Raises ``BadInputError`` and its kin where one of them cannot be read, where they are for different families, or
    where the base's weights are needed and not given; ``AmbiguousError`` where it matters which family they are for.
    """
    assert one.image is not None
    assert other.image is not None
    files = one.image, other.image
    fits = [
        {fit.family.name: fit for fit in candidates(x.grouped, x.metadata, x.where, family)[0]}
        for x in files
    ]
    common = [name for name in fits[0] if name in fits[1]]
    if not common:
        raise _other_family(files, fits)
    left = budget or Budget()
    results = [
        _Files(files, (fits[0][name], fits[1][name]), base, tolerance, left).compare()
        for name in common
    ]
    if len({result.equal for result in results}) > 1:
        names = [fits[0][name].family for name in common]
        raise AmbiguousError(
            Finding(
                "which-model",
                f"both files may be for {' or '.join(x.title for x in names)}, and are equal for one of them only",
                where=one.where,
                fix=f"say which it is with --from {' or --from '.join(common)}",
                choices=tuple(
                    Choice(x.name, f"its modules are those of {x.title}", "equal" * done.equal)
                    for x, done in zip(names, results, strict=True)
                ),
            )
        )
    return results[0]


def _other_family(
    files: tuple[OpenedImage, OpenedImage], fits: Sequence[Mapping[str, Fit]]
) -> BadInputError:
    titles = [" or ".join(fit.family.title for fit in found.values()) for found in fits]
    return BadInputError(
        Finding(
            "wrong-base",
            f"this is for {titles[1]}, and the other file ({files[0].where}) is for {titles[0]}",
            where=files[1].where,
            fix="give two files of one model; if the names of one fit several, say which it is with --from",
        )
    )


@dataclass(slots=True)
class _Files:
    """Two files as adapters of one family."""

    files: tuple[OpenedImage, OpenedImage]
    fits: tuple[Fit, Fit]
    base: Path | None
    tolerance: float
    budget: Budget

    def compare(self) -> AdapterVerification:
        one, other = self.files
        result = AdapterVerification(
            one.where, other.where, one.dialect, other.dialect, self.tolerance
        )
        family = self.fits[0].family
        weights = _Weights(family, None if self.base is None else ImageBase(self.base, family))
        sides = [
            _parts(fit, file, weights) for fit, file in zip(self.fits, self.files, strict=True)
        ]
        for component in dict.fromkeys([*sides[0], *sides[1]]):
            pair = [side.get(component, []) for side in sides]
            known = _known(family, [*pair[0], *pair[1]])
            self._compare_part(component, pair, known, result)
        self._compare_others(result)
        if result.differences:
            _check_needs(sides, weights, result)
        return result

    def _compare_part(
        self,
        component: str,
        pair: list[list[_Module]],
        known: Known,
        result: AdapterVerification,
    ) -> None:
        before, after = (
            _whole(modules, known, file.where)
            for modules, file in zip(pair, self.files, strict=True)
        )
        mine = AdapterVerification("", "", "", "", self.tolerance)
        try:
            Comparison(before, after, mine, self.budget).run({})
        except NoImageError as error:
            raise _needs_base(self.files[0].where, error.why) from None
        start = "" if component == DENOISER else f"{component}."
        result.targets += [replace(t, key=start + t.key) for t in mine.targets]
        result.sampled += [start + key for key in mine.sampled]
        result.others += mine.others
        result.differences += [replace(f, key=start + (f.key or "")) for f in mine.differences]

    def _compare_others(self, result: AdapterVerification) -> None:
        """Tensors that are no weights of the model: embeddings, bookkeeping."""
        one, other = (file.grouped.others for file in self.files)
        for name in dict.fromkeys([*one, *other]):
            if name in one and name in other:
                result.others += 1
                if _bits(one[name]) == _bits(other[name]):
                    continue
            code = "missing" if name not in other else "extra" if name not in one else "differs"
            message = {
                "missing": "it is not there",
                "extra": "nothing in the source leads to it",
                "differs": "it is another tensor",
            }[code]
            result.differences.append(Finding(code, message, where=self.files[1].where, key=name))


def _bits(array: Array) -> tuple[tuple[int, ...], str, bytes]:
    return array.shape, array.dtype.name, np.ascontiguousarray(array).tobytes()


def _needs_base(where: str, why: str) -> BadInputError:
    return BadInputError(
        Finding(
            "needs-base-weights",
            f"what it adds cannot be told: {why}",
            where=where,
            fix="give the base's folder with its weights, or one file of it, as --model",
        )
    )


def _check_needs(
    sides: Sequence[Mapping[str, Sequence[_Module]]],
    weights: _Weights,
    result: AdapterVerification,
) -> None:
    """Raise ``BadInputError`` where a delta that depends on the base stands beside one that does not.

    Random weights stand for the base's only where both depend on them.
    """
    if not weights.made:
        return
    needs = [
        {
            ("" if component == DENOISER else f"{component}.") + module.home.key
            for component, modules in side.items()
            for module in modules
            if multiplies(module.tensors)
        }
        for side in sides
    ]
    for finding in result.differences:
        if finding.key is not None and (finding.key in needs[1]) != bool(needs[0]):
            raise _needs_base(
                result.source,
                f"{finding.key} depends on the base's weights in one file, and not in the other",
            )


# -- one file


@dataclass(frozen=True, slots=True, eq=False)
class _Module:
    """One module of a file, as the formulas read it."""

    home: Home
    tensors: Mapping[str, Array]
    scale: float
    delta: Delta
    """The reader's own view, for sizes and nothing else."""
    weights: _Weights

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the base weight; ones stand for what nothing shows."""
        if self.home.kind == "vector":
            return (self.delta.out,)
        shape = self.delta.shape
        if self.home.kind == "conv" and len(shape) == 2:
            shape = (*shape, 1, 1)
        unknown = (
            self.delta.conv and not self.delta.kernel and self.delta.algebra not in (FULL, SET)
        )
        if unknown or multiplies(self.tensors):
            return self.weights.shape(self.home, shape)
        return shape

    @property
    def adds(self) -> bool:
        """Whether anything is added to the weight; it may be to the bias alone, or take its place."""
        return bool(set(self.tensors) - {"diff_b", "up_bias", "alpha", "reshape", "set"})

    def value(self) -> Wide:
        """All of it, in the weight's shape."""
        shape = self.shape
        try:
            return delta_of_tensors(
                self.tensors, self.scale, shape, lambda: self.weights.of(self.home, shape)
            )
        except ValueError as error:
            raise BadInputError(
                Finding(
                    "shape",
                    f"the tensors of this module make no delta of a weight {shape}: {error}",
                    key=self.home.key,
                    fix="check the file, and that it is for this base",
                )
            ) from error


def _parts(fit: Fit, file: OpenedImage, weights: _Weights) -> dict[str, list[_Module]]:
    """The modules of a file by component."""
    adapter = read_adapter(fit, file.grouped, file.metadata, file.where, "")
    modules = file.grouped.modules
    keyed = any("alpha" in module.tensors for module in modules.values())
    spellings = {s for module in modules.values() for s in module.spellings}
    found: dict[str, list[_Module]] = {}
    for stem, module in modules.items():
        home = fit.homes[stem]
        component = fit.family.component if home.component == DENOISER else home.component
        said = said_alpha(file.metadata, component, home.module, spellings, keyed=keyed)
        scale = scale_of(module.tensors, said)
        made = _Module(home, module.tensors, scale, adapter.deltas[home], weights)
        found.setdefault(home.component, []).append(made)
    return found


def _known(family: Family, modules: Sequence[_Module]) -> Known:
    """The family's book, for modules that have one."""
    book = book_of(family)
    if book is None or all(m.home.component.startswith("text_encoder") for m in modules):
        return Known((), {}, None, None, "")
    config = model_config(family, {m.home: m.delta for m in modules})
    return Known((book,), {book.name: Scope(config)}, None, None, "")


def _whole(modules: Sequence[_Module], known: Known, where: str) -> ImageDeltas:
    """A component of a file in the layout that most of its modules are named in."""
    usual = Counter(module.home.layout for module in modules).most_common(1)
    layout = usual[0][0] if usual else _SHARED
    here = [module for module in modules if module.home.layout == layout]
    made = ImageDeltas(here, known, layout, where)
    for other in dict.fromkeys(m.home.layout for m in modules if m.home.layout != layout):
        some = [module for module in modules if module.home.layout == other]
        made.take_in(carried(ImageDeltas(some, known, other, where), layout)(every_entry))
    return made


@dataclass(frozen=True, slots=True)
class _Source:
    where: str


@dataclass(slots=True)
class _Target:
    """One tensor of the base: its kind, its shape, and what makes what is added to it."""

    kind: str
    shape: tuple[int, ...]
    module: _Module | None = None
    held: Wide | None = None
    """What is added, where it is held."""


class ImageDeltas(Deltas):
    """What one file adds to the tensors of one component, in one layout."""

    def __init__(self, modules: Sequence[_Module], known: Known, layout: str, where: str) -> None:
        self.source, self.known, self.layout = _Source(where), known, layout
        self.family = self.tuned = self.tuner = None
        self.base = BaseWeights.of(known, layout)
        self._targets: list[_Target] = []
        self.ids: dict[str, int] = {}
        self._last: tuple[int, Wide] | None = None
        self._replaced: dict[str, Array] = {}
        for module in modules:
            self._add(module)
        self._headers()

    def _add(self, module: _Module) -> None:
        home = module.home
        if "set" in module.tensors:
            self._replaced[home.key] = module.tensors["set"]
        if module.adds:
            self._put(home.key, _Target(home.kind, module.shape, module))
        bias = bias_of(module.tensors, module.scale)
        if bias is not None:
            key = home.key.removesuffix(".weight").removesuffix(".scale") + ".bias"
            self._put(key, _Target("vector", bias.shape, held=bias))

    def _put(self, key: str, target: _Target) -> None:
        if key in self.ids:
            raise BadInputError(
                Finding(
                    "doubled-target",
                    f"the file adapts {key} twice, once by its name in another layout",
                    where=self.source.where,
                    key=key,
                    fix="take one of the two out",
                )
            )
        self.ids[key] = len(self._targets)
        self._targets.append(target)

    def _headers(self) -> None:
        shapes = [target.shape for target in self._targets]
        self.headers = Headers(group_names(list(self.ids)), shapes, ["float64"] * len(shapes))

    def take_in(self, pieces: Iterable[Piece]) -> None:
        """Add what was moved here from another layout; it is held as a whole."""
        found: dict[str, _Target] = {}
        for piece in pieces:
            target = found.setdefault(
                piece.key, _Target(piece.kind, piece.shape, held=np.zeros(piece.shape))
            )
            takes = (
                np.arange(size) if take is None else take
                for size, take in zip(piece.shape, piece.takes, strict=True)
            )
            assert target.held is not None
            target.held[np.ix_(*takes)] = piece.values
        for key, target in found.items():
            self._put(key, target)
        self._headers()

    def kind(self, number: int) -> str:
        """The kind of a base tensor."""
        return self._targets[number].kind

    def shape(self, number: int) -> tuple[int, ...]:
        """The shape of a base tensor."""
        return self._targets[number].shape

    def _whole(self, number: int) -> Wide:
        target = self._targets[number]
        if target.held is not None:
            return target.held
        assert target.module is not None
        if self._last is None or self._last[0] != number:
            self._last = number, target.module.value()
        return self._last[1]

    def part(self, number: int, takes: Sequence[Take]) -> Wide:
        """Part of what is added; of a plain LoRA only that part is multiplied."""
        target = self._targets[number]
        module = target.module
        if module is None or not {"down", "up"} <= set(module.tensors):
            return take_part(self._whole(number), takes)
        t = module.tensors
        rank, into = len(t["down"]), target.shape[1:]
        if multiplies(t) or "mid" in t or len(t["up"]) != target.shape[0]:
            return take_part(self._whole(number), takes)
        up = take_along(t["up"].reshape(-1, rank).astype(np.float64), takes[0], 0)
        down: Array = t["down"].astype(np.float64).reshape(rank, *into)
        for dim, take in enumerate(takes[1:], 1):
            down = take_along(down, take, dim)
        with np.errstate(all="ignore"):
            wide = np.asarray(up, np.float64) * module.scale
            flat = wide @ down.reshape(rank, -1)
        return np.asarray(flat.reshape(len(up), *down.shape[1:]), np.float64)

    def others(self) -> dict[str, Array]:
        """Weights that take the place of the base's."""
        return dict(self._replaced)

    def moved_others(self, target: str) -> list[Saved]:
        """The same in a layout."""
        values = list(self._replaced.values())
        keys = list(self._replaced)
        if not keys or target == self.layout:
            return [Saved(key, key, value) for key, value in self._replaced.items()]
        headers = Headers(
            group_names(keys), [x.shape for x in values], [x.dtype.name for x in values]
        )
        (book,) = self.known.books
        plan = build_plan(
            headers,
            (Edge.to(book, target),),
            scopes=self.known.scopes,
            partial=True,
            where=self.source.where,
        )
        return [Saved(key, key, value) for key, value in apply_plan(plan, values).items()]


# -- the base's weights


@dataclass(slots=True)
class _Weights:
    """The base's weights; random ones in the place of those that are not at hand."""

    family: Family
    base: ImageBase | None
    made: set[str] = field(default_factory=set)
    """Keys that random numbers stand for."""

    def shape(self, home: Home, shown: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a weight; what an adapter shows of it, where the base has it not."""
        found = self._found(home, shown)
        return shown if found is None else tuple(found.shape)

    def of(self, home: Home, shape: tuple[int, ...]) -> Wide:
        """A weight as it is stored."""
        found = self._found(home, shape)
        if found is not None:
            return np.asarray(found, dtype=np.float64)
        self.made.add(home.key)
        book = book_of(self.family)
        if book is None or home.layout == _SHARED or home.component.startswith("text_encoder"):
            return _random(home.component, home.key, shape)
        there = _moved({home.key: np.zeros(shape)}, Edge.to(book, _SHARED))
        parts = {key: _random(home.component, key, x.shape) for key, x in there.items()}
        return np.asarray(_moved(parts, Edge.to(book, home.layout))[home.key])

    def _found(self, home: Home, shape: tuple[int, ...]) -> Array | None:
        if self.base is None:
            return None
        try:
            return self.base.weight(home.component, home.layout, home.key, shape)
        except NoImageError:
            return None


def _random(component: str, key: str, shape: tuple[int, ...]) -> Wide:
    """The same numbers for one weight, always."""
    seed = zlib.crc32(f"{component}.{key}".encode())
    return np.random.default_rng(seed).standard_normal(shape)


def _moved(arrays: Mapping[str, Wide], edge: Edge) -> dict[str, Array]:
    values = list(arrays.values())
    headers = Headers(
        group_names(list(arrays)), [x.shape for x in values], ["float64"] * len(values)
    )
    return apply_plan(build_plan(headers, (edge,), partial=True), values)
