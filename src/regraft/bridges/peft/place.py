"""Putting an adapter's tensors into a model that has room for them, each in its place or none at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from regraft.bridges.peft.slots import Slot, adapter_slots, base_slots
from regraft.bridges.torch_tensors import place as spread
from regraft.dialects.peft.scan import PREFIX
from regraft.errors import BadInputError, Finding


def place_tensors(
    root: nn.Module, tensors: Mapping[str, torch.Tensor], adapter_name: str, config: Any, where: str
) -> None:
    """Fill the layers that PEFT made for an adapter in ``root``, the model that its names are relative to.

    Raises ``BadInputError`` where a tensor has no place, a place gets no tensor, or shapes differ; then nothing was
    written.
    """
    slots = adapter_slots(root, adapter_name, config)
    pairs, findings = pair(root, slots, tensors, where)
    filled = {id(slot.tensor) for _, slot, _ in pairs}
    for key, slot in slots.items():
        if slot.needed and id(slot.tensor) not in filled:
            findings.append(
                Finding(
                    "missing",
                    "PEFT made room for this tensor, but the adapter does not have it",
                    where=where,
                    key=PREFIX + key,
                    fix="check that the adapter was trained on this model",
                )
            )
    findings += [
        Finding(
            "wrong-base",
            f"it has the shape {tuple(tensor.shape)}, the model {tuple(slot.tensor.shape)}",
            where=where,
            key=key,
            fix="give the model that the adapter was trained on",
        )
        for key, slot, tensor in pairs
        if slot.tensor.shape != tensor.shape
    ]
    if findings:
        raise BadInputError(findings)
    for _, slot, tensor in pairs:
        fill(slot, tensor)


def pair(
    root: nn.Module, slots: Mapping[str, Slot], tensors: Mapping[str, torch.Tensor], where: str
) -> tuple[list[tuple[str, Slot, torch.Tensor]], list[Finding]]:
    """Every tensor with its key and its place, and findings on those that have none."""
    pairs: list[tuple[str, Slot, torch.Tensor]] = []
    findings: list[Finding] = []
    base: dict[str, Slot] | None = None
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        slot = slots.get(name)
        if slot is None:
            base = base_slots(root) if base is None else base
            slot = base.get(name)
        if slot is not None:
            pairs.append((key, slot, tensor))
            continue
        findings.append(
            Finding(
                "no-place",
                "the model has no place for this tensor: no module of this name was adapted",
                where=where,
                key=key,
                fix="check that the adapter was trained on this model, and that its config names the module",
            )
        )
    return pairs, findings


def fill(slot: Slot, tensor: torch.Tensor) -> None:
    """Write one tensor; a place on the meta device becomes real, on the device of its base layer."""
    have = slot.tensor
    with torch.no_grad():
        if have.is_meta:
            made = tensor.to(_device(slot), have.dtype, copy=True)
            if slot.name in slot.owner._parameters:
                slot.owner._parameters[slot.name] = nn.Parameter(made, have.requires_grad)
            else:
                slot.owner._buffers[slot.name] = made
        else:
            have.copy_(spread(tensor, have))


def _device(slot: Slot) -> torch.device:
    layer: Any = slot.layer
    if isinstance(layer, BaseTunerLayer):
        for tensor in layer.get_base_layer().parameters():
            if not tensor.is_meta:
                return torch.device(tensor.device)
    return torch.device("cpu")
