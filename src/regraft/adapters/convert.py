"""Converting an adapter, in six steps over frozen values; the way back wraps around them.

    opened --names--> identify --> read --> plan --> move --> adjust --> write

Each step is a function here. What a file looks like, before and after, is a dialect's; it comes in as `Opened` and
leaves through its `Writer`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np
from msgspec import Struct, field

from regraft.adapters.base_weights import BaseWeights
from regraft.adapters.complete import check_whole
from regraft.adapters.components import Record
from regraft.adapters.detect import Detected, Known, detect_layout, find_books
from regraft.adapters.families.base import Family
from regraft.adapters.form import Adapter, Array, Blob, Factors, Images, Lora, Saved, Written
from regraft.adapters.home import beside_language_model
from regraft.adapters.ladder import Carried, Ladder, unmoved_images
from regraft.adapters.move import images
from regraft.adapters.protocol import Into, Opened, Reading, Writer
from regraft.adapters.provenance import (
    KEY,
    Asked,
    KeptTable,
    Origin,
    digest_all,
    read_remembered,
    write_remembered,
)
from regraft.adapters.ranks import Options, compact, make_uniform, tighten
from regraft.adapters.roundtrip import (
    Returned,
    comes_back,
    keep_changed,
    put_back,
    restore,
    take_back,
)
from regraft.adapters.saved import move_saved
from regraft.adapters.scale import Scale
from regraft.adapters.tuned import TunedModules
from regraft.adapters.uncalled import Kept, fill_saved, keep_uncalled, modules_of
from regraft.errors import (
    AmbiguousError,
    BadInputError,
    Finding,
    RefusedError,
    RegraftError,
    UnmatchedKeysError,
)
from regraft.layouts.graph import Edge, edges_to, route_between
from regraft.layouts.names import Layout, joined_to, known_layouts
from regraft.names.keys import Group, group_names
from regraft.planning.blocks import Landing, Way, landings_of
from regraft.planning.build import build_plan
from regraft.planning.model import Foreign, ModelConfig
from regraft.planning.plan import Entry, Headers, Plan
from regraft.planning.side import Side
from regraft.report import AdapterReport, Target, Trace
from regraft.values import replace


class Converted(Struct):
    """An adapter in its new layout, ready to be written."""

    config: dict[str, Any]
    tensors: dict[str, Array]
    metadata: dict[str, str]
    report: AdapterReport
    plan: Plan | None = None
    aside: dict[str, Array] = field(default_factory=dict)
    """Factors that the layout cannot hold, for a file beside the result."""


class Identity(Struct, frozen=True, eq=False, dict=True):
    """What an adapter is: the books for its base, and the layout that it is in."""

    known: Known
    layout: str
    packing: str | None
    """How stacked experts are packed, where that was given."""
    evidence: tuple[str, ...]
    also: tuple[str, ...] = ()
    """Other layouts that parts of it are in, where they are in several."""

    @cached_property
    def side(self) -> Side:
        """What the books say of its keys."""
        return Side(self.known.books, self.layout, self.known.scopes, self.also)


def convert_adapter(
    opened: Opened,
    to: Layout,
    model: ModelConfig | None = None,
    layout: Layout | None = None,
    options: Options | None = None,
    foreign: Foreign | None = None,
    *,
    packing: str | None = None,
    into: Into | None = None,
) -> Converted:
    """Convert one adapter in memory.

    Example: a LoRA with an A (4, 16) and a B (8, 4) on each of two experts' ``w1`` and ``w3`` becomes one with an
    A (2, 8, 16) and a B (2, 16, 8) on the stacked ``gate_up_proj`` (2, 16, 16): ranks add, experts are a batch.

    ``layout`` is the source's, detected if omitted; ``model`` is the config of the base, needed where the adapter
    itself does not tell sizes (only some experts are adapted, say); ``foreign`` is asked for models that the library
    does not know. ``options`` allow what is done only by name. ``packing`` says how the source's experts are packed,
    where its layout is not given; ``into`` is the dialect of the result, the adapter's own if omitted.

    Raises ``BadInputError``, ``UnmatchedKeysError``, ``AmbiguousError`` or ``RefusedError`` with all findings.
    """
    in_place = layout is not None and layout.name == to.name
    if into is not None and not into.own and not opened.names().bound:
        raise _not_held(opened, into)
    if not in_place and opened.stands_alone(model):
        known = Known((), {}, model, None, "nothing in it is bound to a layer of the base")
        alone = Identity(known, to.name if layout is None else layout.name, None, (known.evidence,))
        return _copy(opened, to, alone, "it means the same in both layouts and was copied as it is")
    names = opened.names()
    if not in_place:
        opened.check_convertible()
    known = find_books(names, opened.hints(), model, opened.where, foreign)
    opened, known, settled = _settle_shared(opened, known, model, to, foreign)
    if names.notes or settled:
        known = replace(known, notes=(*known.notes, *names.notes, *settled))
    to = to if into is None else into.layout(to, known)
    into = None if into is None or into.own else into
    try:
        if into is not None and getattr(into.dialect, "image_only", False):
            into.dialect.writer(opened, known, to)  # refuses, and says what it is for
        identity = identify(opened, known, to, layout)
        if packing is not None and identity.packing is None:
            identity = replace(identity, packing=packing)
        asked = options or Options()
        there = identity.layout == to.name and not asked.asks and into is None
        if there and opened.is_ready(to, known, identity.packing):
            _check_readable(opened, identity)
            return _copy(opened, to, identity)
        note = ""
        if into is None and comes_back(opened, to.name):

            def again(before: Opened, how: Asked) -> Converted:
                there = Layout(identity.layout, how.packing)
                asked = Options(how.via, how.compact, how.uniform)
                return convert_adapter(before, there, model, Layout(to.name), asked, foreign)

            back, note = restore(opened, again)
            if back is not None:
                return _restored(opened, to, identity, back)
        kind = _LoraConversion if opened.family is None else _FamilyConversion
        conversion = kind(opened, to, identity, asked, into)
        conversion.notes += [note] if note else []
        return conversion.run()
    except UnmatchedKeysError as error:
        raise _only_its_language_model(opened, known, to) or error from error
    except RefusedError as error:
        raise RefusedError(
            dataclasses.replace(finding, where=finding.where or opened.where)
            for finding in error.findings
        ) from error


def _settle_shared(
    opened: Opened, known: Known, model: ModelConfig | None, to: Layout, foreign: Foreign | None
) -> tuple[Opened, Known, list[str]]:
    """The adapter with each module in the places that the result has for it, where the source's had it in two.

    Raises ``BadInputError`` where two places of one module have other tensors.
    """
    shared = [each for book in known.books if book.left != to.name for each in book.shared]
    settled, notes = opened.settle_shared(shared) if shared else (opened, [])
    if not notes:
        return opened, known, []
    known = find_books(settled.names(), settled.hints(), model, settled.where, foreign)
    return settled, known, notes


def source_layout(
    opened: Opened,
    to: Layout,
    model: ModelConfig | None,
    layout: Layout | None,
    foreign: Foreign | None = None,
) -> tuple[str, Known, list[str]]:
    """The layout of an adapter, the rule books for it, and the evidence.

    Raises what `convert_adapter` raises.
    """
    known = find_books(opened.names(), opened.hints(), model, opened.where, foreign)
    identity = identify(opened, known, to, layout)
    return identity.layout, known, list(identity.evidence)


# -- identify


def identify(opened: Opened, known: Known, to: Layout, given: Layout | None) -> Identity:
    """The layout an adapter is in; where its names are the same in all, the one that makes work.

    Raises ``BadInputError`` where ``given`` contradicts the names, or where it fits no layout, ``RefusedError`` where
    ``to`` is a layout that this model does not have.
    """
    there = {name for book in known.books for name in (book.left, book.right)}
    for layout in (to, given) if given is not None else (to,):
        if layout.name not in there:
            if layout is to and known.books and to.name in known_layouts():
                raise _not_there(known, to)
            edges_to(known.books, layout.name)
    detected = detect_layout(known.layouts, opened.hints(), known.books, opened.where)
    if given is None:
        evidence = [known.evidence, *detected.evidence]
        if detected.mixed:
            return _mixed_identity(opened, known, to.name, detected)
        found = detected.layout or _unnamed_layout(opened, known, to.name, evidence, detected)
        return Identity(known, found, None, tuple(evidence))
    if detected.by_names and detected.layout != given.name:
        raise BadInputError(
            Finding(
                "layout",
                f"it was said to be {given}, but {detected.evidence[0]}",
                where=opened.where,
                fix="leave --from out",
            )
        )
    return Identity(known, given.name, given.packing, (known.evidence,))


def _not_there(known: Known, to: Layout) -> RefusedError:
    """That a layout has no such model, as far as rule books know."""
    model = known.model_type or " or ".join(dict.fromkeys(b.name for b in known.books))
    return RefusedError(
        Finding(
            "no-image",
            f"no rule book says how {model} is stored in {to.name}, which may not have this model at all",
            fix="merge the adapter into its base and convert the base, or give a rule book with --rules",
        )
    )


def _only_its_language_model(opened: Opened, known: Known, to: Layout) -> RefusedError | None:
    """That a layout has a model's language model alone, where books say so; ``None`` where that is not why."""
    model = known.model
    inner = model.data.get("text_config") if model is not None else None
    if model is None or not isinstance(inner, Mapping):
        return None
    books = [book for book in known.books if to.name in book.layouts and book.model_types]
    if not books or any(model.model_type in book.model_types for book in books):
        return None
    name = inner.get("model_type")
    if not any(name in book.model_types for book in books):
        return None
    alone = (
        f"no rule book says how {model.model_type} is stored in {to.name}; its language model alone, {name}, has a "
        "place there"
    )
    fix = "save text_config of the base's config.json as a config.json of its own, and give that as --model"
    key = None
    if left := beside_language_model(opened.names()):
        key, more = left[0], f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        alone += f", and this is no part of it{more}"
        fix = "use it where the whole model is: transformers-v5, vllm, say"
    return RefusedError(Finding("no-image", alone, where=opened.where, key=key, fix=fix))


