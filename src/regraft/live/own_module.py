"""State dicts into modules that are no models of transformers, by rule books of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regraft.errors import BadInputError, Finding
from regraft.names.live import walk
from regraft.planning.identify import detect, make_plan
from regraft.planning.model import ModelConfig, check_sizes
from regraft.planning.plan import Headers, Plan
from regraft.rules.book import own_books


def is_own_module(model: Any) -> bool:
    """Whether a module has no model of transformers in it, so that only books of the user's own may know it."""
    return hasattr(model, "state_dict") and not walk(model).models


def config_of(model: Any) -> ModelConfig | None:
    """What a module's ``config`` says of its sizes, as a rule book's ``config.x`` looks them up; ``None`` without one.

    It may be a dict, a config of transformers, or any object with the fields. Where it names no model type that a book
    of the user's own is for, it is taken for that of the only book.

    Raises ``BadInputError`` for sizes that no model has.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    elif config is not None and not isinstance(config, Mapping):
        config = getattr(config, "__dict__", None)
    if not isinstance(config, Mapping) or not config:
        return None
    types = {each for book in own_books() for each in book.model_types}
    data, where = dict(config), f"the config of the {type(model).__name__} in memory"
    if data.get("model_type") not in types:
        if len(own_books()) != 1:
            return None
        data["model_type"] = own_books()[0].model_types[0]
    check_sizes(data, where)
    return ModelConfig(data, where)


def plan_into(
    name: str, model: Headers, given: Headers, config: ModelConfig | None = None
) -> tuple[Plan | None, str]:
    """The plan that makes exactly a module's tensors, and the layout that they have.

    Args:
        name: the module's class.
        model: of the module's own state dict.
        given: of the state dict that is to fit it.
        config: the module's, where it has one.

    Returns:
        The plan, or ``None`` where it fits as it is.

    Raises ``BadInputError`` with every name that is too many, missing, or of another shape.
    """
    layout = detect(model, config, f"the {name} in memory").layout
    known = detect(given, config, "the state dict")
    plan = None if layout is None else make_plan(given, known, layout, "the state dict")
    made = _shapes(given) if plan is None else plan.result_shapes()
    wanted = _shapes(model)
    findings = []
    for key in sorted(made.keys() | wanted.keys()):
        if key not in wanted:
            said, fix = f"the {name} has no such tensor", "take it out"
            findings.append(Finding("unmatched", said, key=key, fix=fix))
        elif key not in made:
            said = f"the {name} has it, and nothing in the state dict leads to it"
            findings.append(Finding("missing", said, key=key, fix="add what it is made of"))
        elif made[key] != wanted[key]:
            said = (
                f"it comes to the shape {list(made[key])}, and the {name} wants {list(wanted[key])}"
            )
            findings.append(
                Finding("shape", said, key=key, fix="give the state dict of this model")
            )
    if findings:
        raise BadInputError(findings)
    return plan, layout or known.layout or "the model's own layout"


def _shapes(headers: Headers) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(headers.shapes[number])
        for group in headers.groups
        for name, number in zip(group.names(), group.ids.tolist(), strict=True)
    }
