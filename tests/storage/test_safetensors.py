"""Opening and writing tensors, alone and together with the safetensors package."""

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regraft.errors import BadInputError
from regraft.storage import safetensors as module
from regraft.storage.dtypes import DTYPES
from regraft.storage.safetensors import TensorFile, open_tensors, read_header, write_tensors

Array = np.ndarray[Any, Any]


def fill(dtype: str, shape: tuple[int, ...], seed: int = 0) -> Array:
    """An array of random bits, whatever they mean."""
    item = DTYPES[dtype].numpy
    count = int(np.prod(shape, dtype=np.int64)) * item.itemsize
    bits = np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)
    return (bits & 1 if dtype == "BOOL" else bits).view(item).reshape(shape)


def assert_same(one: Array, other: Array) -> None:
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4), (5,), (0, 2), (1, 1, 2)])
def test_round_trip(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = fill(dtype, shape)
    write_tensors(tmp_path / "x", {"a": array, "odd": fill("U8", (3,))}, {})
    assert read_header(tmp_path / "x").tensors["a"].dtype == dtype
    assert_same(open_tensors(tmp_path / "x")["a"], array)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    items=st.dictionaries(
        st.text(max_size=5),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4)),
        max_size=6,
    ),
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
)
def test_round_trip_any(
    tmp_path: Path, items: dict[str, tuple[str, list[int]]], metadata: dict[str, str]
) -> None:
    arrays = {
        name: fill(dtype, tuple(shape) if DTYPES[dtype].per_cell == 1 else (*shape, 2), seed)
        for seed, (name, (dtype, shape)) in enumerate(items.items())
    }
    write_tensors(tmp_path / "x", arrays, metadata)
    assert read_header(tmp_path / "x").metadata == metadata
    opened = open_tensors(tmp_path / "x")
    assert set(opened) == set(arrays)
    for name, array in arrays.items():
        assert_same(opened[name], array)
    assert all(array.flags.aligned for array in opened.values())


def test_views_are_read_only_and_share_one_map(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"a": np.ones(3), "b": np.ones(2)}, {})
    opened = open_tensors(tmp_path / "x")
    assert opened["a"].base is opened["b"].base
    with pytest.raises(ValueError, match="read-only"):
        opened["a"][0] = 2
    (tmp_path / "x").unlink()
    assert opened["a"].sum() == 3


def test_unaligned_data(tmp_path: Path) -> None:
    text = b'{"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    text += b'"a":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}'
    data = np.array([1.5, -2.5], "<f4")
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + b"\1" + data.tobytes())
    array = open_tensors(tmp_path / "x")["a"]
    assert not array.flags.aligned
    assert array.tolist() == [1.5, -2.5]


def test_header_is_not_read_twice(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"a": np.ones(3)}, {})
    header = read_header(tmp_path / "x")
    assert open_tensors(tmp_path / "x", header)["a"].tolist() == [1, 1, 1]
    write_tensors(tmp_path / "x", {"a": np.ones(4)}, {})
    with pytest.raises(BadInputError, match="it had 88 bytes and has 96"):
        open_tensors(tmp_path / "x", header)


def test_packed_rows_of_part_bytes(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"F4","shape":[2,1],"data_offsets":[0,1]}}'
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + b"x")
    with pytest.raises(BadInputError, match="multiple of 2"):
        open_tensors(tmp_path / "x")


def test_packed_values_are_no_numbers(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"a": fill("F6_E2M3", (2, 5))}, {})
    assert read_header(tmp_path / "x").tensors["a"].shape == (2, 20)
    with pytest.raises(TypeError):
        open_tensors(tmp_path / "x")["a"] + 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_are_read_one_by_one(tmp_path: Path, dtype: str) -> None:
    write_tensors(tmp_path / "x", {"a": fill(dtype, (3, 4)), "b": fill("F32", ())}, {"k": "v"})
    file, whole = TensorFile(tmp_path / "x"), open_tensors(tmp_path / "x")
    assert list(file) == list(whole)
    assert len(file) == 2
    assert "a" in file
    assert "c" not in file
    assert file.header.metadata == {"k": "v"}
    for name, array in whole.items():
        assert_same(file[name], array)
        outline = file.outline(name)
        assert (outline.dtype, outline.shape) == (array.dtype, array.shape)
        assert not any(outline.strides)
    with pytest.raises(KeyError):
        file["c"]


def test_an_outline_is_no_number(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"a": fill("BF16", (3, 4))}, {})
    assert np.isnan(TensorFile(tmp_path / "x").outline("a").astype(np.float64)).all()


@pytest.mark.parametrize("how", ["cut", "written", "touched"])
def test_a_file_that_changes_while_it_is_open_is_noticed(tmp_path: Path, how: str) -> None:
    path = tmp_path / "x"
    write_tensors(path, {"a": fill("F32", (300, 400)), "b": fill("F32", (300, 400))}, {})
    file = TensorFile(path)
    assert file["a"].shape == (300, 400)
    if how == "cut":
        os.truncate(path, path.stat().st_size - 100_000)
    elif how == "written":
        with path.open("r+b") as other:
            other.seek(-8, os.SEEK_END)
            other.write(b"12345678")
    else:
        os.utime(path, ns=(0, 0))
    for name in "ab":
        with pytest.raises(BadInputError) as caught:
            file[name]
        assert [f.code for f in caught.value.findings] == ["file-changed"]


