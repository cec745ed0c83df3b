"""The table of element types."""

import numpy as np
import pytest

from regraft.errors import BadInputError
from regraft.storage.dtypes import DTYPES, count_cells, count_elements, find_dtype, match_dtype


def test_table_is_consistent() -> None:
    for name, dtype in DTYPES.items():
        assert dtype.name == name
        assert dtype.numpy.itemsize * 8 == dtype.bits * dtype.per_cell
        assert match_dtype(dtype.numpy, where="f", key="k") is dtype
        assert find_dtype(name, where="f", key="k") is dtype
    assert len({dtype.numpy for dtype in DTYPES.values()}) == len(DTYPES)


def test_either_byte_order() -> None:
    assert match_dtype(np.dtype(">f4"), where="f", key="k").name == "F32"


def test_unknown_names_everything() -> None:
    with pytest.raises(BadInputError) as caught:
        find_dtype("F7", where="some.safetensors", key="layers.0.w")
    text = str(caught.value)
    assert text.startswith("some.safetensors: layers.0.w: the tensor's dtype is 'F7'")
    assert all(name in text for name in DTYPES)


def test_cells() -> None:
    f4, f6, f32 = DTYPES["F4"], DTYPES["F6_E2M3"], DTYPES["F32"]
    assert count_cells(f4, (3, 8), where="f", key="k") == (3, 4)
    assert count_cells(f6, (8,), where="f", key="k") == (2,)
    assert count_cells(f32, (3,), where="f", key="k") == (3,)
    assert count_elements(f4, (3, 4)) == (3, 8)
    assert count_elements(f4, ()) == (2,)
    assert count_elements(f32, ()) == ()
    for shape in [(), (3,), (4, 1)]:
        with pytest.raises(BadInputError, match="multiple of 2"):
            count_cells(f4, shape, where="f", key="k")