def _mixed_identity(opened: Opened, known: Known, to: str, detected: Detected) -> Identity:
    """What an adapter is whose parts are in several layouts, one of which is where it goes.

    Raises ``BadInputError`` where it is none of them.
    """
    if to not in detected.mixed:
        raise BadInputError(
            Finding(
                "mixed-layouts",
                f"its parts are of {' and '.join(detected.mixed)}, and {to} is neither",
                where=opened.where,
                fix=f"convert it to {detected.mixed[-1]} first",
            )
        )
    others = [name for name in detected.mixed if name != to]
    evidence = (known.evidence, *detected.evidence)
    return Identity(known, others[0], None, evidence, (*others[1:], to))


def _unnamed_layout(
    opened: Opened, known: Known, to: str, evidence: list[str], detected: Detected
) -> str:
    """What to take an adapter for whose names are the same in all layouts: its shapes may tell, or its dialect."""
    joined = joined_to(to, [b for b in known.books if to in b.layouts])
    others = [name for name in joined if name in detected.possible]
    others += [name for name in detected.possible if name not in (to, *others)]
    if to not in detected.possible:
        return others[0]
    other = others[0] if others else joined[0]
    errors = {
        layout: _misfit(opened, known, layout, target)
        for layout, target in ((other, to), (to, other))
    }
    fitting = [name for name, error in errors.items() if error is None]
    if not fitting:
        raise errors[other] or AssertionError
    if len(fitting) == 1:
        evidence.append(f"its shapes are those of {fitting[0]}")
        return fitting[0]
    chosen, why = opened.choose_layout(to, other, transposed=_has_transposed(opened, known, to))
    evidence += [why] if why is not None else []
    return chosen


