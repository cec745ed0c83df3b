"""Buffers that no file has: a model made on the meta device gets them as transformers computes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from regraft.names.live import walk

_MARK = "_is_hf_initialized"
"""What transformers' own initialisation goes by: a tensor with it keeps its values."""
_BLANK = 0xA5
"""What a buffer is full of before it is computed."""


@torch.no_grad()
def compute_buffers(model: Any) -> list[str]:
    """Make the buffers that a loaded model still has on the meta device, such as a rotary embedding's frequencies.

    ``PreTrainedModel._init_weights`` computes them in ``from_pretrained``, too. Returns the names of those that nobody
    computes, which stay on the meta device.
    """
    left: list[str] = []
    for live in walk(model).models:
        found = [
            (path, module, owner)
            for path, module, owner in _with_owners(live.module, live.live_path, live.module)
            if _lacking(module)
        ]
        # A module's initialisation may reach into the modules below it: nothing that is there may be drawn anew.
        with _marked([*live.module.parameters(), *live.module.buffers()] if found else []):
            left += [name for path, *one in found for name in _compute(path, *one)]
    return left


def _lacking(module: Any) -> dict[str, torch.Tensor]:
    return {name: b for name, b in module._buffers.items() if b is not None and b.is_meta}


def _compute(path: str, module: Any, owner: Any) -> list[str]:
    """Compute what one module lacks; the names of what is not computed."""
    from transformers.initialization import guard_torch_init_functions

    lacking = _lacking(module)
    names = {name: f"{path}.{name}" if path else name for name in lacking}
    # Code of others need not go by the mark.
    if owner.is_custom_code() and any(True for _ in module.parameters()):
        return list(names.values())
    device = owner.device if owner.device.type != "meta" else torch.device("cpu")
    for name, buffer in lacking.items():
        module._buffers[name] = _blank(buffer, device)
    guard_torch_init_functions()(owner._init_weights)(module)
    left: list[str] = []
    for name, buffer in lacking.items():
        if torch.equal(_bytes(module._buffers[name]), _bytes(_blank(buffer, device))):
            module._buffers[name] = buffer
            left.append(names[name])
    return left


@contextmanager
def _marked(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """With tensors marked as initialised, which keep their values then."""
    fresh = [tensor for tensor in tensors if not hasattr(tensor, _MARK)]
    for tensor in fresh:
        setattr(tensor, _MARK, True)
    try:
        yield
    finally:
        for tensor in fresh:
            delattr(tensor, _MARK)


def _with_owners(module: Any, path: str, owner: Any) -> Iterator[tuple[str, Any, Any]]:
    """Every module with its path and the innermost model that it is in, which knows how it is initialised."""
    owner = module if hasattr(module, "_init_weights") else owner
    yield path, module, owner
    for name, child in module.named_children():
        yield from _with_owners(child, f"{path}.{name}" if path else name, owner)


def _blank(buffer: torch.Tensor, device: torch.device) -> torch.Tensor:
    made = torch.empty_like(buffer, device=device)
    _bytes(made).fill_(_BLANK if buffer.dtype != torch.bool else 1)
    return made


def _bytes(tensor: Any) -> torch.Tensor:
    flat: torch.Tensor = tensor.reshape(-1).view(torch.uint8)
    return flat
