"""Putting a model back as it was, when a load fails half-way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_CONTAINERS = (dict, list, set)


@contextmanager
def undone_on_failure(root: nn.Module, *, weights: bool = False) -> Iterator[None]:
    """Whatever is raised inside leaves the modules below ``root`` as they were before.

    What is kept is the tree: each module's attributes, and what stands in those that are dicts, lists or sets
    (children, parameters, hooks, PEFT's tables of ranks and scales). With ``weights`` the values of the parameters
    are kept, too; PEFT changes them only for initialisations that take something off the base.
    """
    kept = [(module, _attributes(module)) for module in root.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    values = [(p, p.detach().clone()) for p in root.parameters()] if weights else []
    try:
        yield
    except BaseException:
        for module, attributes in kept:
            _restore(module, attributes)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        with torch.no_grad():
            for parameter, value in values:
                parameter.data = value
        raise


def _attributes(module: nn.Module) -> list[tuple[str, Any, Any]]:
    """Every attribute: its name, its value, and a copy of the value where that is a container."""
    return [
        (name, value, value.copy() if isinstance(value, _CONTAINERS) else None)
        for name, value in vars(module).items()
    ]


def _restore(module: nn.Module, attributes: list[tuple[str, Any, Any]]) -> None:
    own = vars(module)
    own.clear()
    for name, value, copy in attributes:
        own[name] = value
        if copy is None:
            continue
        value.clear()
        if isinstance(value, list):
            value.extend(copy)
        else:
            value.update(copy)