def _has_transposed(opened: Opened, known: Known, to: str) -> bool:
    """Whether a saved weight is stored differently in the other layout, under the same name."""
    side = Side(known.books, to, known.scopes)
    return any(
        [term.key for term in found.rule.equation.left]
        == [term.key for term in found.rule.equation.right]
        and [term.dims for term in found.rule.equation.left]
        != [term.dims for term in found.rule.equation.right]
        for keys in opened.names().tensors
        for found, _ in side.matching(keys)
    )


def _misfit(opened: Opened, known: Known, layout: str, target: str) -> RegraftError | None:
    """Why an adapter cannot be of a layout and be converted to another, ``None`` where it can."""
    identity = Identity(known, layout, None, ())
    try:
        reading = read(opened, identity, BaseWeights.of(known, layout))
        step = route_between(known.books, layout, target, opened.where).steps[0]
        plan_step(reading.adapter, identity, step, opened.where, all_seen=reading.all_seen)
        check_whole(opened, reading, identity.side)
        move_rest(opened, reading, identity, target)
    except RefusedError:
        return None
    except RegraftError as error:
        return error
    return None


# -- read


def read(opened: Opened, identity: Identity, base: BaseWeights) -> Reading:
    """The internal form; sizes that neither tensors nor config tell come from the base's weights."""
    reading = opened.read(identity.side, identity.packing, base)
    modules = reading.adapter.modules
    if modules is not None and reading.adapter.family is not None:
        reading.adapter.family.survey(
            {
                modules.headers.name(number).removesuffix(".weight"): part
                for number, part in enumerate(modules.parts)
            }
        )
    _check_scales(reading, opened.where)
    return reading


def _check_scales(reading: Reading, where: str) -> None:
    """A scale that its file makes infinite, or NaN, is no number to count with.

    Raises ``BadInputError``.
    """
    factors = reading.adapter.factors
    if factors is None:
        return
    # Most scales are one and the same.
    odd = {scale for scale in set(factors.scales) if not isfinite(scale.alpha)}
    wrong = [i for i, scale in enumerate(factors.scales) if scale in odd] if odd else ()
    if wrong:
        message = "what multiplies its factors is no finite number"
        fix = "correct alpha, or the scale, where the adapter says it"
        raise BadInputError(
            [
                Finding("config", message, where=where, key=factors.headers.name(i), fix=fix)
                for i in wrong
            ]
        )


def _check_readable(opened: Opened, identity: Identity) -> None:
    """Check an adapter that stays as it is like one that does not; how it is packed need not be known.

    Raises ``BadInputError``.
    """
    try:
        reading = read(opened, identity, BaseWeights.of(identity.known, identity.layout))
    except AmbiguousError:
        return
    _check_unmoved(opened, reading, identity)


