"""Heads of GGUF files, beside the package's own reader."""

from __future__ import annotations

import struct
from contextlib import suppress

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import regraft
from regraft.dialects.gguf import _read
from regraft.storage.gguf_file import read_gguf_head
from regraft.values import replace

gguf = pytest.importorskip("gguf")


def write(path, kind="adapter", tensors=None, words=()):
    """A file as llama.cpp's converter writes one."""
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 16.0)
    writer.add_bool("some.flag", True)
    writer.add_int8("some.small", -3)
    writer.add_uint64("some.large", 2**63)
    if words:
        writer.add_token_list(list(words))
        writer.add_array("some.numbers", [1, 2, 3])
    for name, (data, raw) in (tensors or {}).items():
        writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_fields_and_tensors_are_those_of_the_package(tmp_path):
    kinds, rng = gguf.GGMLQuantizationType, np.random.default_rng(0)
    a = rng.standard_normal((4, 64)).astype(np.float32)
    tensors = {
        "plain": (a, None),
        "half": (a.astype(np.float16), None),
        "double": (a.astype(np.float64), None),
        "brain": (a.astype(ml_dtypes.bfloat16).view(np.uint8), kinds.BF16),
        "eight": (gguf.quants.quantize(a, kinds.Q8_0), kinds.Q8_0),
        "four": (gguf.quants.quantize(a, kinds.Q4_0), kinds.Q4_0),
        "experts": (np.stack([a, 2 * a]), None),
    }
    path = write(tmp_path / "a.gguf", tensors=tensors, words=["one", "two"])
    head, reader = read_gguf_head(path), gguf.GGUFReader(path)
    assert head.lists == {"tokenizer.ggml.tokens": 2, "some.numbers": 3}
    fields = {name: f.contents() for name, f in reader.fields.items() if name[:5] != "GGUF."}
    assert head.fields == {name: x for name, x in fields.items() if name not in head.lists}
    read, quantised = _read(path, head)
    assert quantised == {"eight": "Q8_0", "four": "Q4_0"}
    assert read.keys() == {each.name for each in reader.tensors}
    for each in reader.tensors:
        assert read[each.name].shape == tuple(int(n) for n in reversed(each.shape))
        want = each.data
        if each.name == "brain":
            want = want.view(ml_dtypes.bfloat16)
        elif each.name in quantised:
            want = gguf.quants.dequantize(each.data, each.tensor_type)
        assert read[each.name].dtype == want.dtype
        np.testing.assert_array_equal(read[each.name].ravel(), want.ravel())


def test_a_file_of_the_other_byte_order_is_read(tmp_path):
    path = tmp_path / "big.gguf"
    name = b"general.type"
    field = struct.pack(">Q", len(name)) + name + struct.pack(">IQ", 8, 5) + b"other"
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 1) + field)
    head = read_gguf_head(path)
    assert (head.fields, head.order) == ({"general.type": "other"}, ">")


def test_a_model_is_refused_before_its_tensors_are_read(tmp_path, monkeypatch):
    path = write(
        tmp_path / "model.gguf", kind="model", tensors={"w": (np.ones((2, 32), "f4"), None)}
    )
    monkeypatch.setattr("regraft.dialects.gguf._read", None)
    with pytest.raises(regraft.BadInputError, match="no LoRA"):
        regraft.inspect(str(path))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    tensors = {"blk.0.attn_q.weight.lora_a": (np.ones((2, 32), "f4"), None)}
    return write(folder / "a.gguf", tensors=tensors, words=["one"]).read_bytes()


def test_a_file_that_ends_anywhere_in_its_head_is_told(sound, tmp_path):
    path = tmp_path / "cut.gguf"
    end = sound.index(b"lora_a") + 6
    for length in range(end):
        path.write_bytes(sound[:length])
        with pytest.raises(ValueError):
            read_gguf_head(path)


@given(st.data())
def test_any_bytes_are_a_head_or_an_error(sound, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    at = data.draw(st.integers(4, len(sound) - 1))
    new = data.draw(st.binary(min_size=1, max_size=9))
    path.write_bytes(sound[:at] + new + sound[at + len(new) :])
    with suppress(regraft.BadInputError):
        regraft.inspect(str(path))


def test_all_unsound_tensors_are_named_together(sound, tmp_path):
    path = tmp_path / "cut.gguf"
    two = {f"blk.0.attn_q.weight.lora_{x}": (np.ones((32, 32), "f4"), None) for x in "ab"}
    write(path, tensors=two)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(regraft.BadInputError) as told:
        regraft.inspect(str(path))
    assert [f.key for f in told.value.findings] == list(two)
    assert {f.code for f in told.value.findings} == {"bad-gguf"}


def test_tensors_that_share_bytes_are_refused(tmp_path):
    """Small files would become large ones in memory."""
    head = read_gguf_head(write(tmp_path / "a.gguf", tensors={"w": (np.ones((8, 64), "f4"), None)}))
    (tensor,) = head.tensors.values()
    shared = replace(head, tensors={str(i): tensor for i in range(3)})
    with pytest.raises(regraft.BadInputError, match="shares its bytes"):
        _read(tmp_path / "a.gguf", shared)


def test_what_is_quantised_is_read_in_parts(tmp_path, monkeypatch):
    a = np.random.default_rng(1).standard_normal((6, 512)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    data = gguf.quants.quantize(a, kind)
    path = write(tmp_path / "a.gguf", tensors={"w": (data, kind)})
    monkeypatch.setattr("regraft.dialects.gguf._BLOCKS", 7)
    read, _ = _read(path, read_gguf_head(path))
    np.testing.assert_array_equal(read["w"], gguf.quants.dequantize(data, kind))
