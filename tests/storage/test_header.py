"""Reading headers: what is accepted, and what every kind of broken file is told."""

import bz2
import gzip
import json
import lzma
import os
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regraft.errors import BadInputError
from regraft.storage import header as header_module
from regraft.storage.dtypes import DTYPES
from regraft.storage.header import read_header
from regraft.storage.header_check import check_header, is_long

FUZZ = settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def pack(header: Any, data: bytes = b"") -> bytes:
    if not isinstance(header, (str, bytes)):
        header = json.dumps(header)
    text = header.encode() if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any, shape: Any, *offsets: Any, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets), **more}


def refuse(tmp_path: Path, content: bytes) -> list[tuple[str, str | None, str]]:
    """The findings for a file of this content, as code, key and text; all must name the file."""
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInputError) as caught:
        read_header(path)
    assert all(finding.where == str(path) for finding in caught.value.findings)
    return [(finding.code, finding.key, str(finding)) for finding in caught.value.findings]


def accept(tmp_path: Path, content: bytes) -> header_module.Header:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(content)
    return read_header(path)


def test_reads_a_header(tmp_path: Path) -> None:
    text = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "b": entry("F32", [2, 1], 2, 10),
            "a": entry("BF16", [], 0, 2),
            "none": entry("I64", [3, 0], 2, 2),
            "é": entry("F4", [2, 2], 10, 12),
        }
    )
    header = accept(tmp_path, pack(text + "   ", bytes(12)))
    assert list(header.tensors) == ["b", "a", "none", "é"]
    info = header.tensors["b"]
    assert (info.dtype, info.shape, info.start, info.end) == ("F32", (2, 1), 2, 10)
    assert header.metadata == {"format": "pt"}
    assert header.data_start == 8 + len(text) + 3
    assert header.size == header.data_start + 12


@pytest.mark.parametrize("text", ["{}", '{"__metadata__":{}}', '{"__metadata__":null}', "{}  "])
def test_accepts_a_file_without_tensors(tmp_path: Path, text: str) -> None:
    header = accept(tmp_path, pack(text))
    assert (header.tensors, header.metadata) == ({}, {})


def test_accepts_what_only_looks_like_a_duplicate(tmp_path: Path) -> None:
    metadata = {"config": '{"a":1,"a":2}', "note": "x:y"}
    tensors = {"a:b": entry("U8", [1], 0, 1), 'q"{-0': entry("U8", [1], 1, 2)}
    header = accept(tmp_path, pack({"__metadata__": metadata, **tensors}, b"xy"))
    assert list(header.tensors) == ["a:b", 'q"{-0']
    assert header.metadata == metadata


