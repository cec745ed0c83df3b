"""Small models for probes: names, shapes and kinds of a model's tensors, in either layout, from its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from regraft.bridges.transformers.building import build, known_classes, make_config, model_class
from regraft.bridges.transformers.imported import import_model
from regraft.bridges.transformers.release import installed_layout
from regraft.errors import BadInputError, Finding
from regraft.layouts.graph import Edge
from regraft.names.keys import group_names
from regraft.names.live import skeleton_of
from regraft.planning.build import build_plan
from regraft.planning.model import ModelConfig, Scope
from regraft.planning.plan import Headers


@dataclass(frozen=True, slots=True)
class Outline:
    """A model without weights."""

    shapes: dict[str, tuple[int, ...]]
    kinds: dict[str, str]
    """Of the tensors that PEFT can adapt."""
    config: dict[str, Any]
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Modules and their own parameters, in the order in which their class registers them, where it was asked."""
    from_headers: bool = False
    """Whether names and shapes are those of a checkpoint's headers: then nobody knows whether there is such a model."""


def default_config(name: str) -> dict[str, Any]:
    """The config of a class of transformers, as it is by default.

    Raises ``BadInputError`` where transformers has no such class.
    """
    cls = model_class(name)
    if cls is None:
        raise BadInputError(
            Finding(
                "probe",
                f"transformers has no class {name}, and there is no file of that name",
                fix="give a config.json, a checkpoint, or a class such as LlamaForCausalLM",
            )
        )
    data: dict[str, Any] = cls.config_class().to_dict()
    return {**data, "architectures": [name]}


def outline_of(data: Mapping[str, Any], where: str, layout: str | None) -> Outline:
    """The tensors of the model that a config describes, named as a layout names them; as files are usually by default.

    Raises ``BadInputError`` where transformers cannot build it.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    model = ModelConfig(data, where)
    names = known_classes(model, model.architectures())
    kind = model.model_type or ""
    for table in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES):
        found = table.get(kind)
        names += [found] if isinstance(found, str) else list(found or ())
    if not names:
        message = f"the installed transformers has no model of type {kind!r}"
        raise BadInputError(
            Finding(
                "probe",
                message,
                where=where,
                fix="give a checkpoint of it, whose headers are enough: --headers CHECKPOINT",
            )
        )
    try:
        built = build(model_class(names[0]), make_config(kind, dict(data)))
        skeleton = skeleton_of(built)
    except BadInputError:
        raise
    except Exception as error:
        message = f"{names[0]} cannot be built this small: {str(error)[:300]}"
        fix = "set the fields that must fit together with --set"
        raise BadInputError(Finding("probe", message, where=where, fix=fix)) from error
    config = {**data, "architectures": [names[0]]}
    shapes, kinds = dict(skeleton.tensors), dict(skeleton.kinds)
    if layout == installed_layout():
        return Outline(shapes, kinds, config, dict(skeleton.parameters))
    book = import_model(skeleton).book()
    headers = Headers(group_names(list(shapes)), list(shapes.values()), ["F32"] * len(shapes))
    plan = build_plan(
        headers, [Edge.to(book, book.left)], scopes={book.name: Scope(data)}, where=where
    )
    old_shapes: dict[str, tuple[int, ...]] = {}
    old_kinds: dict[str, str] = {}
    for entry in plan.entries:
        for term, role in zip(entry.written, entry.written_kinds, strict=True):
            for key in entry.keys(term).names():
                old_shapes[key] = entry.shape(term)
                old_kinds[key] = role
    carried = {key: None for each in plan.carried for key in each.group.names()}
    for key in carried:
        old_shapes[key] = shapes[key]
        old_kinds[key] = kinds.get(key, "any")
    # A module of which everything is carried is the class's own: it registers its parameters as there.
    parameters = {
        module: names
        for module, names in skeleton.parameters.items()
        if all(f"{module}.{name}" in carried for name in names)
    }
    return Outline(old_shapes, old_kinds, config, parameters)


def parameter_orders(config: Mapping[str, Any] | None) -> Mapping[str, Sequence[str]]:
    """Modules and their own parameters, in the order in which the class that a config names registers them.

    Nothing where the installed transformers has no such class, or cannot build it.
    """
    if not config or find_spec("transformers") is None:
        return {}
    model = ModelConfig(config, "")
    try:
        names = known_classes(model, model.architectures())
        if not names:
            return {}
        built = build(model_class(names[0]), make_config(model.model_type or "", config))
        return skeleton_of(built).parameters
    except Exception:  # what a class raises of a config that is not its own
        return {}
