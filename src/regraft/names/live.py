"""Live models: which models a holder holds, and what each of their tensors is called there.

The canonical name of a tensor says where it stands in its model. It is found by walking modules, not by reading names,
so no wrapper has a part in it, wherever it stands, and a child that is called like a wrapper keeps its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from regraft.errors import BadInputError, Finding
from regraft.names.modules import Facts, facts_of, is_module
from regraft.names.skeleton import Skeleton, SubModel


@dataclass(frozen=True, eq=False)
class LiveModel:
    """A transformers model that is in no other one."""

    path: str
    """Where it stands in the holder, without wrappers; "" if there are only wrappers around it."""
    paths: tuple[str, ...]
    """All such places, if the holder holds it more than once."""
    live_path: str
    """The same as ``path`` as ``get_submodule`` takes it."""
    module: Any
    submodels: tuple[SubModel, ...]
    """The models in it; itself first."""
    keys: LiveKeys
    """For each canonical key: the keys of the holder's state dict. More than one if a module stands in more places."""
    modules: Mapping[str, Any]
    """The module that each parameter is of."""
    computed: frozenset[str]
    """Buffers that are not persistent."""

    @cached_property
    def skeleton(self) -> Skeleton:
        """What is known of it without its weights. Shapes are read when this is first asked for."""
        return _skeleton(self.submodels, self.keys.tensors, self.modules, self.computed)


@dataclass(frozen=True, slots=True)
class Live:
    """A holder of models: a module with or without wrappers, or an object that has modules as attributes.

    ``own`` and ``adapters`` map the live keys of what is no model's, or PEFT's, to canonical names under the holder.
    Weights that ``modules_to_save`` copied are the adapters'; those of the base are in ``original_module``.
    """

    root: Any
    models: tuple[LiveModel, ...]
    own: Mapping[str, str]
    adapters: Mapping[str, str]


class LiveKeys(Mapping[str, tuple[str, ...]]):
    """Canonical keys to live ones. Only those that differ in more than the model's live path are held."""

    __slots__ = ("_others", "_prefix", "tensors")

    def __init__(
        self, tensors: Mapping[str, Any], prefix: str, others: dict[str, tuple[str, ...]]
    ) -> None:
        self.tensors, self._prefix, self._others = tensors, prefix, others

    def __getitem__(self, key: str) -> tuple[str, ...]:
        other = self._others.get(key)
        if other is not None:
            return other
        if key not in self.tensors:
            raise KeyError(key)
        return (self._prefix + key,)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@dataclass(slots=True, eq=False)
class _Model:
    """A model that is being walked. Prefixes are paths with a dot behind."""

    module: Any
    path: str
    live: str
    paths: list[str]
    submodels: list[SubModel] = field(default_factory=list)
    tensors: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, Any] = field(default_factory=dict)
    computed: set[str] = field(default_factory=set)
    others: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def freeze(self) -> LiveModel:
        keys = LiveKeys(self.tensors, self.live, self.others)
        paths = tuple(dict.fromkeys(path[:-1] for path in self.paths))
        models = tuple(self.submodels)
        return LiveModel(
            self.path[:-1],
            paths,
            self.live[:-1],
            self.module,
            models,
            keys,
            self.modules,
            frozenset(self.computed),
        )


_Shape = tuple[int, ...]
_Shapes = dict[int, dict[str, _Shape]]


def _skeleton(
    submodels: tuple[SubModel, ...],
    tensors: Mapping[str, Any],
    modules: Mapping[str, Any],
    computed: frozenset[str],
) -> Skeleton:
    """Shapes and kinds of what a walk found: tensors, or the shapes that they have when they are whole."""
    shapes: dict[str, _Shape] = {}
    kinds: dict[str, str] = {}
    direct: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        shape = shapes[key] = tensor if type(tensor) is tuple else tuple(tensor.shape)
        dims = len(shape)
        module = modules.get(key)
        if module is None or dims not in (2, 3):
            continue
        kind = facts_of(type(module)).kind
        path, _, name = key.rpartition(".")
        if kind is not None:
            if dims == 2 and kind != "any" and name == "weight":
                kinds[key] = kind
            continue
        direct.setdefault(path, []).append(name)
        if dims == 2:
            kinds[key] = "parameter"
        else:
            turned = getattr(module, "is_transposed", None) is True
            kinds[key] = "experts-transposed" if turned else "experts"
    parameters = {path: tuple(names) for path, names in direct.items()}
    return Skeleton(submodels, shapes, kinds, parameters, computed)


def walk(root: Any) -> Live:
    """Find every model in a holder, and name its tensors.

    Takes no tensor in hand but for its shape, gathers nothing and calls no hook. Keys are those that torch's own
    ``load_state_dict`` takes.
    """
    return _Walk().run(root)


