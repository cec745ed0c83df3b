"""State dicts from one layout to another, around live models."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regraft.arrays.apply import apply_plan
from regraft.bridges.transformers.imported import Imported
from regraft.bridges.transformers.making import RIGHT
from regraft.errors import AmbiguousError, BadInputError, Finding, RegraftError, UnmatchedKeysError
from regraft.layouts import parse_layout
from regraft.live.mapping import Mapping as LiveMapping
from regraft.live.mapping import mapping
from regraft.names.keys import group_names
from regraft.names.patterns import patterns
from regraft.names.resolve import Part, Resolved
from regraft.plan.build import build_plan
from regraft.plan.plan import Headers

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
    """How often each rule fired."""
    carried: list[str] = field(default_factory=list)
    """Keys of the holder itself, or of adapters in it."""
    kept: list[str] = field(default_factory=list)
    """Live keys that the source does not speak of; they have the values that the model has."""
    missing: list[str] = field(default_factory=list)
    """Those of them that are a model's own weights."""

    def __str__(self) -> str:
        lines = [f"to {self.layout}: " + "; ".join(self.prefixes)]
        lines += [f"  {rule}: {times} times" for rule, times in self.rules.items()]
        for title, names in (("carried over", self.carried), ("kept as they are", self.kept)):
            lines += [f"  {title}: {pattern} ({count})" for pattern, count in patterns(names)]
        return "\n".join(lines)


def convert_state_dict(
    state_dict: Mapping[str, Any], *, to: Any, model: Any = None
) -> ConvertedStateDict:
    """A state dict in another layout, or as a live model wants it.

    Args:
        state_dict: names and tensors, in the layout of either version, bare or with whatever prefixes and wrappers'
            segments were around the model when it was saved.
        to: a live model or a holder of some: the result has the keys of its state dict, and fits
            ``to.load_state_dict``. Or a layout's name: the result has each model's own keys, below its place in the
            holder if the source had them so or there is more than one, and no wrapper's segments.
        model: with a layout's name, the live model or holder that the state dict is of; without it, the names must
            tell which rule book is meant.

    Returns:
        The tensors; ``report`` says what was done. What the source does not speak of (a value head, an adapter, a
        buffer) has the live model's own values, and is named in ``report.kept``; a weight of the model among them is
        warned of.

    Raises:
        UnmatchedKeysError: keys that no model has a place for.
        AmbiguousError: keys with two homes.
        BadInputError: an incomplete group (7 of 8 experts), or shapes that do not fit.
    """
    if isinstance(to, str):
        layout = parse_layout(to).name
        return (
            _without_model(state_dict, layout)
            if model is None
            else _named(state_dict, layout, mapping(model))
        )
    if model is not None:
        raise BadInputError(
            Finding("option", "model is for a layout's name in `to`", fix="give only `to`")
        )
    return _fitted(state_dict, mapping(to))


def _fitted(state_dict: Mapping[str, Any], target: LiveMapping) -> ConvertedStateDict:
    """As a live model wants it."""
    from regraft.bridges.torch_tensors import place, state_of, whole

    resolved = _resolve(target, state_dict)
    report = StateDictReport(RIGHT, carried=list(resolved.carried))
    made: Tensors = {}
    findings: list[Finding] = []
    for part in resolved.parts:
        live = target.live.models[part.model]
        report.prefixes.append(f"{live.path or 'the model'}: {part}")
        tensors = {k: whole(state_dict[key]) for k, key in part.keys.items()}
        new = _collect(findings, target.imported[part.model], tensors, RIGHT, report)
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
    _raise(findings)
    own = state_of(target.live.root)
    result = ConvertedStateDict()
    for key, there in own.items():
        if key in made:
            result[key] = place(made.pop(key), there)
        else:
            result[key] = there
            report.kept.append(key)
    for key, tensor in made.items():
        result[key] = tensor
    report.missing = _missing(target, report.kept, own)
    if report.missing:
        shown = ", ".join(pattern for pattern, _ in patterns(report.missing))
        warnings.warn(
            f"{len(report.missing)} weights of the model are not in the state dict and keep their values: {shown}",
            stacklevel=3,
        )
    result.report = report
    return result


def _named(state_dict: Mapping[str, Any], layout: str, source: LiveMapping) -> ConvertedStateDict:
    """Each model's own keys in a layout."""
    from regraft.bridges.torch_tensors import whole

    resolved = _resolve(source, state_dict)
    report = StateDictReport(layout)
    result = ConvertedStateDict()
    findings: list[Finding] = []
    several = len(source.live.models) > 1
    for part in resolved.parts:
        live = source.live.models[part.model]
        report.prefixes.append(f"{live.path or 'the model'}: {part}")
        tensors = {k: whole(state_dict[key]) for k, key in part.keys.items()}
        new = _collect(findings, source.imported[part.model], tensors, layout, report)
        front = f"{live.path}." if live.path and (several or _below(part, live.path)) else ""
        result.update((front + key, tensor) for key, tensor in new.items())
    names = {**source.live.own, **source.live.adapters}
    for key, place in resolved.carried.items():
        name = names.get(place, place)
        result[name] = state_dict[key]
        report.carried.append(name)
    _raise(findings)
    result.report = report
    return result


