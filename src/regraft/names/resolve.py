"""A file's keys, whatever its saver wrapped the model in, as canonical keys of a live model.

Segments are taken away, never text: a prefix that all keys of a model have in common, then what wrappers left inside.
What may go is judged by what then lands in the model. A segment that lands is a genuine name and stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product

from regraft.errors import AmbiguousError, BadInputError, Finding, UnmatchedKeysError
from regraft.names.keys import group_names
from regraft.names.live import Live, LiveModel
from regraft.names.modules import WRAPPER_SEGMENTS
from regraft.report import count_in_words

Lands = Sequence[Callable[[list[str]], list[bool]]]
"""For each model what says of canonical keys, old or new, with or without the ``base_model_prefix`` that only a head
model has, whether the model has a place for them."""

Segments = tuple[str, ...]
Kept = tuple[int, ...]

_DEPTH = 8
"""How many segments a prefix may have."""
_SHARE = 64
"""A prefix that is no model's own path must stand before one key in so many."""
_SPOTS = 6
"""How many wrappers' segments of one key are judged one by one; if there are more, all go or none."""
_PAIRS = {("base_model", "model"), ("token_adapter", "base_layer")}


@dataclass(frozen=True, slots=True)
class Part:
    """The keys of a file that belong to one model."""

    model: int
    prefix: str
    """What was taken away in front, with its dot."""
    keys: Mapping[str, str]
    """Canonical key, in the file's spelling: the file's key."""
    doubles: Mapping[str, str]
    """Further keys of the file: the one in ``keys`` that means the same tensor. Their values must be equal."""
    own_path: bool
    """Whether the prefix is the model's place in the holder, not counting wrappers."""

    def __str__(self) -> str:
        return count_in_words(len(self.keys), "key") + (
            f" under {self.prefix!r}" if self.prefix else ""
        )


@dataclass(frozen=True, slots=True)
class Resolved:
    """What the keys of a file are. Every key is in one of the three."""

    parts: tuple[Part, ...]
    carried: Mapping[str, str]
    """Keys of the holder itself or of adapters in it: the live key."""
    unmatched: tuple[str, ...]


@dataclass(slots=True, eq=False)
class _Node:
    """A prefix, and the keys below it by template: the number of one of them, and of all."""

    prefix: str
    segments: Segments
    templates: dict[int, list[int]]


@dataclass(slots=True, eq=False)
class _Candidate:
    model: int
    node: _Node
    own: bool
    choices: dict[int, Kept] = field(default_factory=dict)
    """For a template: which segments after the prefix are kept."""
    landed: set[int] = field(default_factory=set)
    spots: int = 0
    """How many wrappers' segments had to go behind the prefix; those in front are told at once by the prefix."""

    def rank(self) -> tuple[int, bool, int, int]:
        return (-len(self.landed), not self.own, self.spots, len(self.node.segments))


def resolve(live: Live, file_keys: Sequence[str], lands: Lands) -> Resolved:
    """Find out which key of a file is which tensor of which model.

    Raises:
        BadInputError: the holder has no model.
        UnmatchedKeysError: no key lands in any model.
        AmbiguousError: the keys land as well in another model, or under two prefixes.
    """
    if not live.models:
        raise BadInputError(
            Finding(
                "not-a-model",
                f"a {type(live.root).__name__} that holds no transformers model",
                fix="give a PreTrainedModel, or what holds one",
            )
        )
    keys = list(file_keys)
    pool = _candidates(live, keys, lands)
    chosen: list[_Candidate] = []
    pool.sort(key=_Candidate.rank)
    while pool:
        best = pool.pop(0)
        _check_rivals(live, best, pool, keys)
        chosen.append(best)
        pool = [
            c
            for c in pool
            if c.landed.isdisjoint(best.landed) and (c.model != best.model or (c.own and best.own))
        ]
    parts: list[Part] = []
    used: set[str] = set()
    for candidate in chosen:
        part = _take(candidate, keys, used, lands)
        parts.append(part)
        used.update(part.keys.values(), part.doubles)
    left = [key for key in keys if key not in used]
    carried = dict(_carry(live, left, parts))
    _check_two_homes(live, parts)
    unmatched = tuple(key for key in left if key not in carried)
    if not parts and (unmatched or not keys):
        raise UnmatchedKeysError(_nothing_landed(live, unmatched))
    return Resolved(tuple(parts), carried, unmatched)