def skeleton_of(model: Any) -> Skeleton:
    """The skeleton of one transformers model, live or on the meta device, with any wrappers.

    Raises:
        BadInputError: it is none, or a holder of something else besides.
    """
    live = walk(model)
    if len(live.models) == 1 and not live.models[0].path:
        return live.models[0].skeleton
    found = ", ".join(model.path for model in live.models)
    raise BadInputError(
        Finding(
            "not-a-model",
            f"a {type(model).__name__} is no transformers model"
            + (f", but holds some: {found}" if found else ""),
            fix="give a PreTrainedModel",
        )
    )


def skeleton_of_any(module: Any) -> Skeleton:
    """The skeleton of a transformers model, or of a module of any other class, which has no models in it."""
    live = walk(module)
    if len(live.models) == 1 and not live.models[0].path:
        return live.models[0].skeleton
    modules = {
        f"{path}.{name}" if path else name: each
        for path, each in module.named_modules()
        for name in each._parameters
    }
    return _skeleton((), module.state_dict(), modules, frozenset())


@dataclass(frozen=True, slots=True, eq=False)
class _Rest:
    """A module that is no model's, or is one in another place."""

    module: Any
    live: str
    canonical: str
    adapter: bool


class _Walk:
    """One walk. All prefixes are paths with a dot behind; those called canonical begin at the model, if in one."""

    def __init__(self) -> None:
        self.models: dict[int, _Model] = {}
        self.flat: _Shapes = {}
        self.rest: list[_Rest] = []
        self.own: dict[str, str] = {}
        self.adapters: dict[str, str] = {}

    def run(self, root: Any) -> Live:
        for prefix, module in walk_modules(root):
            self.visit(module, prefix, None, prefix)
        if self.rest:
            self.settle()
        models = tuple(model.freeze() for model in self.models.values())
        return Live(root, models, self.own, self.adapters)

    def visit(self, module: Any, canonical: str, model: _Model | None, live: str | None) -> None:
        """Walk in state dict order. ``live`` is left out where it is the model's with ``canonical`` behind."""
        inside = module.__dict__
        children = inside["_modules"]
        facts = facts_of(type(module))
        if facts.wrapped:
            wrapped = _wrapped(facts.wrapped, children)
            if wrapped is not None:
                self.through(module, wrapped, facts, canonical, model, live)
                return
        if facts.classes is not None:
            if model is None:
                assert live is not None
                known = self.models.get(id(module))
                if known is not None:
                    known.paths.append(canonical)
                    self.spread(module, live, canonical, adapter=False)
                    return
                model = _Model(module, canonical, live, [canonical])
                self.models[id(module)] = model
                canonical, live = "", None
            model.submodels.append(_submodel(module, canonical[:-1]))
        if model is None:
            assert live is not None
            self.rest.append(_Rest(module, live, canonical, adapter=False))
        else:
            parameters = inside["_parameters"]
            if self.flat:
                parameters = dict(_parameters(module, self.flat))
            for name, parameter in parameters.items():
                if parameter is not None:
                    key = canonical + name
                    model.tensors[key] = parameter
                    model.modules[key] = module
                    if live is not None:
                        model.others[key] = (live + name,)
            if inside["_buffers"]:
                passing = inside["_non_persistent_buffers_set"]
                model.computed.update(canonical + name for name in passing)
                for name, buffer in _buffers(module):
                    model.tensors[canonical + name] = buffer
                    if live is not None:
                        model.others[canonical + name] = (live + name,)
            if facts.extra_state:
                before = model.live + canonical if live is None else live
                self.own[f"{before}_extra_state"] = f"{model.path}{canonical}_extra_state"
        for name, child in children.items():
            if child is not None:
                below = None if live is None else f"{live}{name}."
                self.visit(child, f"{canonical}{name}.", model, below)

    def through(
        self,
        module: Any,
        wrapped: str,
        facts: Facts,
        canonical: str,
        model: _Model | None,
        live: str | None,
    ) -> None:
        """Walk what a wrapper stands for; what else it has is the adapters', the holder's, or another model."""
        inside = module.__dict__
        if facts.hidden and "_handle" in inside:
            _read_flat(inside["_handle"], self.flat)
        before = model.live + canonical if model is not None and live is None else str(live)
        full = canonical if model is None else model.path + canonical
        self.rest.append(_Rest(module, before, full, facts.adapter))
        for name, child in inside["_modules"].items():
            if child is None:
                continue
            below = f"{before}{name}."
            if name == wrapped:
                self.visit(child, canonical, model, live if facts.hidden else below)
            elif model is None and not facts.adapter:
                self.visit(child, f"{canonical}{name}.", None, below)
            else:
                self.spread(child, below, f"{full}{name}.", adapter=facts.adapter)

    def spread(self, module: Any, live: str, canonical: str, *, adapter: bool) -> None:
        """Note down a module that is no model's, and all inside."""
        children = module.__dict__["_modules"]
        facts = facts_of(type(module))
        wrapped = _wrapped(facts.wrapped, children)
        mine = adapter or facts.adapter
        self.rest.append(_Rest(module, live, canonical, mine))
        for name, child in children.items():
            if child is not None and name == wrapped:
                below = live if facts.hidden else f"{live}{name}."
                self.spread(child, below, canonical, adapter=adapter)
            elif child is not None:
                self.spread(child, f"{live}{name}.", f"{canonical}{name}.", adapter=mine)

    def settle(self) -> None:
        """Take down what is no model's; a module of a model in another place gives the model more live keys."""
        tensors = []
        for entry in self.rest:
            names = [name for name, _ in _parameters(entry.module, self.flat)]
            names += [name for name, _ in _buffers(entry.module)]
            if facts_of(type(entry.module)).extra_state:
                names.append("_extra_state")
            if names:
                tensors.append((entry, names))
        places: dict[int, tuple[_Model, str]] = {}
        wanted = {id(entry.module) for entry, _ in tensors}
        if wanted:
            for model in self.models.values():
                _find(model.module, "", model, wanted, places)
        for entry, names in tensors:
            bucket = self.adapters if entry.adapter else self.own
            known = places.get(id(entry.module))
            for name in names:
                live = entry.live + name
                if known is not None and known[1] + name in known[0].tensors:
                    model, key = known[0], known[1] + name
                    model.others[key] = (*model.others.get(key, (model.live + key,)), live)
                else:
                    bucket[live] = entry.canonical + name