def _below(part: Part, path: str) -> bool:
    """Whether a part's keys stood below their model's place in the holder."""
    return part.own_path and path.split(".")[0] in part.prefix.split(".")


def _without_model(state_dict: Mapping[str, Any], layout: str) -> ConvertedStateDict:
    """By the rule library alone."""
    from regraft.checkpoints.detect import detect, make_plan

    names = list(state_dict)
    headers = _headers(state_dict)
    known = detect(headers, None, "the state dict")
    plan = make_plan(headers, known, layout, "the state dict")
    result = ConvertedStateDict(
        state_dict if plan is None else apply_plan(plan, [state_dict[n] for n in names])
    )
    result.report = StateDictReport(layout, list(known.evidence), plan.fired() if plan else {})
    return result


def _resolve(target: LiveMapping, state_dict: Mapping[str, Any]) -> Resolved:
    resolved = target.resolve(list(state_dict))
    findings = [target.unknown(key) for key in resolved.unmatched]
    for part in resolved.parts:
        for double, kept in part.doubles.items():
            if not _equal(state_dict[double], state_dict[kept]):
                message = f"it is the same tensor as {kept}, and has other values"
                findings.append(Finding("two-values", message, key=double, fix="keep one of them"))
    if findings:
        raise (UnmatchedKeysError if resolved.unmatched else BadInputError)(findings)
    return resolved


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    return bool(one.shape == other.shape and one.dtype == other.dtype and (one == other).all())


def _collect(
    findings: list[Finding],
    imported: Imported,
    tensors: Tensors,
    layout: str,
    report: StateDictReport,
) -> Tensors:
    try:
        return _convert(imported, tensors, layout, report)
    except RegraftError as error:
        findings += error.findings
        return {}


def _convert(imported: Imported, tensors: Tensors, layout: str, report: StateDictReport) -> Tensors:
    """One model's tensors in a layout: those that are there already stay, the others are planned."""
    own = imported.as_own(list(tensors))
    named = {
        key if name is None else name: tensors[key] for key, name in zip(tensors, own, strict=True)
    }
    here = {name for name in own if name is not None}
    here -= _still_turned(imported, {name: named[name] for name in here & imported.turned})
    result: Tensors = {}
    if layout == RIGHT:
        result = {key: tensor for key, tensor in named.items() if key in here}
        go = {key: tensor for key, tensor in named.items() if key not in here}
    elif here & imported.changed:
        go = named
    else:
        return dict(tensors)
    if not go:
        return result
    shapes = {key: tuple(tensor.shape) for key, tensor in go.items()}
    book = imported.book(list(go), shapes)
    plan = build_plan(_headers(go), [book], target_layout=layout, where="the state dict")
    for rule, times in plan.fired().items():
        report.rules[rule] = report.rules.get(rule, 0) + times
    made = apply_plan(plan, list(go.values()))
    twice = [key for key in made if key in result]
    _raise(
        Finding("two-homes", "it is there in the old layout and in the new one", key=key)
        for key in twice
    )
    return {**result, **made}


def _still_turned(imported: Imported, tensors: Tensors) -> set[str]:
    """Tensors that are called as they always were, and have their old shape.

    Raises ``AmbiguousError`` where all of them are square in the dims that changed places.
    """
    shapes = imported.skeleton.tensors
    old = {key for key, tensor in tensors.items() if tuple(tensor.shape) != tuple(shapes[key])}
    square = {key for key in tensors if len(set(shapes[key][-2:])) == 1}
    if old:
        return old | square
    if tensors and len(square) == len(tensors):
        raise AmbiguousError(
            Finding(
                "which-layout",
                "its name is the same in both layouts, and it is square, so its shape does not tell either",
                key=next(iter(tensors)),
                fix="convert the file first, and say with --from which layout it is in",
            )
        )
    return set()


def _headers(tensors: Mapping[str, Any]) -> Headers:
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    return Headers(group_names(tensors), shapes, [str(t.dtype) for t in tensors.values()])


def _missing(target: LiveMapping, kept: Sequence[str], own: Mapping[str, Any]) -> list[str]:
    """Weights of a model that nothing in the source speaks of, ties and buffers left out."""
    from regraft.bridges.torch_tensors import parameters_of

    weights = parameters_of(target.live.root)
    quiet = set(target.live.own) | set(target.live.adapters)
    alone = set(kept)
    spoken = {weights.get(key) for key in own if key not in alone}
    return [
        key for key in kept if key not in quiet and key in weights and weights[key] not in spoken
    ]


def _raise(findings: Iterable[Finding]) -> None:
    found = list(findings)
    if found:
        unmatched = all(f.code == "unmatched" for f in found)
        raise (UnmatchedKeysError if unmatched else BadInputError)(found)