def _check_unmoved(opened: Opened, reading: Reading, identity: Identity) -> None:
    """Check what stays in its layout like what is planned: that it is whole, and that it fits the base.

    Sizes are compared as the rules that lead out of the layout do. Raises ``BadInputError``.
    """
    known, side, adapter = identity.known, identity.side, reading.adapter
    check_whole(opened, reading, side)
    if known.model is None or not side.edges:
        return
    step = [edge for edge in side.edges if edge.target == side.edges[0].target]
    try:
        build_plan(adapter.headers, step, scopes=known.scopes, partial=True, where=opened.where)
    except RegraftError as error:
        # Whether all of it has a place in that other layout does not matter.
        odd = [finding for finding in error.findings if finding.code == "wrong-base"]
        if odd:
            raise BadInputError(odd) from None


# -- plan


def plan_step(
    adapter: Adapter, identity: Identity, edges: Sequence[Edge], where: str, *, all_seen: bool
) -> Plan:
    """What one step of a conversion does to every adapted tensor of the base.

    ``all_seen`` is the reading's. Where a size is not known that it needs, raises an error that asks for it.
    """
    known = identity.known
    try:
        return build_plan(
            adapter.headers,
            edges,
            scopes=known.scopes,
            partial=True,
            mixed=bool(identity.also),
            all_seen=all_seen,
            where=where,
            unmatched_fix=known.unmatched_fix,
        )
    except BadInputError:
        modules = adapter.modules
        if modules is None or not modules.unknown:
            raise
        raise BadInputError(
            Finding(
                "unknown-size",
                "the size of this weight is told neither by the adapter's tensors nor by the base's config",
                where=where,
                key=modules.headers.name(min(modules.unknown)),
                fix="give the base's folder with its weights as --model",
            )
        ) from None


# -- move


def move_rest(
    opened: Opened, reading: Reading, identity: Identity, target: str | None
) -> list[Saved]:
    """Everything that is not a delta, in a layout; as it is where ``target`` is ``None``.

    Raises ``RefusedError``, ``UnmatchedKeysError``.
    """
    unbound = [Saved(name, name, x, bound=False) for name, x in reading.unbound.items()]
    if not reading.saved:
        return unbound
    tensors = list(opened.tensors.values())
    known, side = identity.known, identity.side
    return unbound + move_saved(
        reading.saved, tensors, known, side, target, opened.kind, opened.where
    )


def factors_after(made: Iterable[Images], plan: Plan) -> Factors:
    """LoRAs as a step of a route has made them, for the next one to move."""
    shapes = plan.result_shapes()
    factors = Factors(Headers((), [], []), [], [], [], [])
    groups, of, dtypes = [], [], []
    for image in made:
        rows = [row for row, lora in enumerate(image.loras) if lora is not None]
        if not rows:
            continue
        first = len(factors.a)
        for lora in (image.loras[row] for row in rows):
            assert lora is not None
            factors.a.append(lora.a)
            factors.b.append(lora.b)
            factors.scales.append(lora.scale)
            dtypes.append(lora.a.dtype.name)
        taken = image.keys.take(np.array(rows))
        keys = Group(taken.template, np.arange(first, len(factors.a)), taken.numbers)
        of += [shapes[name] for name in keys.names()]
        groups.append(keys)
        factors.kinds.append((keys, image.kind))
    return replace(factors, headers=Headers(groups, of, dtypes))


def modules_after(carried: Carried, plan: Plan) -> TunedModules:
    """A family's modules as a step of a route has made them, for the next one to move."""
    shapes = plan.result_shapes()
    groups = group_names(list(carried.parts))
    parts = list(carried.parts.values())
    headers = Headers(groups, [shapes[name] for name in carried.parts], [""] * len(parts))
    kinds = [(g, parts[int(g.ids[0])].kind) for g in groups]
    return TunedModules(headers, parts, kinds, list(range(len(parts))))


# -- adjust


class _Adjusted(Struct, frozen=True, eq=False):
    """What is to be written, after what only the base's weights can change."""

    made: list[Images]
    saved: Sequence[Saved]
    kept: Kept


# -- the two ways, each of them all steps in order


