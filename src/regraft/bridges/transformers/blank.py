"""Models with real tensors that take no memory: what a loader does to one, it does to the true one.

Large tensors lie in pages that the system gives out when they are written to. Each begins with a number that is not
zero, and small ones hold such numbers throughout, so that what was never filled cannot pass for zeros from a file.
"""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch import nn

from regraft.bridges.transformers.building import (
    build,
    known_classes,
    make_config,
    model_class,
)
from regraft.errors import BadInputError, Finding
from regraft.planning.model import ModelConfig

_SMALL = 1 << 16
"""Bytes up to which a tensor is filled."""
_MARK = 0.4375


def classes_of(model: ModelConfig, named: str | None) -> list[str]:
    """The classes that a model may be, the likeliest first; ``named`` is the one that an adapter names."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    bare = MODEL_MAPPING_NAMES.get(model.model_type or "")
    names = [named, *model.architectures(), *([bare] if isinstance(bare, str) else bare or ())]
    return known_classes(model, names)


def build_blank(model: ModelConfig, name: str) -> Any:
    """A model of the class ``name`` with blank weights, in float32 on the CPU.

    Raises ``BadInputError`` where transformers cannot build it.
    """
    data = dict(model.data)
    for field in ("torch_dtype", "dtype", "quantization_config"):
        data.pop(field, None)
    try:
        built = build(model_class(name), make_config(str(model.model_type), data))
        built.tie_weights()
        _fill(built)
    except Exception as error:
        raise BadInputError(
            Finding(
                "model-config",
                f"{name} cannot be built from it: {error}",
                where=model.path,
                fix="give the config.json that belongs to the model, or another release of transformers",
            )
        ) from error
    return built.eval()


def _fill(model: nn.Module) -> None:
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    blank = _blank(tensor)
                    made[id(tensor)] = (
                        nn.Parameter(blank, tensor.requires_grad)
                        if isinstance(tensor, nn.Parameter)
                        else blank
                    )
                table[name] = made[id(tensor)]  # type: ignore[assignment]


def _blank(tensor: torch.Tensor) -> torch.Tensor:
    size = tensor.numel() * tensor.element_size()
    mark = _MARK if tensor.is_floating_point() else 0
    if size <= _SMALL:
        return torch.full(tuple(tensor.shape), mark, dtype=tensor.dtype)
    pages = mmap.mmap(-1, size)
    blank = torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape)
    blank.view(-1)[0] = mark
    return blank
