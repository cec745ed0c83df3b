"""State dicts into modules that are no models of transformers, by rule books of the user's own."""

from __future__ import annotations

from typing import Any

from regraft.errors import BadInputError, Finding
from regraft.names.live import walk
from regraft.planning.identify import detect, make_plan
from regraft.planning.plan import Headers, Plan
from regraft.rules.book import own_books


def is_own_module(model: Any) -> bool:
    """Whether a module has no model of transformers in it, and there are books of the user's own that may know it."""
    return bool(own_books()) and hasattr(model, "state_dict") and not walk(model).models


def plan_into(name: str, model: Headers, given: Headers) -> tuple[Plan | None, str]:
    """The plan that makes exactly a module's tensors, and the layout that they have.

    Args:
        name: the module's class.
        model: of the module's own state dict.
        given: of the state dict that is to fit it.

    Returns:
        The plan, or ``None`` where it fits as it is.

    Raises ``BadInputError`` with every name that is too many, missing, or of another shape.
    """
    layout = detect(model, None, f"the {name} in memory").layout
    known = detect(given, None, "the state dict")
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