class _Conversion:
    """What both ways share: where they come from, where they go, and what they note."""

    def __init__(
        self,
        opened: Opened,
        to: Layout,
        identity: Identity,
        options: Options,
        into: Into | None = None,
    ) -> None:
        self.opened, self.to, self.identity, self.options = opened, to, identity, options
        self.known = identity.known
        self.into = into
        """The dialect to write, where it is another than the adapter's own."""
        self.returns = into is None and comes_back(opened, to.name)
        """Whether regraft made the adapter of one in this layout and dialect."""
        self.target = None if identity.layout == to.name and not identity.also else to.name
        """The layout to move to; ``None`` where nothing moves."""
        self.packing = identity.packing
        self.reading: Reading | None = None
        route = None
        if self.target is not None:
            # Where parts are of several layouts, one of which is the target, one step leads there.
            source = None if identity.also else identity.layout
            route = route_between(self.known.books, source, self.target, opened.where)
        self.steps = route.steps if route is not None else ()
        """The steps of the way; none where nothing moves."""
        shown = str(to)
        came = read_remembered(opened.metadata).source.packing if self.returns else None
        self.written = dataclasses.replace(to, packing=to.packing or came or to.usual_packing)
        """The layout to write, with its packing as asked for, as the adapter came, or as is usual."""
        self.report = _report(opened, shown, identity)
        if len(self.steps) > 1:
            self.report.evidence.append(f"the way is {route}")
        self.notes = self.report.notes

    def run(self) -> Converted:
        """All steps in order."""
        raise NotImplementedError

    def writer(self, opened: Opened) -> Writer:
        """What writes the result."""
        if self.into is not None:
            return self.into.dialect.writer(opened, self.known, self.written)
        return opened.writer(self.known, self.written)

    def writing(
        self, opened: Opened, saved: Sequence[Saved], kept: Kept
    ) -> tuple[Writer, list[str]]:
        """What writes the result, and what its config must say of saved modules."""
        writer = self.writer(opened)
        return writer, [*writer.entries(saved), *kept.entries]

    def use_base(self, opened: Opened, made: list[Images], saved: Sequence[Saved]) -> _Adjusted:
        """Add what only the base's own weights can supply."""
        known, target, where = self.known, self.to.name, opened.where
        special = modules_of(known, target)
        if not special:
            return _Adjusted(made, saved, Kept())
        writer, base = self.writer(opened), BaseWeights.of(known, target)
        entries = writer.entries(saved)
        left, tensors, kept = keep_uncalled(made, saved, special, base, writer, where)
        tensors = fill_saved(tensors, entries, special, base, kept, writer, where)
        if kept.entries:
            self.notes.append(
                f"{_count(len(kept.table.modules), 'LoRA')} added to the base weights, which are saved in their "
                f"place ({', '.join(kept.entries)}): the model reads these weights and does not call the modules"
            )
        return _Adjusted(left, tensors, kept)

    def change_ranks(self, made: Sequence[Images]) -> bool:
        """Do what was asked for of ranks, and note it: whether components are not the source's any more."""
        changed: list[tuple[int, int]] = []
        if self.options.compact:
            changed = compact(made)
            ranks = (
                ", ".join(f"{a} -> {b}" for a, b in sorted(set(changed))) or "nothing to leave out"
            )
            self.notes.append(f"ranks without components that add nothing (--compact): {ranks}")
        if self.options.uniform:
            rank = make_uniform(made)
            self.notes.append(f"all targets have rank {rank}, as was asked for")
        return bool(changed)

    def plan(self, adapter: Adapter, number: int) -> Plan:
        """A step of the way."""
        reading, step, where = self.reading, self.steps[number], self.opened.where
        assert reading is not None
        plan = plan_step(adapter, self.identity, step, where, all_seen=reading.all_seen)
        if number == 0:
            check_whole(self.opened, reading, self.identity.side)
        return plan

    def move_factors(
        self, factors: Factors, record: Record, first: int = 0
    ) -> tuple[list[Images], Plan | None, Factors]:
        """LoRAs moved along the way from a step on; the last step's plan, and the factors that it was made for."""
        plan: Plan | None = None
        made = unmoved_images(factors) if first >= len(self.steps) else []
        for number in range(first, len(self.steps)):
            factors = factors if plan is None else factors_after(made, plan)
            plan = self.plan(Adapter(factors), number)
            landed, fired, sources = landings_of(plan), plan.fired(), factors.headers.names()
            made = list(_images(plan, landed, factors, sources, record))
            self.count(fired)
        return made, plan, factors

    def count(self, fired: Mapping[str, int]) -> None:
        """Note how often rules fired."""
        for rule, times in fired.items():
            self.report.rules[rule] = self.report.rules.get(rule, 0) + times

    def read(self, base: BaseWeights) -> Reading:
        """All of the adapter; how it is packed is noted."""
        self.reading = reading = read(self.opened, self.identity, base)
        self.packing = reading.packing or self.packing
        self.report.evidence += reading.evidence
        self.notes += reading.notes
        if not self.steps:
            _check_unmoved(self.opened, reading, self.identity)
        return reading

    def remember(
        self, before: Mapping[str, Any], blob: Blob, record: Record, kept: Kept, plan: Plan | None
    ) -> dict[str, str]:
        """The metadata, with what the way back needs; nothing leads back from another dialect."""
        own = self.into is None
        entry = write_remembered(
            self.to.name,
            Origin(self.identity.layout, self.packing) if own else Origin(),
            before if own else blob.config,
            blob.config,
            record if own else Record(),
            kept.table if own else KeptTable(),
            self.spelled(plan),
        )
        mine = self.opened.metadata if own else {}
        left = sorted(self.opened.metadata.keys() - {"format", KEY, *mine, *blob.metadata})
        if left:
            self.notes.append(
                f"left out of the metadata, which is of another format: {_some(left)}"
            )
        return {"format": "pt", **mine, **blob.metadata, KEY: entry}

    def spelled(self, plan: Plan | None) -> list[str]:
        """One name of each kind that the adapter had, so that the way back spells names as they were."""
        if plan is None or not self.known.imported:
            return []
        names: dict[str, str] = {}
        for entry in plan.entries:
            for term in entry.read:
                keys = entry.keys(term)
                names.setdefault(keys.template, keys.name(0))
        return list(names.values())

    def note_scales(self, made: Sequence[Images]) -> None:
        """What happened to scales and dtypes where parts were joined."""
        loras = [lora for image in made for lora in image.loras if lora is not None]
        folded = sum(not lora.exact and not lora.decomposed for lora in loras)
        if folded:
            self.notes.append(
                f"parts of unequal scale share one now in {_count(folded, 'target')}: the ratio was folded into B"
            )
        wider = [lora.b.dtype == lora.a.dtype for lora in loras].count(False)
        if wider:
            self.notes.append(
                f"B became float32 in {_count(wider, 'target')}, because the ratio is no power of two"
            )

    def finish(self, blob: Blob, saved: Sequence[Saved], plan: Plan | None, trace: Trace) -> None:
        """Numbers for the report."""
        self.report.carried = len(saved)
        self.report.tensors_out = len(blob.tensors)
        self.report.trace = trace


