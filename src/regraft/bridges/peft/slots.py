"""Where the tensors of an adapter live in a model, by the names that its file gives them.

PEFT finds these places by cutting and pasting text, which goes wrong for some adapter names and for DoRA. Here the
modules themselves tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from regraft.names.modules import facts_of

_DORA = "lora_magnitude_vector"
"""PEFT saves it without the ``.weight`` that it has in the model."""


def inner_name(module: nn.Module) -> str | None:
    """The child that a wrapper stands for; ``None`` for any other module, PEFT's own included."""
    facts = facts_of(type(module))
    names = () if facts.adapter else facts.wrapped
    return next((name for name in names if module._modules.get(name) is not None), None)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all wrappers."""
    while (name := inner_name(module)) is not None:
        module = getattr(module, name)
    return module


def walk(root: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module below ``root`` with its path, in which wrappers have no segment."""
    root = unwrapped(root)
    yield path, root
    for name, child in root._modules.items():
        if child is not None:
            yield from walk(child, f"{path}.{name}" if path else name)


@contextmanager
def wrappers_aside(root: nn.Module) -> Iterator[None]:
    """Take the wrappers inside a model out of its tree, and put them back around whatever then stands there.

    So PEFT sees the names that a model has without them, and a wrapped layer is adapted inside its wrapper.
    """
    spots = list(_wrapped_spots(unwrapped(root)))
    for parent, name, wrapper in spots:
        parent._modules[name] = unwrapped(wrapper)
    try:
        yield
    finally:
        for parent, name, wrapper in spots:
            inside = parent._modules[name]
            parent._modules[name] = wrapper
            if inside is not unwrapped(wrapper):
                _put_inside(wrapper, inside)


def _wrapped_spots(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for name, child in module._modules.items():
        if child is None:
            continue
        if inner_name(child) is not None:
            yield module, name, child
        yield from _wrapped_spots(unwrapped(child))


def _put_inside(wrapper: nn.Module, module: nn.Module | None) -> None:
    while True:
        name = inner_name(wrapper)
        assert name is not None
        child = getattr(wrapper, name)
        if inner_name(child) is None:
            break
        wrapper = child
    wrapper._modules[name] = module
    renew: Any = getattr(wrapper, "_initialize", None)
    if renew is not None:  # a compiled module holds its inner module's call, too
        renew()


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of a model that an adapter's file may fill."""

    owner: nn.Module
    """The module whose own parameter or buffer it is."""
    name: str
    """What its owner calls it."""
    needed: bool
    """Whether a file must fill it."""
    layer: nn.Module | None = None
    """PEFT's layer that it belongs to; ``None`` for a tensor of the base."""

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor as it is now."""
        parameter = self.owner._parameters.get(self.name)
        found = self.owner._buffers[self.name] if parameter is None else parameter
        assert found is not None
        return found


def adapter_slots(root: nn.Module, adapter_name: str, config: Any) -> dict[str, Slot]:
    """The tensors of one adapter, by their names in a file, without ``base_model.model.``."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    saved = getattr(config, "modules_to_save", None) or []
    slots: dict[str, Slot] = {}
    for path, module in walk(root):
        start = f"{path}." if path else ""
        if isinstance(module, BaseTunerLayer):
            for kind, table in module._modules.items():
                if kind == "base_layer" or not _holds(table, adapter_name):
                    continue
                needed = kind.startswith((prefix, "trainable_tokens_"))
                for rest, owner, name in _entry(table, adapter_name):
                    key = f"{start}{kind}{rest}"
                    if kind == _DORA:
                        key = key.removesuffix(".weight")
                    slots[key] = Slot(owner, name, needed, module)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            table = module._modules.get("modules_to_save")
            if table is not None and _holds(table, adapter_name):
                named = any(path == entry or path.endswith(f".{entry}") for entry in saved)
                for rest, owner, name in _entry(table, adapter_name):
                    slots[f"{start}{rest.removeprefix('.')}"] = Slot(owner, name, named, module)
    return slots


def _holds(table: nn.Module | None, adapter_name: str) -> bool:
    return (
        isinstance(table, nn.ModuleDict | nn.ParameterDict | BufferDict) and adapter_name in table
    )


def _entry(table: Any, adapter_name: str) -> Iterator[tuple[str, nn.Module, str]]:
    """An adapter's entry of one of PEFT's tables: for each tensor the rest of its path, its owner and its name."""
    if not isinstance(table, nn.ModuleDict):
        if adapter_name in _own_tensors(table):
            yield "", table, adapter_name
        return
    for path, module in walk(table[adapter_name]):
        for name in _own_tensors(module):
            yield f".{path}.{name}" if path else f".{name}", module, name


def _own_tensors(module: nn.Module) -> list[str]:
    """The names of a module's own tensors that a state dict would hold."""
    buffers = [n for n in module._buffers if n not in module._non_persistent_buffers_set]
    own = module._parameters | module._buffers
    return [name for name in [*module._parameters, *buffers] if own[name] is not None]


def base_slots(root: nn.Module) -> dict[str, Slot]:
    """The tensors of the base itself, by the names that they have with and without PEFT's layers around them."""
    exact: dict[str, Slot] = {}
    plain: dict[str, Slot] = {}
    for live, path, module in _walk_base(unwrapped(root), "", ""):
        for name in _own_tensors(module):
            slot = Slot(module, name, needed=False)
            exact[f"{live}{name}"] = slot
            plain[f"{path}{name}"] = slot
    return plain | exact


def _walk_base(module: nn.Module, live: str, path: str) -> Iterator[tuple[str, str, nn.Module]]:
    """The base's modules, with the start of their tensors' names in the model and in the base alone."""
    held = None
    if isinstance(module, BaseTunerLayer):
        held = "base_layer"
    elif isinstance(module, AuxiliaryTrainingWrapper):
        held = "original_module"
    if held is not None:
        inside = module._modules.get(held)
        if inside is not None:
            yield from _walk_base(unwrapped(inside), f"{live}{held}.", path)
        return
    yield live, path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk_base(unwrapped(child), f"{live}{name}.", f"{path}{name}.")
