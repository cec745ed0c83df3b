"""An adapter's tensors that are no LoRA factors: saved weights, biases, token rows, other families' tensors.

Saved weights are base tensors and go through the plan as such. What belongs to a family that has no rule is carried
over where the weight that it stands on is the same in both layouts, and refused otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from regraft.adapters.detect import Known
from regraft.adapters.form import Array
from regraft.arrays.apply import apply_plan
from regraft.dialects.peft.scan import PREFIX, Others, Scan
from regraft.dialects.peft.source import Source
from regraft.dialects.peft.unbound import keeps
from regraft.dialects.peft.writing import Result
from regraft.equation.notation import parse_key
from regraft.errors import BadInputError, Finding, RefusedError
from regraft.names.keys import Group, tail_of
from regraft.planning.build import build_plan
from regraft.planning.plan import Headers, Plan
from regraft.planning.side import Side
from regraft.rules.templates import match_group

TOKENS = ".token_adapter.trainable_tokens_delta"
"""What PEFT puts after an embedding's path for the rows of single tokens."""


@dataclass(frozen=True, slots=True)
class Moved:
    """One such tensor and its names before and after, without PEFT's prefix and without ``base_layer``."""

    old: str
    new: str
    tensor: Array
    wrapped: bool = False
    """Whether the module it belongs to is adapted, too."""
    inside: bool = True
    """Whether it belongs to a module of the base: its key has PEFT's prefix."""
    holder: str = ""
    """What PEFT holds it in, between its module and its own name."""


def move_others(
    scan: Scan, source: Source, known: Known, side: Side, target: str, in_place: bool
) -> list[Moved]:
    """Move everything that is no LoRA factor to a layout; ``in_place`` where names stay as they are.

    Raises ``RefusedError`` for what has no image, ``UnmatchedKeysError`` for keys that nothing explains.
    """
    tensors = list(source.tensors.values())
    outside = [o for o in scan.others if not o.prefix]
    if outside and source.peft_type == "LORA":
        raise BadInputError(
            [
                Finding(
                    "prefix",
                    f"keys of a PEFT adapter begin with {PREFIX!r}",
                    where=source.where,
                    key=o.keys.name(0),
                    fix=f"put {PREFIX!r} before every key, or save the adapter with save_pretrained",
                )
                for o in outside
            ]
        )
    moved = [Moved(name, name, tensors[i], inside=False) for o in outside for name, i in _rows(o)]
    inside = [o for o in scan.others if o.prefix]
    if not inside:
        return moved
    if in_place:
        return moved + [
            Moved(name, name, tensors[i], o.wrapped, holder=o.holder)
            for o in inside
            for name, i in _rows(o)
        ]
    tokens = [o for o in inside if o.keys.template.endswith(_TOKENS)]
    rest = [o for o in inside if o not in tokens]
    _refuse_changed(rest, side, source)
    if tokens:
        moved += _move_tokens(tokens, tensors, source, known, target)
    return moved + (_apply(rest, tensors, source, known, target) if rest else [])


def _rows(other: Others) -> Iterable[tuple[str, int]]:
    return zip(other.keys.names(), other.keys.ids.tolist(), strict=True)


_TOKENS = ".token_adapter.trainable_tokens_delta"
"""Rows of an embedding that are trained (``trainable_token_indices``): they go where the embedding goes, whole."""


def _move_tokens(
    tokens: list[Others], tensors: list[Array], source: Source, known: Known, target: str
) -> list[Moved]:
    groups = [
        Group(o.keys.template.removesuffix(_TOKENS) + ".weight", o.keys.ids, o.keys.numbers)
        for o in tokens
    ]
    plan = _plan(
        Headers(groups, [t.shape for t in tensors], [t.dtype.name for t in tensors]),
        source,
        known,
        target,
    )
    wrapped = {i: o.wrapped for o in tokens for i in o.keys.ids.tolist()}
    place: dict[int, str] = {}
    for entry in plan.entries:
        ids = [int(i) for found in entry.sources for i in found.flat if i >= 0]
        if not entry.moves_nothing:
            raise RefusedError(
                Finding(
                    "no-image",
                    "the embedding is laid out otherwise there, so its rows are no rows any more",
                    where=source.where,
                    key=plan.headers.name(ids[0]).removesuffix(".weight") + _TOKENS,
                    rule=str(entry.rule),
                    fix="merge the adapter into its base and convert the base",
                )
            )
        place.update(zip(ids, entry.keys(entry.written[0]).names(), strict=True))
    for carried in plan.carried:
        place.update(zip(carried.group.ids.tolist(), carried.group.names(), strict=True))
    return [
        Moved(
            plan.headers.name(i).removesuffix(".weight") + _TOKENS,
            name.removesuffix(".weight") + _TOKENS,
            tensors[i],
            wrapped[i],
        )
        for i, name in place.items()
    ]