class _LoraConversion(_Conversion):
    """A plain LoRA."""

    def run(self) -> Converted:
        """All steps in order."""
        source, returned = self.opened, Returned({})
        record = Record()
        if self.returns:
            record = read_remembered(source.metadata).record(
                rslora=bool(source.config.get("use_rslora"))
            )
            self.opened, returned = take_back(
                source, BaseWeights.of(self.known, self.identity.layout)
            )
            self.notes += [returned.note] if returned.note else []
        opened = self.opened
        reading = self.read(BaseWeights.of(self.known, self.identity.layout))
        read_factors = reading.adapter.factors
        assert read_factors is not None
        made, plan, factors = self.move_factors(read_factors, record)
        moved = move_rest(opened, reading, self.identity, self.target)
        direct = len(self.steps) < 2
        if not direct:
            record = Record()
        done = self.use_base(opened, made, moved)
        made, kept = done.made, done.kept
        via = self.options.via
        errors = tighten(made, via) if via is not None and via != "dense" else {}
        changed = self.options.changes_ranks and self.change_ranks(made)
        if changed or errors:
            record = Record()
        writer, entries = self.writing(opened, moved, kept)
        blob = writer.write_lora(made, done.saved, entries, returned.tensors, returned.written)
        self.check_left(kept, blob, returned)
        if not changed and not errors and self.into is None and direct:
            self.keep_bits(made, factors, kept, blob)
        if self.returns:
            put_back(blob, source)
        self.notes += blob.notes
        self.note_scales(made)
        rung = "svd" if errors else "family"
        self.report.targets = _targets(blob.written, made, rung, errors)
        beside = tuple(map(opened.shown, done.saved))
        trace = Trace(factors.headers, plan, scales=factors.scales, beside=beside)
        self.finish(blob, done.saved, plan, trace)
        aside = kept.tensors if self.into is None else {}
        if not direct and self.into is None:
            # What several steps join is not noted, so all of the source is kept.
            aside = {**aside, **source.tensors}
            kept.table.whole = digest_all(blob.tensors)
        metadata = self.remember(source.config, blob, record, kept, plan)
        return Converted(blob.config, blob.tensors, metadata, self.report, plan, aside)

    def check_left(self, kept: Kept, blob: Blob, returned: Returned) -> None:
        """Raise ``RefusedError`` where every LoRA was added to its base weight."""
        if kept.entries and len(blob.written) == len(returned.written):
            raise RefusedError(
                Finding(
                    "nothing-left",
                    "every LoRA of it had to be added to its base weight, so nothing is left that PEFT "
                    "could adapt, and PEFT loads no such adapter",
                    where=self.opened.where,
                    key=next(iter(kept.table.modules)),
                    fix="merge the adapter into its base and convert the base",
                )
            )

    def keep_bits(self, made: Sequence[Images], factors: Factors, kept: Kept, blob: Blob) -> None:
        """Keep aside what the result alone would not give back bit for bit, and say what cannot be kept."""
        lost = keep_changed(made, factors, self.opened.tensors, kept)
        if kept.tensors and any(lora and lora.changed for image in made for lora in image.loras):
            kept.table.changed = digest_all(blob.tensors)
        if lost:
            self.notes.append(
                f"the way back will not give back every bit of {_count(lost, 'LoRA')}: their factors were rescaled, "
                "or joined with factors of another dtype"
            )


