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

from typing import Any

import ml_dtypes
import numpy as np
from msgspec import Struct

from regraft.errors import BadInputError, Finding


class DType(Struct, frozen=True):
    """One element type of the format."""

    name: str
    """The name in the file's header."""
    bits: int
    """The size of one element, in bits."""
    numpy: np.dtype[Any]
    """The numpy dtype of one cell; little-endian."""
    per_cell: int = 1
    """How many elements one numpy item holds: 1, and more only for types smaller than a byte."""


def _packed(name: str, bits: int, cell_bytes: int) -> DType:
    cell = np.dtype([(name, np.uint8, (cell_bytes,))])
    return DType(name, bits, cell, cell_bytes * 8 // bits)


def _plain(name: str, numpy_type: Any) -> DType:
    dtype = np.dtype(numpy_type)
    return DType(name, dtype.itemsize * 8, dtype)


# Ordered as the reference writer lays tensors out, smallest alignment first.
DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        _plain("BOOL", np.bool_),
        _packed("F4", bits=4, cell_bytes=1),
        _packed("F6_E2M3", bits=6, cell_bytes=3),
        _packed("F6_E3M2", bits=6, cell_bytes=3),
        _plain("U8", np.uint8),
        _plain("I8", np.int8),
        _plain("F8_E5M2", ml_dtypes.float8_e5m2),
        _plain("F8_E4M3", ml_dtypes.float8_e4m3fn),
        _plain("F8_E8M0", ml_dtypes.float8_e8m0fnu),
        _plain("F8_E4M3FNUZ", ml_dtypes.float8_e4m3fnuz),
        _plain("F8_E5M2FNUZ", ml_dtypes.float8_e5m2fnuz),
        _plain("I16", "<i2"),
        _plain("U16", "<u2"),
        _plain("F16", "<f2"),
        _plain("BF16", ml_dtypes.bfloat16),
        _plain("I32", "<i4"),
        _plain("U32", "<u4"),
        _plain("F32", "<f4"),
        _plain("C64", "<c8"),
        _plain("F64", "<f8"),
        _plain("I64", "<i8"),
        _plain("U64", "<u8"),
    )
}
"""Every type of the format by name, in the order of its alignment."""

BITS: dict[str, int] = {name: dtype.bits for name, dtype in DTYPES.items()}
"""The size of one element in bits, by the type's name."""

_BY_NUMPY: dict[np.dtype[Any], DType] = {dtype.numpy: dtype for dtype in DTYPES.values()}


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
    found = _BY_NUMPY.get(dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype)
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
