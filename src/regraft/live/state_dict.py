"""State dicts from one layout to another, around live models."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from regraft.arrays.apply import apply_plan
from regraft.bridges.transformers.imported import Imported
from regraft.bridges.transformers.making import LEFT, RIGHT
from regraft.dialects.names import layout_named
from regraft.errors import (
    AmbiguousError,
    BadInputError,
    Finding,
    RegraftError,
    UnmatchedKeysError,
)
from regraft.layouts.graph import Edge
from regraft.live.inside import Moved, move_factors
from regraft.live.left_out import left_out, mtp_of
from regraft.live.mapping import Mapping as LiveMapping
from regraft.live.mapping import mapping
from regraft.live.own_module import config_of, is_own_module, plan_into
from regraft.live.ruled import Ruled
from regraft.names.keys import group_names
from regraft.names.patterns import patterns
from regraft.names.resolve import Part, Resolved
from regraft.planning.build import build_plan
from regraft.planning.plan import Headers, Plan
from regraft.rules.book import own_books
from regraft.rules.mtp import with_mtp

if TYPE_CHECKING:
    from regraft.live.spread import Spread
    from regraft.planning.model import ModelConfig

Tensors = dict[str, Any]


class ConvertedStateDict(Tensors):
    """A state dict with a report of how it came about."""

    report: StateDictReport


@dataclass(slots=True)
class StateDictReport:
    """What became of a state dict."""

    layout: str
    prefixes: list[str] = field(default_factory=list)
    """For each model: how many keys were its, and what stood before them."""
    rules: dict[str, int] = field(default_factory=dict)
    """How often each rule fired, of those that did."""
    carried: list[str] = field(default_factory=list)
    """Keys of the holder itself, or of adapters in it."""
    kept: list[str] = field(default_factory=list)
    """Live keys that the source does not speak of; they have the values that the model has."""
    missing: list[str] = field(default_factory=list)
    """Those of them that are a model's own weights."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Keys of the source that the result has not, each with the reason: what the model computes itself, or ignores by
    its own word; a head, or a pooler, that it was made without."""

    def __str__(self) -> str:
        lines = [f"to {self.layout}: " + "; ".join(self.prefixes)]
        lines += [f"  {rule}: {times} times" for rule, times in self.rules.items()]
        lists = [("unchanged", self.carried), ("kept as they are", self.kept)]
        for why in dict.fromkeys(self.left_out.values()):
            lists.append((f"left out ({why})", [k for k, w in self.left_out.items() if w == why]))
        for title, names in lists:
            lines += [f"  {title}: {pattern} ({count})" for pattern, count in patterns(names)]
        return "\n".join(lines)


def convert_state_dict(
    state_dict: Mapping[str, Any],
    *,
    to: Any,
    model: Any = None,
    key_mapping: dict[str, str] | None = None,
) -> ConvertedStateDict:
    """A state dict in another layout, or as a live model wants it.

    Args:
        state_dict: names and tensors, in the layout of either version, bare or with whatever prefixes and wrappers'
            segments were around the model when it was saved.
        to: a live model or a holder of some: the result has the keys of its state dict, and fits
            ``to.load_state_dict``. Of a module that is no model of transformers, books of your own must know the names
            (``with regraft.only_books("mine.toml")``). Or a layout's name: the result has each model's own keys, below
            its place in the holder if the source had them so or there is more than one, and no wrapper's segments.
        model: with a layout's name, the live model or holder that the state dict is of; without it, the names must
            tell which rule book is meant.
        key_mapping: patterns and replacements of your own that come before transformers', as ``from_pretrained``
            takes them; for a live model, in ``to`` or ``model``.

    Returns:
        The tensors; ``report`` says what was done. What the source does not speak of (a value head, an adapter, a
        buffer) has the live model's own values, and is named in ``report.kept``; a weight of the model among them is
        warned of. ``report.left_out`` names what the model computes itself or declares that it ignores; and, with a
        warning, the head of a file whose base model alone is wanted, and a pooler that the model was made without.

    Raises:
        UnmatchedKeysError: keys that no model has a place for.
        AmbiguousError: keys with two homes.
        BadInputError: an incomplete group (7 of 8 experts), or shapes that do not fit.

    >>> import transformers
    >>> config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    >>> vit = transformers.ViTModel(config)
    >>> old = convert_state_dict(vit.state_dict(), to="transformers-v4", model=vit)
    >>> "encoder.layer.0.attention.attention.query.weight" in old
    True
    >>> vit.load_state_dict(convert_state_dict(old, to=vit))
    <All keys matched successfully>
    """
    _check_source(state_dict)
    spread = _spread(state_dict)
    if spread is not None:
        lazy = spread.state_dict()
        result = convert_state_dict(lazy, to=to, model=model, key_mapping=key_mapping)
        spread.finish(result, {} if isinstance(to, str) else _state_of(to))
        return result
    if not isinstance(to, str):
        if model is not None:
            message = "model is for a layout's name in `to`"
            raise BadInputError(Finding("option", message, fix="give only `to`"))
        if own_books() and is_own_module(to):
            return _into_own(state_dict, to)
        return _fitted(state_dict, mapping(to, key_mapping=key_mapping))
    layout = layout_named(to, adapter=False).name
    if model is not None and own_books() and is_own_module(model):
        return _without_model(state_dict, layout, config_of(model))
    if model is not None:
        return _named(state_dict, layout, mapping(model, key_mapping=key_mapping))
    if key_mapping:
        message = "key_mapping is for a live model"
        raise BadInputError(Finding("option", message, fix="give the model, too: model=..."))
    return _without_model(state_dict, layout)


def _spread(state_dict: Mapping[str, Any]) -> Spread | None:
    """A state dict of which this process holds parts; ``None`` for others, which need no torch here."""
    if not any(hasattr(tensor, "device_mesh") for tensor in state_dict.values()):
        return None
    from regraft.live.spread import Spread, is_spread

    return Spread(state_dict) if is_spread(state_dict) else None


def _state_of(root: Any) -> Mapping[str, Any]:
    from regraft.bridges.torch_tensors import state_of

    return state_of(root)


def _check_source(state_dict: Any) -> None:
    """Raises ``BadInputError`` for what is no state dict, before anything is looked up in it."""
    if not isinstance(state_dict, Mapping):
        raise BadInputError(
            Finding(
                "not-tensors",
                f"a {type(state_dict).__name__} is no state dict, which maps names to tensors",
                fix="give model.state_dict(), or what torch.load or safetensors read",
            )
        )
    odd = [key for key in state_dict if not isinstance(key, str)]
    if odd:
        raise BadInputError(
            Finding("not-tensors", "a name that is no text", key=repr(key), fix="take it out")
            for key in odd
        )


def _fitted(state_dict: Mapping[str, Any], target: LiveMapping) -> ConvertedStateDict:
    """As a live model wants it."""
    from regraft.bridges.torch_tensors import parameters_of, place, state_of

    resolved = target.resolve(list(state_dict))
    inside = move_factors(target, resolved, state_dict, None)
    if inside is not None:
        state_dict = inside.state_dict
        resolved = target.resolve(list(state_dict))
    layouts = dict.fromkeys(imported.layout for imported in target.imported)
    report = StateDictReport(" and ".join(layouts), carried=list(resolved.carried))
    report.prefixes = [
        f"{target.live.models[p.model].path or 'the model'}: {p}" for p in resolved.parts
    ]
    quiet, loud = left_out(target, resolved)
    report.left_out = {**quiet, **loud}
    made: Tensors = {}
    findings: list[Finding] = []
    for number, _, new in _models(target, resolved, state_dict, None, report, findings):
        live = target.live.models[number]
        for key, tensor in new.items():
            shape = live.skeleton.tensors.get(key)
            if shape is not None and tuple(tensor.shape) != tuple(shape):
                message = f"it has the shape {list(tensor.shape)}, the model wants {list(shape)}"
                findings.append(
                    Finding("shape", message, key=key, fix="give the file of this model")
                )
            made.update(dict.fromkeys(live.keys.get(key, ()), tensor))
    for key, place_ in resolved.carried.items():
        made[place_] = state_dict[key]
    if inside is not None:
        findings += _other_ranks(inside, resolved, state_of(target.live.root))
    weights = parameters_of(target.live.root)
    spoken: dict[int, str] = {}
    for key in made:
        if key in weights:
            twin = spoken.setdefault(weights[key], key)
            if twin != key and not _equal(made[key], made[twin]):
                findings.append(_two_values(key, twin))
    _raise(findings)
    result = ConvertedStateDict()
    for key, there in state_of(target.live.root).items():
        if key not in made and weights.get(key) in spoken:
            made[key] = made[spoken[weights[key]]]  # tied to one that the source speaks of
        if key in made:
            result[key] = place(made[key], there)
        else:
            result[key] = there
            report.kept.append(key)
    result.update((key, tensor) for key, tensor in made.items() if key not in result)
    apart = {*target.live.own, *target.live.adapters}
    report.missing = [key for key in report.kept if key in weights and key not in apart]
    _warn(report.missing, "weights of the model are not in the state dict and keep their values")
    _warn(
        loud, "tensors of the state dict are left out, for the model was made without such a part"
    )
    result.report = report
    return result


def _other_ranks(inside: Moved, resolved: Resolved, live: Mapping[str, Any]) -> Iterator[Finding]:
    """Factors that moved, and that the model's layers are too small or too large for."""
    for key in inside.made:
        place = resolved.carried.get(key)
        if place is None:
            continue
        made, there = list(inside.state_dict[key].shape), list(live[place].shape)
        if made != there:
            yield Finding(
                "shape",
                f"the LoRA here comes to the shape {made}, and the model's layer has {there}",
                key=place,
                fix="make the layer with this rank: the ranks of fused projections add up",
            )