class _FamilyConversion(_Conversion):
    """A family that is more than plain LoRA: in its own form, or as LoRAs."""

    def run(self) -> Converted:
        """All steps in order."""
        opened, target = self.opened, self.target
        base = BaseWeights.of(self.known, self.identity.layout)
        reading = self.read(base)
        adapter = reading.adapter
        modules, family = adapter.modules, adapter.family
        assert modules is not None and family is not None
        moved = move_rest(opened, reading, self.identity, target)
        writer = self.writer(opened)
        ladder = Ladder(
            family,
            self.known,
            self.to.name,
            opened.where,
            base,
            writer.claimed,
            held=writer.holds(family),
        )
        plan = self.plan(adapter, 0) if self.steps else None
        carried = ladder.carry(plan, modules, self.options.via)
        number = 1
        while carried.factors is None and plan is not None and number < len(self.steps):
            self.count(plan.fired())
            modules = modules_after(carried, plan)
            plan = self.plan(Adapter(modules=modules, family=family), number)
            carried = ladder.carry(plan, modules, self.options.via)
            number += 1
        if carried.factors is None:
            if plan is not None:
                self.count(plan.fired())
            blob, done = self.write_family(ladder, carried, plan, modules, moved)
            rslora = bool(opened.config.get("use_rslora"))
            self.report.targets = _family_targets(carried, plan, rslora=rslora)
        else:
            blob, done, plan = self.write_lora(family, carried, carried.factors, number - 1, moved)
        beside = tuple(map(opened.shown, done.saved))
        self.finish(blob, done.saved, plan, Trace(modules.headers, plan, beside=beside))
        kept = done.kept
        sidecar = dict(kept.tensors)
        approximate = any(target.rung == "svd" for target in self.report.targets)
        # What is only approximated is another adapter, and its way back is another one's, too.
        if (carried.factors is not None or carried.moved) and not approximate:
            sidecar.update(opened.tensors)
            kept.table.whole = digest_all(blob.tensors)
            asked = self.options
            kept.table.asked = Asked(self.to.packing, asked.via, asked.compact, asked.uniform)
        metadata = self.remember(opened.config, blob, Record(), kept, plan)
        aside = sidecar if self.into is None else {}
        return Converted(blob.config, blob.tensors, metadata, self.report, plan, aside)

    def write_family(
        self,
        ladder: Ladder,
        carried: Carried,
        plan: Plan | None,
        modules: TunedModules,
        moved: Sequence[Saved],
    ) -> tuple[Blob, _Adjusted]:
        """The family in its own form."""
        opened = self.opened
        self.notes += opened.warnings(self.to.name)
        done = self.use_base(opened, [], moved)
        writer, entries = self.writing(opened, moved, done.kept)
        blob, checked = writer.write_family(
            carried, plan, modules, ladder.family, done.saved, entries
        )
        if not checked:
            ladder.confirm(blob.config, carried.parts)
        return blob, done

    def write_lora(
        self,
        family: Family,
        carried: Carried,
        factors: Factors,
        first: int,
        moved: Sequence[Saved],
    ) -> tuple[Blob, _Adjusted, Plan | None]:
        """The family as LoRAs, which move from a step of the way on."""
        own = [item for item in moved if not family.shares(item.old)]
        made, plan, _ = self.move_factors(factors, Record(), first)
        plain = self.opened.as_lora()
        done = self.use_base(plain, made, own)
        errors = tighten(done.made, self.options.via)
        if self.options.changes_ranks:
            self.change_ranks(done.made)
        writer, entries = self.writing(plain, own, done.kept)
        blob = writer.write_lora(done.made, done.saved, entries, {}, ())
        self.notes += blob.notes
        self.note_scales(done.made)
        rung = "svd" if errors else carried.rung
        self.report.targets = _targets(blob.written, done.made, rung, errors)
        how = {
            "lora": "exactly",
            "base": "exactly, with the base's weights",
            "dense": "as deltas of full rank, as was asked for",
            "svd": "approximately, as was asked for",
        }[rung]
        why = f": {carried.why}" if carried.why else ""
        self.notes.append(f"{family.title} became LoRA, {how}{why}")
        return blob, done, plan


# -- what needs no steps


def _not_held(opened: Opened, into: Into) -> RefusedError:
    """Nothing of it belongs to a module of the base: prompts and the like, which only PEFT has."""
    return RefusedError(
        Finding(
            "no-image",
            f"nothing in it is bound to a layer of the base ({opened.kind}), and another format cannot hold it: "
            f"{into.dialect.title}",
            where=opened.where,
            fix="keep it in the format that it is in",
        )
    )


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _report(opened: Opened, to: str, identity: Identity) -> AdapterReport:
    return AdapterReport(
        opened.name,
        opened.kind,
        identity.layout,
        to,
        list(identity.evidence),
        tensors_in=len(opened.tensors),
        notes=list(identity.known.notes),
    )


