"""Which transforms of the registry apply where in a model.

Source: ``transformers.conversion_mapping.get_model_conversion_mapping`` (5.23): every model inside a model is
looked up by class, then by model type; what it gives applies below its own path. Unlike there, a subclass is
looked up through its bases, and scopes are paths in the model, never in what is wrapped around it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from regraft.bridges.transformers.registry import (
    Rename,
    Step,
    Transform,
    look_up,
    read_key_mapping,
    user_registered,
)
from regraft.names.skeleton import Skeleton, SubModel

LEGACY = "legacy"


@dataclass(frozen=True, slots=True, eq=False)
class Scoped:
    """A transform and the path below which it applies."""

    transform: Transform
    path: str
    base: str
    """The root's ``base_model_prefix``: a key may have one more or one less of it."""
    model: SubModel
    parent: SubModel | None = None
    """The model around it."""

    def strip(self, key: str) -> tuple[str, str] | None:
        """The prefix that belongs to the scope, and the rest of the key; ``None`` for a key of another scope."""
        if not self.path:
            return "", key
        base = f"{self.base}." if self.base else ""
        own = self.path.removeprefix(self.base).removeprefix(".") if self.base else self.path
        own = f"{own}." if own else ""
        for prefix in (base + own, own):
            if key.startswith(prefix):
                return prefix, key[len(prefix) :]
        return None

    def below(self, key: str) -> tuple[str, str] | None:
        """The same for a key of the model, which is below the path or is not."""
        if not self.path:
            return "", key
        prefix = f"{self.path}."
        return (prefix, key[len(prefix) :]) if key.startswith(prefix) else None

    def rename(self, key: str) -> tuple[str, int] | None:
        """An old key's new form, and which source matched; ``None`` where nothing does."""
        if self.transform.calls is not None:
            return _call(self.strip(key), self.transform.calls[0])
        return _rename(self.strip(key), self.transform.forward)

    def undo(self, key: str) -> str | None:
        """The old form of a key; ``None`` where it is not one that the transform makes."""
        if self.transform.calls is not None:
            done = _call(self.below(key), self.transform.calls[1])
        else:
            done = _rename(self.below(key), self.transform.backward)
        return done[0] if done is not None else None


def _rename(parts: tuple[str, str] | None, step: Step) -> tuple[str, int] | None:
    found = step.match(parts[1]) if parts is not None else None
    if parts is None or found is None:
        return None
    match, source = found
    target = source if step.paired else 0
    return parts[0] + step.write(parts[1], match, source, target), source


def _call(parts: tuple[str, str] | None, function: Rename) -> tuple[str, int] | None:
    done = function(parts[1]) if parts is not None else None
    return (parts[0] + done[0], done[1]) if parts is not None and done is not None else None


@dataclass(frozen=True, slots=True)
class Applied:
    """The transforms of one model inside the model, for people."""

    path: str
    model: SubModel
    entry: str | None
    why: str
    known: bool = True
    """Whether transformers, or one of its users, knows the class."""


@dataclass(frozen=True, slots=True)
class Scopes:
    """All transforms of a model, in the order in which they are applied."""

    renamings: tuple[Scoped, ...]
    converters: tuple[Scoped, ...]
    legacy: tuple[Scoped, ...]
    """Renamings that only old files need; the way back does not use them."""
    applied: tuple[Applied, ...]

    def all(self) -> list[Transform]:
        """Every transform."""
        return [s.transform for s in (*self.renamings, *self.converters, *self.legacy)]

    def all_own(self) -> list[Transform]:
        """Every transform that is there for this model, and not for old files of any."""
        return [s.transform for s in (*self.renamings, *self.converters)]

    def unknown(self) -> list[Scoped]:
        """The transforms that nobody here can read: what they do to a model is not known."""
        scoped = (*self.renamings, *self.converters, *self.legacy)
        return [s for s in scoped if s.transform.unknown is not None]


def find_scopes(skeleton: Skeleton, key_mapping: dict[str, str] | None = None) -> Scopes:
    """The transforms that apply to a model."""
    root = skeleton.submodels[0]
    scoped: list[Scoped] = []
    applied: list[Applied] = []
    if key_mapping:
        scoped += (
            Scoped(t, "", root.base_model_prefix, root) for t in read_key_mapping(key_mapping)
        )
    claimed: defaultdict[str, list[str]] = defaultdict(list)
    for model in skeleton.submodels:
        entry, why = _entry(model, claimed)
        applied.append(Applied(model.path, model, entry, why, _is_known(model)))
        if entry is None:
            continue
        transforms = look_up(entry) or ()
        around = _around(model, skeleton.submodels)
        scoped += (Scoped(t, model.path, root.base_model_prefix, model, around) for t in transforms)
        by_type = entry == model.model_type
        for name in model.classes[:1]:
            claimed[name].append(model.path)
        if not by_type:
            claimed[entry].append(model.path)
        if by_type and model.model_type:
            claimed[model.model_type].append(model.path)
    legacy = tuple(Scoped(t, "", root.base_model_prefix, root) for t in look_up(LEGACY) or ())
    return Scopes(
        tuple(s for s in scoped if not s.transform.operations),
        tuple(s for s in scoped if s.transform.operations),
        legacy,
        tuple(applied),
    )


def _around(model: SubModel, models: Sequence[SubModel]) -> SubModel | None:
    """The innermost of the models that a model is in."""
    if not model.path:
        return None
    outer = [m for m in models if not m.path or model.path.startswith(m.path + ".")]
    return max(outer, key=lambda m: len(m.path))


def _entry(model: SubModel, claimed: dict[str, list[str]]) -> tuple[str | None, str]:
    """What a model is registered as, and why; ``None`` where nothing applies."""
    own = model.classes[0] if model.classes else None
    registered = _registered(model)
    if not _is_known(model):
        return None, f"{own} is not a class of transformers"
    if own and _covered(claimed.get(own, ()), model.path):
        return None, "a model around it is of the same class"
    for name in dict.fromkeys(filter(None, (own if own in registered else None, model.native))):
        if look_up(name) is not None:
            if _covered(claimed.get(name, ()), model.path):
                return None, f"a model around it is a {name}, too"
            return name, f"its class is {name}" if name == own else f"it is a {name}"
    kind = model.model_type
    if kind and look_up(kind) is not None:
        if _covered(claimed.get(kind, ()), model.path):
            return None, f"a model around it is of the type {kind}, too"
        return kind, f"its model type is {kind}"
    return None, "nothing is registered for it"


def _registered(model: SubModel) -> list[str]:
    """What users registered for a model: by its class, and by its type."""
    return [n for n in (*model.classes[:1], model.model_type) if n and user_registered(n)]


def _is_known(model: SubModel) -> bool:
    return model.native is not None or bool(_registered(model))


def _covered(paths: Iterable[str], path: str) -> bool:
    return any(p == "" or path.startswith(p + ".") for p in paths)


def models_of(applied: Sequence[Applied]) -> list[str]:
    """What applies, in words."""
    return [f"{a.path or '(root)'}: {a.entry} ({a.why})" for a in applied if a.entry is not None]
