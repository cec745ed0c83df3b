"""Models with real tensors that take no memory: what a loader does to one, it does to the true one.

Large tensors lie in pages that the system gives out when they are written to. Each begins with a number that is not
zero, and small ones hold such numbers throughout, so that what was never filled cannot pass for zeros from a file.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from regraft.bridges.transformers.building import (
    build,
    known_classes,
    make_config,
    model_class,
)
from regraft.bridges.transformers.choosing import check_architecture, classes_of_task
from regraft.bridges.transformers.files import class_by_names
from regraft.errors import BadInputError, Finding
from regraft.planning.model import ModelConfig

_SMALL = 1 << 16
"""Bytes up to which a tensor is filled."""
_MARK = 0.4375


def classes_of(
    model: ModelConfig,
    named: str | None,
    keys: Callable[[], Sequence[str]],
    *,
    adapter: bool = False,
    task: str | None = None,
) -> tuple[list[str], str | None]:
    """The classes that a model may be, the likeliest first, and how it was guessed where none is named.

    ``named`` is the one that an adapter names; ``keys`` are asked for where no class of transformers is named.

    Raises ``AmbiguousError`` where the names fit several, with different results.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    check_architecture(model)
    if model.architecture is not None:
        return [model.architecture], None
    asked = [named] if named else classes_of_task(model, task)
    known = known_classes(model, [*asked, *model.architectures()])
    if not known:
        guessed = class_by_names(model, keys(), adapter=adapter, task=task)
        return ([guessed[0]], guessed[1]) if guessed is not None else ([], None)
    bare = MODEL_MAPPING_NAMES.get(model.model_type or "")
    others = [bare] if isinstance(bare, str) else bare or ()
    return list(dict.fromkeys([*known, *known_classes(model, others)])), None


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