def _models(
    mapping: LiveMapping,
    resolved: Resolved,
    state_dict: Mapping[str, Any],
    layout: str | None,
    report: StateDictReport,
    findings: list[Finding],
) -> Iterator[tuple[int, Part, Tensors]]:
    """Each model's tensors in a layout, once; the same model may have been saved in two places.

    Without a layout, each is in the one that its model has.

    Raises what is wrong with the keys, and with what they stand for.
    """
    from regraft.bridges.torch_tensors import whole

    _check(mapping, resolved, state_dict, report.left_out)
    done: dict[int, Tensors] = {}
    for part in resolved.parts:
        tensors = {k: whole(state_dict[key]) for k, key in part.keys.items()}
        imported = mapping.imported[part.model]
        try:
            new = convert_model(imported, tensors, layout or imported.layout, report)
        except RegraftError as error:
            findings += error.findings
            kept = imported.skeleton.tensors.keys() - imported.changed
            new = {key: tensor for key, tensor in tensors.items() if key in kept}
        before = done.setdefault(part.model, {})
        for key in before.keys() & new.keys():
            if not _equal(new[key], before[key]):
                findings.append(_two_values(part.prefix + key, key))
        fresh = {key: tensor for key, tensor in new.items() if key not in before}
        before.update(fresh)
        yield part.model, part, fresh