def test_a_model_called_v1_0_is_read_as_quickly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ``-0`` in the metadata is none of a number."""
    monkeypatch.setattr("regraft.storage.header.check_header", None)
    metadata = {"ss_base_model_version": "sdxl_base_v1-0"}
    text = {"__metadata__": metadata, "a": entry("U8", [1], 0, 1)}
    (tmp_path / "x.safetensors").write_bytes(pack(text, b"x"))
    assert read_header(tmp_path / "x.safetensors").metadata == metadata


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"nothing\.safetensors: the file does not exist"):
        read_header(tmp_path / "nothing.safetensors")


def test_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(BadInputError, match="a link whose target does not exist"):
        read_header(tmp_path / "link")


def test_folder_and_pipe(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="expected a file, and this is a folder"):
        read_header(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(BadInputError, match="not a regular file"):
            read_header(tmp_path / "pipe")


def test_path_with_a_nul() -> None:
    with pytest.raises(BadInputError, match=r"path is not valid|does not exist"):
        read_header("a\0b")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "locked"
    path.write_bytes(pack({}))
    path.chmod(0)
    with pytest.raises(BadInputError, match="may not be read"):
        read_header(path)


ONE = entry("U8", [1], 0, 1)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"


@pytest.mark.parametrize(
    ("content", "code", "text"),
    [
        (b"", "file-truncated", "has 0 bytes"),
        (b"1234567", "file-truncated", "has 7 bytes"),
        ((100).to_bytes(8, "little") + b"{}", "file-truncated", "given as 100 bytes"),
        ((2**63).to_bytes(8, "little") + b"{}", "header-too-large", str(2**63)),
        (b"\xff" * 20, "header-too-large", "allows 100000000"),
        (POINTER, "lfs-pointer", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "html-page", "HTML page"),
        (b"<html><body>Not found", "html-page", "raw link"),
        (b"PK\x03\x04\xff\xff\xff\xff....", "zip-archive", "adapter_model.bin"),
        (gzip.compress(b"{}", mtime=1700000000), "other-format", "compressed"),
        (
            gzip.compress(random.Random(1).randbytes(700_000), 1, mtime=0),
            "other-format",
            "compressed",
        ),
        (lzma.compress(b"{}"), "other-format", "unpack it"),
        (bz2.compress(b"{}"), "other-format", "unpack it"),
        (b"\x28\xb5\x2f\xfd" + bytes(20), "other-format", "compressed"),
        (pack(b'{"\xff":1}'), "header-not-utf8", "byte 2"),
        (pack('{"a":'), "header-not-json", "not JSON"),
        (pack("{}\0\0"), "header-not-json", "Extra data"),
        (pack('{"a":' + "[" * 200_000), "header-not-json", "nested too deep"),
        (pack('{"a":' + "9" * 9000 + "}"), "header-not-json", "thousands of digits"),
        (pack("[]"), "header-not-object", "must be a JSON object"),
        (pack(" {}"), "header-not-object", "begins with ' {}'"),
        (pack(""), "header-not-object", "begins with ''"),
        (pack({"__metadata__": {"a": 1}}), "metadata-not-text", "'a' is 1"),
        (pack({"__metadata__": ["a"]}), "metadata-not-text", "it is ['a']"),
        (pack('{"__metadata__":{"a":"1","a":"2"}}'), "duplicate-key", "has 'a' 2 times"),
        (pack('{"__metadata__":{"a":"\\ud800"}}'), "metadata-not-text", "surrogate"),
        (pack({}, b"xx"), "trailing-bytes", "2 bytes follow"),
    ],
)
def test_refuses_a_file(tmp_path: Path, content: bytes, code: str, text: str) -> None:
    (found,) = refuse(tmp_path, content)
    assert found[0] == code
    assert text in found[2]


@pytest.mark.parametrize(
    ("value", "code", "text"),
    [
        (5, "bad-entry", "it is 5"),
        (["U8", [1], [0, 1]], "bad-entry", "expected an object with dtype, shape, data_offsets"),
        (None, "bad-entry", "it is null"),
        ({"dtype": "U8", "shape": [1]}, "missing-field", "has no data_offsets"),
        ({"dtype": "U8", "data_offsets": [0, 1]}, "missing-field", "has no shape"),
        ({"shape": [1], "data_offsets": [0, 1]}, "missing-field", "has no dtype"),
        (entry("U8", [1], 0, 1, strides=[1]), "unknown-field", "unknown field 'strides'"),
        (entry("F9", [1], 0, 1), "unknown-dtype", "'F9'; the format knows BOOL"),
        (entry(7, [1], 0, 1), "unknown-dtype", "the format knows BOOL"),
        (entry("U8", [-1], 0, 1), "bad-shape", "it is [-1]"),
        (entry("U8", [1.0], 0, 1), "bad-shape", "it is [1.0]"),
        (entry("U8", [True], 0, 1), "bad-shape", "it is [true]"),
        (entry("U8", ["1"], 0, 1), "bad-shape", "it is ['1']"),
        (entry("U8", {}, 0, 1), "bad-shape", "it is an object"),
        (entry("U8", 1, 0, 1), "bad-shape", "it is 1"),
        (entry("U8", [1] * 33, 0, 1), "bad-shape", "33 axes"),
        (entry("U8", [2**62, 2**62, 4], 0, 1), "bad-shape", "memory can address"),
        (entry("U8", [10**4000], 0, 1), "bad-shape", "a huge number"),
        (entry("U8", [1], 0), "bad-offsets", "two whole numbers"),
        (entry("U8", [1], -1, 0), "bad-offsets", "it is [-1, 0]"),
        (entry("U8", [1], 0, 1.5), "bad-offsets", "it is [0, 1.5]"),
        (entry("U8", [1], 1, 0), "bad-offsets", "[1, 0] end before they begin"),
        (entry("U8", [1], 0, 2**63), "bad-offsets", "beyond the largest file"),
        (entry("F32", [1], 0, 1), "size-mismatch", "F32 of shape [1] takes 4 bytes"),
        (entry("F4", [3], 0, 1), "size-mismatch", "takes 1.5 bytes"),
    ],
)
def test_refuses_a_tensor(tmp_path: Path, value: Any, code: str, text: str) -> None:
    (found,) = refuse(tmp_path, pack({"layers.0.w": value}, b"x"))
    assert found[:2] == (code, "layers.0.w")
    assert text in found[2]


def test_zero_size_tensor_that_nothing_can_hold(tmp_path: Path) -> None:
    (found,) = refuse(tmp_path, pack({"a": entry("F64", [0, 2**60], 0, 0)}))
    assert found[0] == "bad-shape"


@pytest.mark.parametrize("number", ["-0", "1e0", "NaN"])
def test_refuses_odd_numbers(tmp_path: Path, number: str) -> None:
    text = '{"a":{"dtype":"U8","shape":[0,' + number + '],"data_offsets":[0,0]}}'
    assert refuse(tmp_path, pack(text))[0][:2] == ("bad-shape", "a")


def test_duplicate_tensor(tmp_path: Path) -> None:
    one = json.dumps(ONE)
    (found,) = refuse(tmp_path, pack(f'{{"a":{one},"b.w":{{}},"b.w":{one},"a":{one}}}', b"x"))[:1]
    assert found[:2] == ("duplicate-key", "a")
    found_all = refuse(tmp_path, pack(f'{{"a":{one},"\\u0061":{one}}}', b"x"))
    assert found_all == [found]
    assert "has 'a' 2 times" in found[2]


def test_duplicate_that_a_short_entry_hides(tmp_path: Path) -> None:
    # The second "a" brings one colon, which the name "b:c" would have too.
    text = '{"a":{},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    assert refuse(tmp_path, pack(text, b"x"))[0][:2] == ("duplicate-key", "a")
    text = '{"a:b":{"dtype":"U8","data_offsets":[0,1]}}'
    assert refuse(tmp_path, pack(text, b"x"))[0][:2] == ("missing-field", "a:b")


def test_duplicate_field_and_metadata(tmp_path: Path) -> None:
    text = '{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (found,) = refuse(tmp_path, pack(text, b"x"))
    assert found[:2] == ("duplicate-key", "a")
    assert "'dtype' 2 times" in found[2]
    text = '{"__metadata__":{"a":"1"},"__metadata__":{"b":"2"}}'
    (found,) = refuse(tmp_path, pack(text))
    assert found[:2] == ("duplicate-key", "__metadata__")


def test_half_a_surrogate_in_a_name(tmp_path: Path) -> None:
    text = '{"\\ud800":' + json.dumps(ONE) + "}"
    assert refuse(tmp_path, pack(text, b"x"))[0][0] == "bad-name"


@pytest.mark.parametrize("name", ["a" * 513, "a." * 64 + "weight"])
def test_a_name_that_no_model_has_is_not_matched_with_anything(tmp_path: Path, name: str) -> None:
    (found,) = refuse(tmp_path, pack(json.dumps({name: ONE}), b"x"))
    assert found[0] == "bad-name"
    assert not is_long("a" * 512) and not is_long("a." * 63 + "weight")


def test_layout(tmp_path: Path) -> None:
    tensors = {
        "a": entry("U8", [2], 0, 2),
        "b": entry("U8", [2], 1, 3),
        "c": entry("U8", [1], 4, 5),
    }
    found = refuse(tmp_path, pack(tensors, bytes(6)))
    assert [item[:2] for item in found] == [
        ("overlap", "b"),
        ("hole", "c"),
        ("trailing-bytes", None),
    ]
    assert "begin at 1 of the data, within 'a', which ends at 2" in found[0][2]
    assert "bytes 3 to 4" in found[1][2]


def test_empty_tensor_within_another(tmp_path: Path) -> None:
    tensors = {"a": entry("U8", [2], 0, 2), "b": entry("U8", [0], 1, 1)}
    assert refuse(tmp_path, pack(tensors, b"xx"))[0][:2] == ("overlap", "b")


def test_truncated_data(tmp_path: Path) -> None:
    tensors = {f"t{i}": entry("U8", [10], 10 * i, 10 * i + 10) for i in range(5)}
    (found,) = refuse(tmp_path, pack(tensors, bytes(25)))
    assert found[:2] == ("file-truncated", "t2")
    assert "need 50 bytes of data and the file has 25" in found[2]
    assert "3 tensors" in found[2]


def test_all_problems_come_together(tmp_path: Path) -> None:
    tensors = {
        "__metadata__": {"x": 1},
        "a": entry("F9", [1], 0, 1),
        "b": entry("F32", [-1], 1, 5),
        "c": {"dtype": "U8"},
    }
    found = refuse(tmp_path, pack(tensors, bytes(5)))
    assert [item[:2] for item in found] == [
        ("metadata-not-text", "__metadata__"),
        ("unknown-dtype", "a"),
        ("bad-shape", "b"),
        ("missing-field", "c"),
        ("missing-field", "c"),
    ]


def test_problems_are_limited(tmp_path: Path) -> None:
    found = refuse(tmp_path, pack({f"t{i}": 0 for i in range(5000)}))
    assert len(found) == 1001
    assert found[-1][0] == "more-problems"


def test_long_names_are_shortened(tmp_path: Path) -> None:
    for found in refuse(tmp_path, pack({"n" * 100_000: 0})):
        assert len(found[2]) < 1000


def test_separators_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_module, "_MAX_SEPARATORS", 30)
    monkeypatch.setattr(header_module, "_SHORT_HEADER_BYTES", 30)
    found = refuse(tmp_path, pack('{"a":{"shape":[' + "1," * 50 + "1]}}"))
    assert found[0][0] == "header-too-large"


NAMES = st.one_of(
    st.sampled_from(["a", "a:b", 'q"', "{", "-0", "é", "", "w.lora_A.weight"]), st.text(max_size=4)
)


@st.composite
def sound_headers(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(NAMES, NAMES, max_size=3))
    at = 0
    for name in draw(st.lists(NAMES, max_size=5, unique=True)):
        dtype = DTYPES[draw(st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "BOOL", "I64"]))]
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = dtype.bits // 8
        for length in shape:
            size *= length
        header[name] = entry(dtype.name, shape, at, at + size)
        at += size
    order = draw(st.permutations(list(header)))
    return {name: header[name] for name in order}, bytes(at)


def compare(path: Path, content: bytes) -> None:
    """Reads the file and checks that the reference implementation reads the same, if anything."""
    path.write_bytes(content)
    size = int.from_bytes(content[:8], "little")
    text, rest = content[8 : 8 + size], len(content) - 8 - size
    quick = header_module._decode_sound(text, rest) if rest >= 0 else None
    try:
        header = read_header(path)
    except BadInputError:
        assert quick is None
        return
    rows, metadata, findings = check_header(text, rest, str(path))
    assert not findings
    assert metadata == header.metadata
    assert {k: (v.dtype, v.shape, v.start, v.end) for k, v in header.tensors.items()} == rows
    expected = {
        name: (info["dtype"], tuple(info["shape"]), bytes(info["data"]))
        for name, info in safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    }
    data = content[header.data_start :]
    assert expected == {
        name: (info.dtype, info.shape, data[info.start : info.end])
        for name, info in header.tensors.items()
    }


@pytest.mark.slow
@FUZZ
@given(content=st.one_of(st.binary(max_size=64), st.binary(max_size=64).map(pack)))
def test_fuzz_bytes(tmp_path: Path, content: bytes) -> None:
    compare(tmp_path / "f", content)


@pytest.mark.slow
@FUZZ
@given(sound=sound_headers(), ascii_only=st.booleans(), spaced=st.booleans())
def test_fuzz_sound(
    tmp_path: Path, sound: tuple[dict[str, Any], bytes], ascii_only: bool, spaced: bool
) -> None:
    header, data = sound
    separators = (", ", ": ") if spaced else (",", ":")
    text = json.dumps(header, ensure_ascii=ascii_only, separators=separators)
    content = pack(text, data)
    compare(tmp_path / "f", content)
    accept(tmp_path, content)


TOKENS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"-", b"-0", b"0", b"1", b"9" * 30, b"\\", b" "]
TOKENS += [b"\xff", b"null", b'"dtype":"U8",', b'"a":{},', b'"__metadata__":{},', b"1.0", b"\0"]


@pytest.mark.slow
@FUZZ
@given(sound=sound_headers(), data=st.data())
def test_fuzz_mutated(
    tmp_path: Path, sound: tuple[dict[str, Any], bytes], data: st.DataObject
) -> None:
    text = bytearray(json.dumps(sound[0], separators=(",", ":")).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        removed = data.draw(st.sampled_from([0, 0, 1, 1, 2, 8]))
        text[at : at + removed] = data.draw(st.sampled_from(TOKENS) | st.binary(max_size=2))
    tail = data.draw(st.sampled_from([b"", b"", b"\0"]))
    compare(tmp_path / "f", pack(bytes(text), sound[1] + tail))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5),
    st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 1.5, "U8", "F4", "x", [], {}, [0, 1], [0, 0]]),
)


@pytest.mark.slow
@FUZZ
@given(sound=sound_headers(), data=st.data())
def test_fuzz_fields(
    tmp_path: Path, sound: tuple[dict[str, Any], bytes], data: st.DataObject
) -> None:
    header = json.loads(json.dumps(sound[0]))
    if header:
        target = header[data.draw(st.sampled_from(sorted(header)))]
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
        inner = target.get(field)
        if isinstance(inner, list) and inner and data.draw(st.booleans()):
            inner[data.draw(st.integers(0, len(inner) - 1))] = data.draw(VALUES)
        elif data.draw(st.booleans()):
            target[field] = data.draw(VALUES)
        else:
            target.pop(field, None)
    compare(tmp_path / "f", pack(header, sound[1]))