def _copy(opened: Opened, to: Layout, identity: Identity, why: str | None = None) -> Converted:
    report = _report(opened, str(to), identity)
    report.copied = True
    report.tensors_out = report.carried = report.tensors_in
    report.trace = _trace_of(opened.tensors)
    report.notes.append(why or f"it is in {to.name} already and was copied as it is")
    tensors, metadata = dict(opened.tensors), dict(opened.metadata)
    return Converted(dict(opened.config), tensors, metadata, report)


def _restored(opened: Opened, to: Layout, identity: Identity, back: Blob) -> Converted:
    report = _report(opened, str(to), identity)
    report.notes.append("the adapter that this one was made of is back, bit for bit")
    report.carried = report.tensors_out = len(back.tensors)
    report.peft_type = str(back.config.get("peft_type"))
    return Converted(back.config, back.tensors, back.metadata, report)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _family_targets(carried: Carried, plan: Plan | None, *, rslora: bool) -> list[Target]:
    """What is no plain LoRA; LoRA's variants (DoRA) multiply ``B @ A`` by a scale, as LoRA does."""
    rules = _rules(plan)
    made = []
    for key, part in carried.parts.items():
        rank = int(part.settings.get("r") or 0)
        alpha = part.settings.get("alpha", part.settings.get("lora_alpha", 0)) or 0
        scaled = rank > 0 and "lora_alpha" in part.settings
        scale = Scale(rank, alpha, rslora).value if scaled else 1.0
        made.append(Target(key, rank, alpha, scale, rules.get(key, "carried over"), exact=True))
    return made


def _rules(plan: Plan | None) -> dict[str, str]:
    rules: dict[str, str] = {}
    for entry in plan.entries if plan is not None else ():
        for term in entry.written:
            rules.update(dict.fromkeys(entry.keys(term).names(), str(entry.rule)))
    for item in plan.carried if plan is not None else ():
        rules.update(dict.fromkeys(item.group.names(), item.carry.why))
    return rules


def _targets(
    written: Iterable[Written], made: Sequence[Images], rung: str, errors: Mapping[str, float]
) -> list[Target]:
    rules: dict[str, str] = {}
    inexact: set[str] = set()
    for image in made:
        names = image.keys.names()
        rules.update(dict.fromkeys(names, image.why))
        inexact.update(
            name
            for name, lora in zip(names, image.loras, strict=True)
            if lora is not None and not lora.exact
        )
    return [
        Target(
            w.key,
            w.scale.rank,
            w.scale.alpha,
            w.scale.value,
            rules.get(w.key, "carried over"),
            w.key not in inexact and rung == "family",
            w.parameter is not None,
            rung,
            errors.get(w.key, 0.0),
        )
        for w in written
    ]


def _trace_of(tensors: Mapping[str, Array]) -> Trace:
    shapes = [tensor.shape for tensor in tensors.values()]
    dtypes = [tensor.dtype.name for tensor in tensors.values()]
    return Trace(Headers(group_names(list(tensors)), shapes, dtypes))


def _turned_embeddings(entry: Entry, factors: Factors, kinds: Mapping[str, str]) -> Factors:
    """Factors of an embedding that was adapted as a parameter, (vocabulary, hidden), as those of the module."""
    turned: Factors | None = None
    for term, kind in zip(entry.read, entry.read_kinds, strict=True):
        if kind != "embedding":
            continue
        for number in entry.sources[entry.read.index(term)].reshape(-1).tolist():
            group, _ = factors.headers.find(number) if number >= 0 else (None, 0)
            if group is None or kinds.get(group.template) != "parameter":
                continue
            turned = turned or replace(factors, a=list(factors.a), b=list(factors.b))
            turned.a[number], turned.b[number] = factors.b[number].T, factors.a[number].T
    return turned or factors


def _images(
    plan: Plan,
    landed: Sequence[Sequence[tuple[Landing, Way]]],
    factors: Factors,
    sources: Sequence[str],
    record: Record,
) -> Iterator[Images]:
    kinds = {keys.template: kind for keys, kind in factors.kinds}
    for entry, there in zip(plan.entries, landed, strict=True):
        yield from images(there, _turned_embeddings(entry, factors, kinds), sources, record)
    for carried in plan.carried:
        keys = carried.group
        kind = kinds[keys.template]
        loras: list[Lora | None] = [
            Lora(factors.a[i], factors.b[i], factors.scales[i]) for i in keys.ids.tolist()
        ]
        if kind == "any" or (kind == "parameter" and carried.carry.kind == "linear"):
            kind = "linear"
        yield Images(keys, kind, loras, carried.carry.why)