def _two_values(key: str, other: str) -> Finding:
    message = f"it is the same tensor as {other}, and has other values"
    return Finding("two-values", message, key=key, fix="keep one of them")


def _warn(keys: Iterable[str], message: str) -> None:
    """Of weights that were passed over, on either side."""
    shown = patterns(keys)
    if shown:
        count = sum(times for _, times in shown)
        warnings.warn(f"{count} {message}: {', '.join(name for name, _ in shown)}", stacklevel=4)


def _named(state_dict: Mapping[str, Any], layout: str, source: LiveMapping) -> ConvertedStateDict:
    """Each model's own keys in a layout."""
    resolved = source.resolve(list(state_dict))
    inside = None
    if resolved.unmatched:
        resolved = _with_mtp(source, resolved)
    if resolved.unmatched or resolved.carried:
        inside = move_factors(source, resolved, state_dict, layout)
    if inside is not None:
        state_dict = inside.state_dict
        resolved = _with_mtp(source, source.resolve(list(state_dict)))
        without = tuple(key for key in resolved.unmatched if key not in inside.made)
        resolved = replace(resolved, unmatched=without)
    report = StateDictReport(layout)
    report.prefixes = [
        f"{source.live.models[p.model].path or 'the model'}: {p}" for p in resolved.parts
    ]
    report.left_out, _ = left_out(source, resolved)
    result = ConvertedStateDict()
    findings: list[Finding] = []
    several = len(source.live.models) > 1
    fronts: dict[str, str] = {}
    for number, part, new in _models(source, resolved, state_dict, layout, report, findings):
        live = source.live.models[number]
        below = several or any(_below(part, path) for path in live.paths)
        front = f"{live.path}." if live.path and below else ""
        fronts[part.prefix] = front
        result.update((front + key, tensor) for key, tensor in new.items())
    for key, place in resolved.carried.items():
        if place in source.live.adapters:
            name = _with_depth(source.live.adapters[place], place)
        else:
            name = source.live.own.get(place, place)
        result[name] = state_dict[key]
        report.carried.append(name)
    for key in () if inside is None else inside.made:
        if key not in resolved.carried:
            name = next(
                fronts.get(p.prefix, "") + key.removeprefix(p.prefix)
                for p in resolved.parts
                if key.startswith(p.prefix)
            )
            result[name] = state_dict[key]
            report.carried.append(name)
    _raise(findings)
    result.report = report
    return result


