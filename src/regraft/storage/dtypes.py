"""The element types of the safetensors format and their numpy counterparts.

Source: the format's description, https://huggingface.co/docs/safetensors, and the list of types in
its reference implementation, https://github.com/huggingface/safetensors (``Dtype`` in
``safetensors/src/tensor.rs``). Values are little-endian and row-major.

F4, F6_E2M3 and F6_E3M2 are smaller than a byte. A file's shape counts their elements, while numpy
can only address bytes, so such a tensor is held as *cells*: the fewest whole bytes that hold a
whole number of elements (two F4 in 1 byte, four F6 in 3 bytes). Its array has a structured dtype
whose one field carries the format's name, and its last axis counts cells. Arithmetic on a
structured dtype fails, so a packed tensor can be carried along and cannot be mistaken for numbers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from msgspec import Struct

from regraft.errors import BadInputError, Finding


class DType(Struct, frozen=True):
    """One element type of the format."""

    name: str
    """The name in the file's header."""
    bits: int
    """The size of one element, in bits."""
    per_cell: int = 1
    """How many elements one numpy item holds: 1, and more only for types smaller than a byte."""

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype of one cell; little-endian."""
        return _numpy_types()[self.name]


# Ordered as the reference writer lays tensors out, smallest alignment first.
DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType("BOOL", 8),
        DType("F4", 4, per_cell=2),
        DType("F6_E2M3", 6, per_cell=4),
        DType("F6_E3M2", 6, per_cell=4),
        DType("U8", 8),
        DType("I8", 8),
        DType("F8_E5M2", 8),
        DType("F8_E4M3", 8),
        DType("F8_E8M0", 8),
        DType("F8_E4M3FNUZ", 8),
        DType("F8_E5M2FNUZ", 8),
        DType("I16", 16),
        DType("U16", 16),
        DType("F16", 16),
        DType("BF16", 16),
        DType("I32", 32),
        DType("U32", 32),
        DType("F32", 32),
        DType("C64", 64),
        DType("F64", 64),
        DType("I64", 64),
        DType("U64", 64),
    )
}
"""Every type of the format by name, in the order of its alignment."""

BITS: dict[str, int] = {name: dtype.bits for name, dtype in DTYPES.items()}
"""The size of one element in bits, by the type's name."""


@cache
def _numpy_types() -> dict[str, np.dtype[Any]]:
    """The numpy dtype of each type; made when numbers are asked for, since headers need no ml_dtypes."""
    import ml_dtypes

    def cell(name: str, size: int) -> np.dtype[Any]:
        return np.dtype([(name, np.uint8, (size,))])

    return {
        "BOOL": np.dtype(np.bool_),
        "F4": cell("F4", 1),
        "F6_E2M3": cell("F6_E2M3", 3),
        "F6_E3M2": cell("F6_E3M2", 3),
        "U8": np.dtype(np.uint8),
        "I8": np.dtype(np.int8),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
        "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
        "I16": np.dtype("<i2"),
        "U16": np.dtype("<u2"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "I32": np.dtype("<i4"),
        "U32": np.dtype("<u4"),
        "F32": np.dtype("<f4"),
        "C64": np.dtype("<c8"),
        "F64": np.dtype("<f8"),
        "I64": np.dtype("<i8"),
        "U64": np.dtype("<u8"),
    }


@cache
def _by_numpy() -> dict[np.dtype[Any], DType]:
    return {dtype: DTYPES[name] for name, dtype in _numpy_types().items()}


def describe_unknown_dtype(name: object, where: str, key: str) -> Finding:
    """The finding for a type that the format does not have."""
    return Finding(
        "unknown-dtype",
        f"the tensor's dtype is {str(name)[:80]!r}; the format knows {', '.join(DTYPES)}",
        where=where,
        key=key,
        fix="save the tensor in one of these dtypes",
    )


def find_dtype(name: str, *, where: str, key: str) -> DType:
    """Look up a type by the format's name.

    ``where`` and ``key`` are the file and the tensor that the error names.

    Raises:
        BadInputError: the format has no such type.
    """
    dtype = DTYPES.get(name)
    if dtype is None:
        raise BadInputError(describe_unknown_dtype(name, where, key))
    return dtype


def match_dtype(dtype: np.dtype[Any], *, where: str, key: str) -> DType:
    """Look up the type that stores a numpy dtype, whatever its byte order.

    ``where`` and ``key`` are the file and the tensor that the error names.

    Raises:
        BadInputError: the format has no type for it.
    """
    # Only '>' is swapped, since newbyteorder on an ml_dtypes type is not a promise of that package.
    found = _by_numpy().get(dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype)
    if found is None:
        raise BadInputError(describe_unknown_dtype(dtype, where, key))
    return found


def count_cells(dtype: DType, shape: tuple[int, ...], *, where: str, key: str) -> tuple[int, ...]:
    """The shape of the numpy array that holds a tensor of the given shape in the file.

    Args:
        dtype: the tensor's type.
        shape: the tensor's shape in elements.
        where: the file that the error names.
        key: the tensor that the error names.

    Raises:
        BadInputError: the elements of a packed type do not fill whole cells along the last axis.
    """
    if dtype.per_cell == 1:
        return shape
    if not shape or shape[-1] % dtype.per_cell:
        raise BadInputError(
            Finding(
                "packed-row",
                f"the {dtype.name} tensor has shape {list(shape)}, and its last axis must be a"
                f" multiple of {dtype.per_cell} to hold whole bytes",
                where=where,
                key=key,
                fix="save the tensor with its packed bytes as U8",
            )
        )
    return (*shape[:-1], shape[-1] // dtype.per_cell)


def count_elements(dtype: DType, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file, in elements, of a numpy array of this type and shape."""
    if dtype.per_cell == 1:
        return shape
    rows = shape or (1,)
    return (*rows[:-1], rows[-1] * dtype.per_cell)