def test_the_package_reads_ours(tmp_path: Path) -> None:
    arrays: dict[str, Array] = {
        "scalar": np.array(1.5, np.float32),
        "transposed": np.arange(12, dtype=np.int32).reshape(3, 4).T,
        "reversed": np.arange(5, dtype=np.uint16)[::-1],
        "swapped": np.arange(5, dtype=">f8"),
        "spread": np.broadcast_to(np.float16(2), (3, 3)),
        "empty": np.zeros((0, 3), np.int8),
        "é": np.array([True, False]),
        "large": fill("F32", (100, 1000))[:, ::2],
        "large.swapped": np.arange(50_000, dtype=">i8"),
    }
    write_tensors(tmp_path / "x", arrays, {"format": "np", "note": "ü"})
    loaded = safetensors.numpy.load_file(tmp_path / "x")
    assert set(loaded) == set(arrays)
    for name, array in arrays.items():
        assert loaded[name].shape == array.shape
        np.testing.assert_array_equal(loaded[name], array)
    with safetensors.safe_open(tmp_path / "x", "np") as file:
        assert file.metadata() == {"format": "np", "note": "ü"}


def test_same_bytes_as_the_package(tmp_path: Path) -> None:
    arrays = {"b": fill("U8", (3,)), "a": fill("F64", (2, 2)), "c": fill("BF16", (4,))}
    write_tensors(tmp_path / "x", arrays, {"format": "pt"})
    expected = safetensors.numpy.save(arrays, {"format": "pt"})
    assert (tmp_path / "x").read_bytes() == expected
    (tmp_path / "y").write_bytes(expected)
    assert_same(open_tensors(tmp_path / "y")["c"], arrays["c"])


def test_torch_both_ways(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    pairs = {
        "bfloat16": ("BF16", "uint16"),
        "float8_e4m3fn": ("F8_E4M3", "uint8"),
        "float8_e5m2": ("F8_E5M2", "uint8"),
        "float8_e4m3fnuz": ("F8_E4M3FNUZ", "uint8"),
        "float8_e5m2fnuz": ("F8_E5M2FNUZ", "uint8"),
        "float8_e8m0fnu": ("F8_E8M0", "uint8"),
        "float32": ("F32", "int32"),
        "complex64": ("C64", "int64"),
        "bool": ("BOOL", "uint8"),
    }
    pairs = {name: pair for name, pair in pairs.items() if hasattr(torch, name)}
    arrays = {name: fill(dtype, (4, 8)) for name, (dtype, _) in pairs.items()}
    write_tensors(tmp_path / "ours", arrays, {"format": "pt"})
    loaded = load_file(tmp_path / "ours")
    for name, (_, carrier) in pairs.items():
        assert str(loaded[name].dtype) == f"torch.{name}"
        bits = loaded[name].view(getattr(torch, carrier)).numpy()
        assert bits.tobytes() == arrays[name].tobytes()
    save_file(loaded, tmp_path / "theirs")
    opened = open_tensors(tmp_path / "theirs")
    for name, array in arrays.items():
        assert_same(opened[name], array)


@pytest.mark.parametrize("small", [0, 100, 1 << 16])
def test_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    monkeypatch.setattr(module, "_SMALL", small)
    monkeypatch.setattr(module, "_BATCH", 1000)
    arrays = {f"t{i}": fill("BF16", (i % 90,), i) for i in range(300)}
    write_tensors(tmp_path / "x", arrays, {})
    opened = open_tensors(tmp_path / "x")
    for name, array in arrays.items():
        assert_same(opened[name], array)


def test_refuses_what_the_format_lacks(tmp_path: Path) -> None:
    arrays = {
        "__metadata__": np.ones(1),
        "layers.0.c": np.ones(1, np.complex128),
        "layers.1.s": np.array(["text"]),
        "layers.2.f": np.ones(1, ml_dtypes.float8_e3m4),
    }
    with pytest.raises(BadInputError) as caught:
        write_tensors(tmp_path / "x", arrays, {"a": 1})  # type: ignore[dict-item]
    assert [finding.code for finding in caught.value.findings] == [
        "bad-name",
        "unknown-dtype",
        "unknown-dtype",
        "unknown-dtype",
        "metadata-not-text",
    ]
    assert "layers.0.c: the tensor's dtype is 'complex128'" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BadInputError, match="surrogate"):
        write_tensors(tmp_path / "x", {"\ud800": np.ones(1)}, {})


def test_refuses_a_header_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HEADER_BYTES", 64)
    with pytest.raises(BadInputError, match="the format allows 64"):
        write_tensors(tmp_path / "x", {"a": np.ones(1)}, {"note": "long enough"})


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["_write", "fsync", "replace"])
def test_error_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, step: str
) -> None:
    path = tmp_path / "x"
    write_tensors(path, {"a": np.ones(2)}, {})
    before = path.read_bytes()

    def fail(*args: object) -> None:
        raise error

    owner: Any = {"_write": module, "fsync": os, "replace": Path}[step]
    monkeypatch.setattr(owner, step, fail)
    expected = BadInputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_tensors(path, {"b": np.ones(3)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_folder_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="cannot be written: No such file"):
        write_tensors(tmp_path / "no" / "x", {}, {})


def test_writes_in_parts(tmp_path: Path) -> None:
    class Slow:
        def __init__(self) -> None:
            self.got = b""

        def write(self, data: memoryview) -> int:
            self.got += bytes(data[:3])
            return min(3, len(data))

    slow = Slow()
    module._write_all(slow, b"0123456789", [np.arange(5, dtype=np.uint8)])  # type: ignore[arg-type]
    assert slow.got == b"0123456789\0\1\2\3\4"
