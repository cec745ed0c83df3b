"""Reading ``adapter_model.bin``, a file that ``torch.save`` wrote.

Needs torch, which regraft does not depend on; it is imported when a file is opened. Only tensors
and plain containers are unpickled (``weights_only=True``), so a file cannot run code.
Source: https://docs.pytorch.org/docs/stable/generated/torch.load.html.
"""

from __future__ import annotations

import importlib
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from regraft.errors import BadInputError, Finding
from regraft.storage.dtypes import DTYPES, match_dtype
from regraft.storage.probe import PROBE_SIZE, open_regular, recognize_content

_RESAVE = "save the adapter again as safetensors"

# torch's types that numpy knows nothing of: the type that carries the bits, and the format's name.
_CARRIED = {
    "bfloat16": ("uint16", "BF16"),
    "float8_e4m3fn": ("uint8", "F8_E4M3"),
    "float8_e4m3fnuz": ("uint8", "F8_E4M3FNUZ"),
    "float8_e5m2": ("uint8", "F8_E5M2"),
    "float8_e5m2fnuz": ("uint8", "F8_E5M2FNUZ"),
    "float8_e8m0fnu": ("uint8", "F8_E8M0"),
}


def open_bin(path: str | os.PathLike[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Open the tensors of a file that ``torch.save`` wrote, as read-only arrays.

    The file is mapped rather than read if it is of the zip form that torch has written since 1.6.
    Bits are kept; bfloat16 and the 8-bit floats come as ml_dtypes types. Tensors that shared memory
    when they were saved still do.

    Returns:
        The tensors by name, in the file's order, with their own shapes and strides.

    Raises:
        BadInputError: the file cannot be read, is not a plain dict of names and dense tensors, or
            holds a type that safetensors has no name for; or torch is missing.
    """
    path = Path(path)
    where = str(path)
    file, size = open_regular(path)
    with file:
        start = file.read(PROBE_SIZE)
    is_zip = start.startswith(b"PK") and zipfile.is_zipfile(path)
    known = recognize_content(start, where)
    if known is not None and not is_zip:
        raise BadInputError(known)
    torch = _import_torch(where)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        message = f"torch cannot load the file as plain tensors: {_summarize(error)}"
        raise BadInputError(Finding("bad-torch-file", message, where=where, fix=_RESAVE)) from error
    if not isinstance(loaded, dict):
        message = f"expected a dict of names and tensors, and the file holds {_name_type(loaded)}"
        raise BadInputError(Finding("not-tensors", message, where=where, fix=_RESAVE))

    tensors: dict[str, np.ndarray[Any, Any]] = {}
    findings: list[Finding] = []
    for key, value in loaded.items():
        problem = _find_problem(torch, key, value, size)
        if problem is not None:
            findings.append(
                Finding("not-tensors", problem, where=where, key=str(key)[:300], fix=_RESAVE)
            )
            continue
        try:
            tensors[key] = to_numpy(torch, value, where, key)
        except BadInputError as error:
            findings += error.findings
    if findings:
        raise BadInputError(findings)
    return tensors


def _import_torch(where: str) -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise BadInputError(
            Finding(
                "torch-missing",
                "reading this file takes torch, which is not installed",
                where=where,
                fix=f"run `pip install regraft[torch]`, or {_RESAVE}",
            )
        ) from error


def _find_problem(torch: Any, key: object, value: Any, size: int) -> str | None:
    """What keeps an item of the loaded dict from being a named dense tensor, if anything."""
    if not isinstance(key, str):
        return f"the key must be text, and it is {_name_type(key)}"
    if not isinstance(value, torch.Tensor):
        return f"expected a tensor, and it is {_name_type(value)}"
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        return "the tensor must be dense, and it is sparse, quantized or nested"
    if value.device.type != "cpu":
        return f"the tensor has no data (its device is {value.device})"
    # An expanded tensor repeats its bytes without holding them, without end.
    if value.numel() * value.element_size() > size:
        return f"the tensor of shape {list(value.shape)} is larger than the whole file"
    return None


def to_numpy(torch: Any, tensor: Any, where: str, key: str) -> np.ndarray[Any, Any]:
    """A torch tensor on the CPU as an array, types that numpy has not among them.

    Raises ``BadInputError`` for a type that safetensors has no name for.
    """
    tensor = tensor.detach().resolve_conj().resolve_neg()
    name = str(tensor.dtype).removeprefix("torch.")
    if name in _CARRIED:
        carrier, dtype = _CARRIED[name]
        array = tensor.view(getattr(torch, carrier)).numpy().view(DTYPES[dtype].numpy)
    else:
        try:
            array = tensor.numpy()
        except TypeError as error:
            message = f"the tensor's dtype is {name}, which safetensors has no name for"
            raise BadInputError(
                Finding("unknown-dtype", message, where=where, key=key, fix=_RESAVE)
            ) from error
        match_dtype(array.dtype, where=where, key=key)
    array.flags.writeable = False
    return array  # type: ignore[no-any-return]


def _name_type(value: object) -> str:
    return f"of type {type(value).__name__}"


def _summarize(error: Exception) -> str:
    """The first line of torch's message, whose later lines advise to switch its checks off."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