def _with_mtp(source: LiveMapping, resolved: Resolved) -> Resolved:
    """The keys of MTP layers with those of their models: the models have them not, and files do."""
    parts, taken = [], set[str]()
    for part in resolved.parts:
        mtp = mtp_of(source.imported[part.model], part, resolved)
        parts.append(replace(part, keys={**part.keys, **{name: key for key, name in mtp.items()}}))
        taken.update(mtp)
    unmatched = tuple(key for key in resolved.unmatched if key not in taken)
    return replace(resolved, parts=tuple(parts), unmatched=unmatched)


def _with_depth(name: str, live_key: str) -> str:
    """An adapter's name with the ``base_layer`` that tells it from another one around the same module.

    >>> _with_depth("experts.lora_A.default", "base_model.model.experts.base_layer.lora_A.default")
    'experts.base_layer.lora_A.default'
    """
    segments = live_key.split(".")
    depth = segments.count("base_layer")
    if not depth:
        return name
    tail = len(segments) - 1 - segments[::-1].index("base_layer")
    own = name.split(".")
    cut = len(own) - (len(segments) - tail - 1)
    return ".".join([*own[:cut], *["base_layer"] * depth, *own[cut:]])


def _below(part: Part, path: str) -> bool:
    """Whether a part's keys stood below their model's place in the holder."""
    return part.own_path and path.split(".")[0] in part.prefix.split(".")


def _without_model(
    state_dict: Mapping[str, Any], layout: str, config: ModelConfig | None = None
) -> ConvertedStateDict:
    """By the rule library alone, and the ``config`` of a module that only books of the user's own know."""
    from regraft.planning.identify import detect, make_plan

    names = list(state_dict)
    _raise(_no_tensors(state_dict, names))
    headers = _headers(state_dict)
    try:
        known = detect(headers, config, "the state dict")
    except (AmbiguousError, UnmatchedKeysError) as error:
        fix = "give the live model, too: model=..."
        raise type(error)(
            each if each.code == "unmatched" else replace(each, fix=fix) for each in error.findings
        ) from None
    plan = make_plan(headers, known, layout, "the state dict")
    return _planned(state_dict, plan, StateDictReport(layout, list(known.evidence)))


def _into_own(state_dict: Mapping[str, Any], model: Any) -> ConvertedStateDict:
    """As a module wants it that only the user's own books know."""
    from regraft.bridges.torch_tensors import place

    _raise(_no_tensors(state_dict, list(state_dict)))
    there = _state_of(model)
    plan, layout = plan_into(
        type(model).__name__, _headers(there), _headers(state_dict), config_of(model)
    )
    made = _planned(state_dict, plan, StateDictReport(layout))
    result = ConvertedStateDict({key: place(made[key], own) for key, own in there.items()})
    result.report = made.report
    return result


def _planned(
    state_dict: Mapping[str, Any], plan: Plan | None, report: StateDictReport
) -> ConvertedStateDict:
    """What a plan makes of a state dict; the same where there is none."""
    result = ConvertedStateDict(
        state_dict if plan is None else apply_plan(plan, list(state_dict.values()))
    )
    _note_rules(plan.fired() if plan is not None else {}, report)
    result.report = report
    return result