def _candidates(live: Live, keys: list[str], lands: Lands) -> list[_Candidate]:
    """Every prefix under which anything lands, judged by one key of each template."""
    codes = [0] * len(keys)
    for code, group in enumerate(group_names(keys)):
        for number in group.ids.tolist():
            codes[number] = code
    wanted = {tuple(path.split(".")) for model in live.models for path in model.paths if path}
    nodes = list(_nodes([key.split(".") for key in keys], codes, wanted))
    result = []
    for number, model in enumerate(live.models):
        paths = {tuple(path.split(".")) if path else () for path in model.paths}
        found = [
            _Candidate(number, node, any(v in paths for v in _variants(node.segments)))
            for node in nodes
        ]
        asked = [
            (candidate, code, rows, option, kept)
            for candidate in found
            for code, rows in candidate.node.templates.items()
            for option, kept in _options(keys[rows[0]], candidate)
        ]
        told = lands[number]([option for _, _, _, option, _ in asked]) if asked else []
        homes: dict[tuple[int, str], int] = {}
        for (candidate, code, rows, option, kept), lands_there in zip(asked, told, strict=True):
            if not lands_there or code in candidate.choices:
                continue
            if homes.setdefault((id(candidate), option), code) != code:
                continue  # another template has this place; taken together they would be doubles
            candidate.choices[code] = kept
            candidate.landed.update(rows)
            below = keys[rows[0]].count(".") + 1 - len(candidate.node.segments)
            candidate.spots += below - len(kept)
        for candidate in found:
            if _reads_as_bare(model, candidate, keys):
                candidate.own = False
        result += [candidate for candidate in found if candidate.landed]
    return result


