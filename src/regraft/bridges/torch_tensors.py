"""What the live API needs of torch: whole tensors from sharded ones, and back; a holder's state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regraft.names.live import walk_modules


def whole(tensor: Any) -> Any:
    """A sharded tensor (torch's DTensor) as a whole one; every rank must take part. Others as they are."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def place(tensor: Any, like: Any) -> Any:
    """A tensor as sharded as another one."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None or getattr(tensor, "device_mesh", None) is not None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), mesh, like.placements)


def state_of(root: Any) -> Mapping[str, Any]:
    """The state dict of a module, or of all modules of an object that is none."""
    result: dict[str, Any] = {}
    for prefix, module in walk_modules(root):
        result.update((prefix + key, value) for key, value in module.state_dict().items())
    return result


def parameters_of(root: Any) -> dict[str, int]:
    """Which parameter each key of the state dict is; tied ones are one."""
    result: dict[str, int] = {}
    for prefix, module in walk_modules(root):
        for name, parameter in module.named_parameters(remove_duplicate=False):
            result[prefix + name] = id(parameter)
    return result