def _find(
    module: Any, canonical: str, model: _Model, wanted: set[int], places: dict[int, Any]
) -> None:
    """Where wanted modules stand in a model."""
    children = module.__dict__["_modules"]
    wrappers = facts_of(type(module)).wrapped
    wrapped = _wrapped(wrappers, children) if wrappers else None
    if wrapped is not None:
        _find(children[wrapped], canonical, model, wanted, places)
        return
    if id(module) in wanted:
        places.setdefault(id(module), (model, canonical))
    for name, child in children.items():
        if child is not None:
            _find(child, f"{canonical}{name}.", model, wanted, places)


def _wrapped(names: tuple[str, ...], children: Mapping[str, Any]) -> str | None:
    for name in names:
        if children.get(name) is not None:
            return name
    return None


def walk_modules(root: Any) -> Iterator[tuple[str, Any]]:
    """The modules of a holder with their prefixes: itself, or what it has as attributes or items."""
    if is_module(root):
        yield "", root
        return
    inside = root if isinstance(root, Mapping | list | tuple) else getattr(root, "__dict__", {})
    for name, value in _items(inside):
        if is_module(value):
            yield f"{name}.", value
        elif isinstance(value, Mapping | list | tuple):
            for part, item in _items(value):
                if is_module(item):
                    yield f"{name}.{part}.", item


def _items(values: Mapping[Any, Any] | Sequence[Any]) -> Iterator[tuple[str, Any]]:
    pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
    for name, value in pairs:
        yield str(name), value


def _parameters(module: Any, flat: _Shapes) -> list[tuple[str, Any]]:
    """A module's own parameters; of those that FSDP has made flat their own shapes."""
    parameters = module.__dict__["_parameters"]
    if flat:
        shapes = flat.get(id(module), {})
        names = [name for name in dict.fromkeys([*shapes, *parameters]) if name != "_flat_param"]
        return [
            (name, shapes.get(name) or parameters[name])
            for name in names
            if name in shapes or parameters[name] is not None
        ]
    return [(name, p) for name, p in parameters.items() if p is not None]


def _buffers(module: Any) -> Iterator[tuple[str, Any]]:
    inside = module.__dict__
    if inside["_buffers"]:
        passing = inside["_non_persistent_buffers_set"]
        for name, buffer in inside["_buffers"].items():
            if buffer is not None and name not in passing:
                yield name, buffer


def _read_flat(handle: Any, shapes: _Shapes) -> None:
    """The parameters that FSDP1 put into one flat one (torch/distributed/fsdp/_flat_param.py)."""
    if handle is None:
        return
    flat = handle.flat_param
    whole = {}
    for info, shape in zip(flat._param_infos, flat._shapes, strict=True):
        whole[id(info.module), info.param_name] = tuple(shape)
        shapes.setdefault(id(info.module), {})[info.param_name] = tuple(shape)
    for info in flat._shared_param_infos:
        shape = whole[id(info.prim_module), info.prim_param_name]
        shapes.setdefault(id(info.module), {})[info.param_name] = shape


def _submodel(module: Any, path: str) -> SubModel:
    facts = facts_of(type(module))
    assert facts.classes is not None
    config = getattr(module, "config", None)
    get = config.get if isinstance(config, Mapping) else partial(getattr, config)
    model_type = get("model_type", None)
    ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    return SubModel(
        path=path,
        classes=facts.classes,
        native=facts.native,
        model_type=model_type or None,
        config=config,
        base_model_prefix=getattr(module, "base_model_prefix", "") or "",
        ignored=tuple(ignored),
    )