def _check(
    target: LiveMapping,
    resolved: Resolved,
    state_dict: Mapping[str, Any],
    left_out: Mapping[str, str],
) -> None:
    """Raise what is wrong with the keys, and with what they stand for."""
    findings = [target.unknown(key) for key in resolved.unmatched if key not in left_out]
    unmatched = bool(findings)
    spoken = [k for part in resolved.parts for k in (*part.keys.values(), *part.doubles)]
    findings += _no_tensors(state_dict, spoken)
    if not findings:
        findings = [
            _two_values(double, kept)
            for part in resolved.parts
            for double, kept in part.doubles.items()
            if not _equal(state_dict[double], state_dict[kept])
        ]
    if findings:
        raise (UnmatchedKeysError if unmatched else BadInputError)(findings)


def _no_tensors(state_dict: Mapping[str, Any], keys: Iterable[str]) -> Iterator[Finding]:
    """What is no tensor whose numbers could be moved; without numbers (on meta) all of them may be, or none."""
    from regraft.bridges.torch_tensors import fault_of, is_empty

    without: list[str] = []
    count = 0
    for key in keys:
        fault = fault_of(state_dict[key])
        if fault is not None:
            message, fix = fault
            yield Finding("not-tensors", message, key=key, fix=fix)
            continue
        count += 1
        if is_empty(state_dict[key]):
            without.append(key)
    if len(without) < count:
        for key in without:
            message = "it is on the meta device and has no numbers, while others have"
            fix = "load its numbers (an offloaded model keeps them elsewhere), or put all on meta"
            yield Finding("not-tensors", message, key=key, fix=fix)


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if getattr(one, "is_meta", False) or getattr(other, "is_meta", False):
        return bool(one.shape == other.shape and one.dtype == other.dtype)
    return bool(one.shape == other.shape and one.dtype == other.dtype and (one == other).all())


def convert_model(
    imported: Imported | Ruled, tensors: Tensors, layout: str, report: StateDictReport
) -> Tensors:
    """One model's tensors in a layout: those that are there already stay, the others are planned.

    Raises ``UnmatchedKeysError`` for a model that no rule speaks of.
    """
    imported.check_known()
    if isinstance(imported, Ruled):
        new, way = imported.convert(tensors, layout)
        _note_rules(way.fired() if way is not None else {}, report)
        return new
    if layout not in (LEFT, RIGHT):
        raise _no_book(imported, layout)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    names, stay = imported.sort(shapes, layout)
    named = dict(zip(names, tensors.values(), strict=True))
    result: Tensors = {key: tensor for key, tensor in named.items() if key in stay}
    go = {key: tensor for key, tensor in named.items() if key not in stay}
    if not go:
        return result
    shapes = {key: tuple(tensor.shape) for key, tensor in go.items()}
    mtp = imported.mtp_among(list(go))
    book = imported.book(list(go), shapes)
    if mtp.groups:
        book = with_mtp(book, mtp)
    edge = Edge.to(book, layout)
    headers = Headers(group_names(go), list(shapes.values()), [str(t.dtype) for t in go.values()])
    plan = build_plan(headers, [edge], where="the state dict")
    fired = plan.fired()
    made = apply_plan(plan, list(go.values()))
    _note_rules(fired, report)
    twice = [key for key in made if key in result]
    _raise(
        Finding("two-homes", "it is there in the old layout and in the new one", key=key)
        for key in twice
    )
    return {**result, **made}


def _note_rules(fired: Mapping[str, int], report: StateDictReport) -> None:
    for rule, times in fired.items():
        if times:
            report.rules[rule] = report.rules.get(rule, 0) + times


def _no_book(imported: Imported, layout: str) -> BadInputError:
    """The error for a layout of somebody's rule book, which transformers knows nothing of."""
    message = f"no rule book leads {imported.name} to {layout}"
    fix = "give the rule book that knows this model, too"
    return BadInputError(Finding("other-layouts", message, fix=fix))


def _headers(tensors: Mapping[str, Any]) -> Headers:
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    return Headers(group_names(tensors), shapes, [str(t.dtype) for t in tensors.values()])


def _raise(findings: Iterable[Finding]) -> None:
    found = list(findings)
    if found:
        unmatched = all(f.code in ("unmatched", "unknown-model") for f in found)
        raise (UnmatchedKeysError if unmatched else BadInputError)(found)
