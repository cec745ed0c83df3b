"""What the live API needs of torch: whole tensors from sharded ones, and back; a holder's state dict."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from regraft.arrays.lazy import Lazy
from regraft.names.live import walk_modules


def whole(tensor: Any) -> Any:
    """A sharded tensor (torch's DTensor) as a whole one; every rank must take part. Others as they are."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def is_empty(tensor: Any) -> bool:
    """Whether a tensor has a shape and no numbers."""
    return bool(getattr(tensor, "is_meta", False))


def fault_of(value: Any) -> tuple[str, str] | None:
    """What is wrong with a value of a state dict that should be a plain tensor, and what to do; ``None`` if nothing.

    A tensor is plain if its elements lie in memory one by one, and are real numbers: bits are moved, and a packed,
    sparse or quantised tensor has others, or more than it shows.
    """
    if isinstance(value, Lazy):
        return None
    name = type(value).__name__
    torch = sys.modules.get("torch")
    if type(value).__module__.partition(".")[0] in ("numpy", "ml_dtypes"):
        return f"a numpy {name}, where a tensor should be", "give it as torch.from_numpy(...)"
    if torch is None or not isinstance(value, torch.Tensor):
        return f"a {name}, where a tensor should be", "take it out"
    lazy = torch.nn.parameter
    if isinstance(value, (lazy.UninitializedParameter, lazy.UninitializedBuffer)):
        return "it has no shape yet", "run the model once, so that its lazy modules are made"
    if value.is_quantized:
        return f"it is quantised by torch ({value.dtype})", "give value.dequantize()"
    if value.layout != torch.strided or value.is_nested:
        told = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        return f"it is {told}, and a dense tensor is wanted", "give value.to_dense()"
    if value.is_complex():
        return f"its numbers are complex ({value.dtype})", "give torch.view_as_real(value)"
    if value.dtype in _sub_byte(torch):
        told = str(value.dtype).removeprefix("torch.")
        return f"its numbers are packed ({told})", "convert the model before it is quantised"
    if hasattr(value, "full_tensor"):
        return None
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        message = f"it is a {name}, which keeps its numbers in other tensors"
        return message, "convert the model before it is quantised"
    if type(value).__name__ in _BITSANDBYTES:
        message = f"it is quantised with bitsandbytes ({name})"
        return message, "convert the model before it is quantised"
    return None


_BITSANDBYTES = frozenset({"Params4bit", "Int8Params"})


def _sub_byte(torch: Any) -> frozenset[Any]:
    """The dtypes whose elements are smaller than a byte, or share one."""
    names = (
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
        "float4_e2m1fn_x2",
    )
    return frozenset(getattr(torch, name) for name in names if hasattr(torch, name))


def place(tensor: Any, like: Any) -> Any:
    """A tensor as sharded as another one; what is not read yet is read in parts later."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None or isinstance(tensor, Lazy) or getattr(tensor, "device_mesh", None) is not None:
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