def _nodes(split: list[list[str]], codes: list[int], wanted: set[Segments]) -> Iterator[_Node]:
    """Prefixes that enough keys have, or that lead to a model, "" first."""
    least = max(1, len(split) // _SHARE)
    roads = {path[:end] for path in wanted for end in range(1, len(path) + 1)}
    stack: list[tuple[Segments, list[int]]] = [((), list(range(len(split))))]
    while stack:
        segments, numbers = stack.pop()
        templates: dict[int, list[int]] = {}
        for number in numbers:
            templates.setdefault(codes[number], []).append(number)
        yield _Node("".join(f"{s}." for s in segments), segments, templates)
        depth = len(segments)
        if depth == _DEPTH:
            continue
        below: dict[str, list[int]] = {}
        for number in numbers:
            if len(split[number]) > depth + 1:
                below.setdefault(split[number][depth], []).append(number)
        for name, inside in reversed(below.items()):
            longer = (*segments, name)
            if len(inside) >= least or any(v in roads for v in _variants(longer)):
                stack.append((longer, inside))


def _reads_as_bare(model: LiveModel, candidate: _Candidate, keys: list[str]) -> bool:
    """Whether a model's own path before the keys may as well be the first segment of keys without any path.

    A head model in a holder's ``model`` may have a ``model`` itself: ``model.layers.0`` is a key of it, and a key of
    its base under the holder's path. Both are the same tensor, but the first reading fits other models, too.
    """
    base = model.submodels[0].base_model_prefix
    prefix = candidate.node.prefix
    if not base or candidate.node.segments[-1:] != (base,):
        return False
    if all(submodel.path != base for submodel in model.submodels):
        return False
    below = (keys[number][len(prefix) :] for number in candidate.landed)
    return not any(key.startswith(f"{base}.") for key in below)


def _options(key: str, candidate: _Candidate) -> Iterator[tuple[str, Kept]]:
    """A file's key as canonical ones, with what is kept: as it is, then with ever more wrappers taken away."""
    segments = tuple(key[len(candidate.node.prefix) :].split("."))
    for kept in _kept(_shape(segments)):
        yield ".".join(segments[i] for i in kept), kept


def _variants(segments: Segments) -> list[Segments]:
    return [tuple(segments[i] for i in kept) for kept in _kept(_shape(segments))]


def _shape(segments: Segments) -> Segments:
    """Only what matters to wrappers, so that it can be remembered."""
    known = WRAPPER_SEGMENTS | {"base_model", "model", "token_adapter"}
    return tuple(s if s in known else "" for s in segments)


@lru_cache(maxsize=4096)
def _kept(segments: Segments) -> tuple[Kept, ...]:
    """Ways to leave out wrappers' segments, as numbers of those to keep; fewest left out first.

    >>> _kept(("module", "", "base_model", "model"))[:3]
    ((0, 1, 2, 3), (1, 2, 3), (0, 1, 3))
    """
    spots: list[tuple[int, tuple[int, ...]]] = []
    at = 0
    while at < len(segments):
        pair = segments[at : at + 2] in _PAIRS
        if segments[at] in WRAPPER_SEGMENTS:
            spots.append((at, (0, 1)))
        elif segments[at] == "base_model":
            spots.append((at, (0, 1, 2) if pair else (0, 1)))
        elif pair:
            spots.append((at, (0, 2)))
        at += 2 if pair else 1
    choices: set[Kept] = set()
    if len(spots) > _SPOTS:
        ways = [tuple(min(options) for _, options in spots), tuple(max(o) for _, o in spots)]
    else:
        ways = list(product(*(options for _, options in spots)))
    for way in ways:
        gone = {at + i for (at, _), n in zip(spots, way, strict=True) for i in range(n)}
        choices.add(tuple(i for i in range(len(segments)) if i not in gone))
    return tuple(sorted(choices, key=lambda kept: (-len(kept), [-i for i in kept])))


def _check_rivals(live: Live, best: _Candidate, pool: list[_Candidate], keys: list[str]) -> None:
    """Refuse a choice between equals: the same keys for another model, or other keys for the same one."""
    equals = [c for c in pool if len(c.landed) == len(best.landed) and c.own == best.own]
    others = [c for c in equals if c.model != best.model and not c.landed.isdisjoint(best.landed)]
    if others:
        named = [best, *others]
        places = " and ".join(dict.fromkeys(repr(live.models[c.model].path) for c in named))
        told = f"{len(best.landed)} keys fit" if len(best.landed) > 1 else "the key fits"
        raise AmbiguousError(
            Finding(
                "two-models",
                f"{told} the models {places} as well as each other",
                key=keys[min(best.landed)],
                fix="put the path of the one that is meant before the keys, or give that model alone",
            )
        )
    twins = [
        c
        for c in equals
        if c.model == best.model and not best.own and c.landed.isdisjoint(best.landed)
    ]
    if twins:
        prefixes = " and ".join(dict.fromkeys(repr(c.node.prefix) for c in [best, *twins]))
        raise AmbiguousError(
            Finding(
                "two-prefixes",
                f"the keys under {prefixes} are a model each, and there is one to take them",
                key=keys[min(best.landed)],
                fix="give only the keys of the one that is meant",
            )
        )


def _take(candidate: _Candidate, keys: list[str], used: set[str], lands: Lands) -> Part:
    """All keys below the candidate's prefix that land, each by itself."""
    first: list[tuple[str, str]] = []
    for code, rows in candidate.node.templates.items():
        kept = candidate.choices.get(code)
        if kept is not None:
            for number in rows:
                segments = keys[number][len(candidate.node.prefix) :].split(".")
                text = ".".join(segments[i] for i in kept)
                first.append((keys[number], text))
    told = lands[candidate.model]([option for _, option in first])
    homes = {key: option for (key, option), there in zip(first, told, strict=True) if there}
    rest = [
        (keys[number], option)
        for rows in candidate.node.templates.values()
        for number in rows
        if keys[number] not in homes
        for option, _ in _options(keys[number], candidate)
    ]
    told = lands[candidate.model]([option for _, option in rest]) if rest else []
    for (key, option), there in zip(rest, told, strict=True):
        if there:
            homes.setdefault(key, option)
    found: dict[str, str] = {}
    doubles: dict[str, str] = {}
    for key in keys:
        if key in homes and key not in used:
            other = found.setdefault(homes[key], key)
            if other != key:
                doubles[key] = other
    return Part(candidate.model, candidate.node.prefix, found, doubles, candidate.own)


def _carry(live: Live, keys: list[str], parts: list[Part]) -> Iterator[tuple[str, str]]:
    """Keys of what is no model's, each with the live key that is meant."""
    literal = {**live.own, **live.adapters}
    # Around one tensor PEFT nests adapters; how deep tells them apart.
    places: dict[tuple[str, int], list[str]] = {}
    for key, canonical in literal.items():
        places.setdefault((canonical, key.split(".").count("base_layer")), []).append(key)
    for key in keys:
        if key in literal:
            yield key, key
            continue
        segments = tuple(key.split("."))
        depth = segments.count("base_layer")
        names = [".".join(variant) for variant in _variants(segments)]
        for part in parts:
            path = live.models[part.model].path
            if key.startswith(part.prefix):
                rest = tuple(key[len(part.prefix) :].split("."))
                front = f"{path}." if path else ""
                names += [front + ".".join(variant) for variant in _variants(rest)]
        found = dict.fromkeys(k for name in names for k in places.get((name, depth), ()))
        if len(found) == 1:
            yield key, next(iter(found))


def _check_two_homes(live: Live, parts: list[Part]) -> None:
    findings = [
        Finding(
            "two-homes",
            f"this key is one of the model {live.models[part.model].path!r} without its path, "
            "and one of the holder itself",
            key=key,
            fix="put the model's path before its keys",
        )
        for part in parts
        if not part.own_path
        for key in part.keys.values()
        if key in live.own or key in live.adapters
    ]
    if findings:
        raise AmbiguousError(findings)


def _nothing_landed(live: Live, keys: Sequence[str]) -> Finding:
    names = ", ".join(
        model.submodels[0].classes[0] + (f" at {model.path!r}" if model.path else "")
        for model in live.models
    )
    if not keys:
        return Finding("empty", f"there are no keys to be those of {names}", fix="save it again")
    shown = ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
    told = "this is not" if len(keys) == 1 else f"none of the {len(keys)} keys ({shown}) is"
    return Finding(
        "no-home",
        f"{told} one of {names}, under any prefix",
        key=keys[0],
        fix="check that the file is of this model",
    )