def rename_tokens(config: Mapping[str, Any], others: Iterable[Moved]) -> dict[str, Any] | None:
    """``trainable_token_indices`` with the names that embeddings have now; ``None`` where it need not change."""
    entries = config.get("trainable_token_indices")
    if not isinstance(entries, dict):
        return None
    result: dict[str, Any] = {}
    others = [m for m in others if m.old.endswith(_TOKENS)]
    for entry, indices in entries.items():
        modules = [
            m.new.removesuffix(_TOKENS)
            for m in others
            if m.old.removesuffix(_TOKENS).endswith(entry)
        ]
        same = all(module.endswith(entry) for module in modules)
        result.update(dict.fromkeys([entry] if same else modules, indices))
    return None if result == entries else result


def token_rows(config: Mapping[str, Any], name: str) -> Any:
    """The rows that ``trainable_token_indices`` names for a tensor of token rows."""
    entries = config.get("trainable_token_indices")
    if not isinstance(entries, dict):
        return entries
    module = name.removesuffix(TOKENS)
    return next((rows for entry, rows in entries.items() if module.endswith(entry)), None)


def _apply(
    inside: list[Others], tensors: list[Array], source: Source, known: Known, target: str
) -> list[Moved]:
    order = [i for o in inside for i in o.keys.ids.tolist()]
    wrapped = [(o.wrapped, o.holder) for o in inside for _ in range(len(o.keys))]
    place = {i: at for at, i in enumerate(order)}
    groups = [
        Group(
            _standing_for(o.keys.template),
            np.array([place[i] for i in o.keys.ids.tolist()]),
            o.keys.numbers,
        )
        for o in inside
    ]
    tokens = {
        place[i] for o in inside if o.keys.template.endswith(TOKENS) for i in o.keys.ids.tolist()
    }
    mine = [tensors[i] for i in order]
    headers = Headers(groups, [t.shape for t in mine], [t.dtype.name for t in mine])
    plan = _plan(headers, source, known, target)
    origin: dict[str, int] = {}
    for entry in plan.entries:
        for term in entry.written:
            keys = entry.keys(term)
            per_loop = len(keys) // len(entry)
            for row in range(len(keys)):
                first = entry.sources[0][row // per_loop].reshape(-1)[0]
                origin[keys.name(row)] = int(first)
    for carried in plan.carried:
        origin.update(zip(carried.group.names(), carried.group.ids.tolist(), strict=True))
    moved = []
    for name, tensor in apply_plan(plan, mine).items():
        at = origin[name]
        old, new = (
            n.removesuffix(".weight") + TOKENS if at in tokens else n
            for n in (headers.name(at), name)
        )
        moved.append(Moved(old, new, tensor, wrapped[at][0], holder=wrapped[at][1]))
    return moved


def _standing_for(template: str) -> str:
    """The base tensor that a tensor goes with: rows of single tokens go with their embedding.

    >>> _standing_for("model.embed_tokens.token_adapter.trainable_tokens_delta")
    'model.embed_tokens.weight'
    """
    return f"{template.removesuffix(TOKENS)}.weight" if template.endswith(TOKENS) else template


def _plan(headers: Headers, source: Source, known: Known, target: str) -> Plan:
    try:
        return build_plan(
            headers,
            known.books,
            target_layout=target,
            scopes=dict(known.scopes),
            where=source.where,
            unmatched_fix=known.unmatched_fix,
        )
    except BadInputError as error:
        if any(finding.code != "missing" for finding in error.findings):
            raise
        raise RefusedError(
            [
                replace(
                    finding,
                    code="partial-weights",
                    message="saved weights (modules_to_save) would be part of a bigger tensor, and "
                    + finding.message,
                    fix="merge the adapter into its base and convert the base",
                )
                for finding in error.findings
            ]
        ) from None


def _refuse_changed(others: Iterable[Others], side: Side, source: Source) -> None:
    """Refuse tensors of families that have no rule where the base weight they stand on changes."""
    rules = side.rules()
    whole = [term.key for _, term, _, _ in rules if term.key is not None]
    opaque = [o for o in others if not any(match_group(key, o.keys) for key in whole)]
    findings = []
    for rule, term, _, _ in rules:
        if term.key is None or keeps(rule):
            continue
        below = parse_key(str(term.key).removesuffix(".weight") + ".{*adapter_tensor}")
        for other in opaque:
            match = match_group(below, other.keys)
            if match is None or not match.rests[-1]:
                continue
            kind = "this variant of LORA" if source.peft_type == "LORA" else source.peft_type
            more = f" ({len(match.rows)} like it)" if len(match.rows) > 1 else ""
            findings.append(
                Finding(
                    "no-image",
                    "the weight that this tensor stands on is laid out otherwise there, and there is no rule "
                    f"that carries {kind} along{more}",
                    where=source.where,
                    key=other.keys.name(int(match.rows[0])),
                    rule=str(rule),
                    fix="merge the adapter into its base and convert the base",
                )
            )
    if findings:
        raise RefusedError(findings)


def write_others(others: Iterable[Moved], result: Result) -> None:
    """Put moved tensors into a result under the names that PEFT gives them."""
    for item in others:
        name = item.new
        if item.inside:
            # A base tensor inside an adapted module stands below its wrappers; an adapter's own does not.
            own = not item.wrapped and item.old == item.new
            name = name if own else _inside_wrappers(name, result.wrappers)
            if item.holder:
                module, _, leaf = name.rpartition(".")
                name = f"{module}.{item.holder}.{leaf}"
            name = PREFIX + name
        result.tensors[name] = item.tensor


def _inside_wrappers(name: str, wrappers: Mapping[str, int]) -> str:
    """A base tensor's name with ``.base_layer`` after every module that is adapted.

    >>> _inside_wrappers("mlp.gate.stats.bias", {"mlp.gate": 1})
    'mlp.gate.base_layer.stats.bias'
    """
    segments = name.split(".")
    result = segments[:1]
    for end in range(1, len(segments)):
        result += ["base_layer"] * wrappers.get(".".join(segments[:end]), 0)
        result.append(segments[end])
    return ".".join(result)


def rename_saved(
    config: Mapping[str, Any], others: Iterable[Moved], there: Side
) -> list[str] | None:
    """``modules_to_save`` with the names that its modules have now; ``None`` where it need not change.

    PEFT saves no module inside another saved one, and an entry that named nothing must name nothing now.
    """
    entries = config.get("modules_to_save")
    if not isinstance(entries, list):
        return None
    others = list(others)
    result: dict[str, list[str]] = {}
    for entry in entries:
        moved = [(owner, m) for m in others if (owner := owner_of(m.old, entry)) is not None]
        if not moved:
            if not there.has_parameters_in(entry):
                result[entry] = []
            continue
        if all(item.old == item.new for _, item in moved):
            result[entry] = sorted({owner for owner, _ in moved})
            continue
        if all(_stays_in(item.new, owner) for owner, item in moved):
            result[entry] = sorted({owner for owner, _ in moved})
            continue
        modules = _modules_of([item.new for _, item in moved])
        if all(module.endswith(entry) for module in modules):
            result[entry] = modules
        else:
            for module in modules:
                name = module if module.endswith(entry) else _ending(module, moved, entry)
                result.setdefault(name, []).append(module)
    for name, modules in list(result.items()):
        if modules and there.names_others(name, modules):
            del result[name]
            for module in modules:
                result.setdefault(module, []).append(module)
    every = {module for modules in result.values() for module in modules}
    kept = [
        name
        for name, modules in result.items()
        if not modules or not all(_is_inside(module, every) for module in modules)
    ]
    return None if kept == entries else kept


def _stays_in(name: str, owner: str) -> bool:
    """Whether a tensor is still in a module that can be saved: a list of numbered modules can not."""
    rest = name.removeprefix(owner + ".")
    return rest != name and not rest.split(".")[0].isdigit()


def _ending(module: str, moved: Iterable[tuple[str, Moved]], entry: str) -> str:
    """As much of a module's path as tells it from modules that are not saved."""
    if any(char.isdigit() for char in entry):
        return module
    for owner, _ in moved:
        if module.startswith(owner + "."):
            return tail_of(owner) + module[len(owner) :]
    return tail_of(module)


def _is_inside(module: str, others: Iterable[str]) -> bool:
    return any(module.startswith(other + ".") for other in others)


def owner_of(key: str, entry: str) -> str | None:
    """The module that an entry of ``modules_to_save`` saves and that a tensor belongs to, as PEFT matches them.

    >>> owner_of("model.layers.0.mlp.gate.weight", "gate")
    'model.layers.0.mlp.gate'
    """
    segments = key.split(".")
    for end in range(1, len(segments)):
        path = ".".join(segments[:end])
        if path.endswith(entry):
            return path
    return None


def _modules_of(names: list[str]) -> list[str]:
    """The modules that hold some tensors, without those inside another one of them."""
    modules = sorted({name.rpartition(".")[0] for name in names})
    outer: list[str] = []
    for module in modules:
        if not outer or not module.startswith(outer[-1] + "."):
            outer.append(module)
    return outer
