"""Opening files that torch.save wrote."""

import argparse
import os
import pickle
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from regraft.errors import BadInputError
from regraft.storage.torch_file import open_torch, read_run

torch: Any = pytest.importorskip("torch")


def save(tmp_path: Path, value: Any, **options: Any) -> Path:
    path = tmp_path / "adapter_model.bin"
    torch.save(value, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_bits(tmp_path: Path, zipped: bool) -> None:
    bits = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    tensors = {
        "f32": torch.randn(3, 4).T,
        "bf16": bits.view(torch.bfloat16),
        "f8": bits.clone().view(torch.float8_e4m3fn).reshape(16, 16),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3, dtype=torch.float16),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    if not zipped:
        # torch cannot write 8-bit floats in its older form.
        tensors["f8"] = torch.zeros(1)
    path = save(tmp_path, tensors, _use_new_zipfile_serialization=zipped)
    opened = open_torch(path)
    assert list(opened) == list(tensors)
    np.testing.assert_array_equal(opened["f32"], tensors["f32"].numpy())
    assert opened["bf16"].dtype == ml_dtypes.bfloat16
    assert opened["bf16"].tobytes() == bytes(range(256))
    if zipped:
        assert opened["f8"].dtype == ml_dtypes.float8_e4m3fn
        assert opened["f8"].tobytes() == bytes(range(256))
    assert opened["scalar"].shape == ()
    assert opened["empty"].shape == (0, 3)
    with pytest.raises(ValueError, match="read-only"):
        opened["parameter"][0] = 2


@pytest.mark.parametrize(
    ("value", "key", "text"),
    [
        ([torch.ones(1)], None, "the file holds of type list"),
        ({"a": 1}, "a", "expected a tensor, and it is of type int"),
        ({"state_dict": {"a": torch.ones(1)}}, "state_dict", "of type dict"),
        ({1: torch.ones(1)}, "1", "the key must be text"),
        ({"s": torch.eye(2).to_sparse()}, "s", "must be dense"),
        ({"m": torch.ones(2, device="meta")}, "m", "has no data"),
        ({"e": torch.ones(1).expand(10**9)}, "e", "larger than the whole file"),
        ({"c": torch.ones(1, dtype=torch.complex128)}, "c", "complex128"),
    ],
)
def test_refuses(tmp_path: Path, value: Any, key: str | None, text: str) -> None:
    path = save(tmp_path, value)
    with pytest.raises(BadInputError) as caught:
        open_torch(path)
    (finding,) = caught.value.findings
    assert (finding.where, finding.key) == (str(path), key)
    assert text in str(finding)
    assert "as safetensors" in str(finding) or finding.code == "unknown-dtype"


def test_refuses_a_type_without_numpy(tmp_path: Path) -> None:
    path = save(tmp_path, {"h": torch.ones(1, dtype=torch.complex32)})
    with pytest.raises(BadInputError, match="h: the tensor's dtype is 'complex32'"):
        open_torch(path)


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm"),))


@pytest.mark.parametrize("zipped", [True, False])
def test_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, {"a": Harm()}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(BadInputError, match="only plain tensors") as caught:
        open_torch(path)
    assert "weights_only=False" not in str(caught.value)
    assert not Path("harm").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "torch did not write this|only plain tensors"),
        (b"garbage", "torch did not write this|only plain tensors"),
        (pickle.dumps({"a": 1}), "torch did not write this|only plain tensors"),
        (b"PK\x03\x04 cut off", "torch did not write this"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<html>", "HTML page"),
    ],
)
def test_other_content(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=text):
        open_torch(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="does not exist"):
        open_torch(tmp_path / "adapter_model.bin")


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, {"a": torch.ones(1)})
    monkeypatch.setitem(sys.modules, "torch", None)
    assert open_torch(path)["a"].tolist() == [1]


@pytest.mark.parametrize("zipped", [True, False])
def test_shared_memory_is_shared(tmp_path: Path, zipped: bool) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"whole": whole, "row": whole[1], "column": whole[:, 2]}
    path = save(tmp_path, state, _use_new_zipfile_serialization=zipped)
    opened = open_torch(path)
    for name, tensor in state.items():
        np.testing.assert_array_equal(opened[name], tensor.numpy())
    assert np.shares_memory(opened["whole"], opened["column"])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_protocols(tmp_path: Path, zipped: bool, protocol: int) -> None:
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()
    options = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": protocol}
    opened = open_torch(save(tmp_path, state, **options))
    assert list(opened) == list(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(opened[name], tensor.numpy())


def zipped(path: Path, data: bytes, method: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a/data.pkl", data)
        for name, content in members.items():
            archive.writestr(f"a/data/{name}", content)
    return path


DOUBLED = b"K\x01K\x01\x86" + b"q\x00h\x00\x86" * 60
"""A tuple that holds one twice that holds one twice ...: to hash it takes 2 to the 60 steps."""


@pytest.mark.parametrize(
    ("pickled", "text"),
    [
        pytest.param(b"\x80\x02}" + DOUBLED + b"K\x01s.", "a key of type tuple", id="doubled key"),
        pytest.param(b"\x80\x02" + DOUBLED + b"Q.", "a storage", id="doubled id"),
        pytest.param(b"\x80\x02" + DOUBLED + b".", "of type tuple", id="doubled value"),
        pytest.param(b"\x80\x02]r\x00\x00\x00\x10.", "of type list", id="memo index 2^28"),
        pytest.param(b"\x80\x02]r\xff\xff\xff\xff.", "of type list", id="memo index 2^32"),
        pytest.param(b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.", "did not write", id="long text"),
        pytest.param(b"\x80\x02\x8b\xff\xff\xff\x7f.", "did not write", id="long number"),
        pytest.param(b"(" * 100_000 + b".", "did not write", id="marks"),
        pytest.param(b"]" + b"\x85" * 20_000 + b".", "of type tuple", id="deep"),
        pytest.param(b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00lstR.", "os.system", id="code"),
        pytest.param(
            b"\x80\x02}X\x03\x00\x00\x00\xed\xa0\x80K\x01s.", "half of a surrogate", id="surrogate"
        ),
        pytest.param(b"\x80\x02i", "did not write|opcode", id="cut off"),
    ],
)
def test_pickles_that_take_time_or_memory(tmp_path: Path, pickled: bytes, text: str) -> None:
    """Time and memory are bounded by the size of the file."""
    path = zipped(tmp_path / "x.bin", pickled)
    tracemalloc.start()
    try:
        begin = time.perf_counter()
        with pytest.raises(BadInputError, match=text):
            open_torch(path)
        assert time.perf_counter() - begin < 3
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_compressed_members(tmp_path: Path) -> None:
    data = b"\x80\x02}(u." + b"\0" * 50_000_000
    path = zipped(tmp_path / "x.bin", data, zipfile.ZIP_DEFLATED)
    with pytest.raises(BadInputError, match="compressed or encrypted member"):
        open_torch(path)
    path = save(tmp_path, {"a": torch.zeros(100_000)})
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "y.bin", "w", 8) as packed:
        for name in whole.namelist():
            stored = zipfile.ZIP_STORED if name.endswith(".pkl") else zipfile.ZIP_DEFLATED
            packed.writestr(name, whole.read(name), stored)
    with pytest.raises(BadInputError, match="compressed or encrypted member"):
        open_torch(tmp_path / "y.bin")


def changed_directory(path: Path, member: str, flags: int = 0, offset: int | None = None) -> None:
    """Change what a zip archive's directory says of a member; the offset takes 64 bits."""
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
        infos = archive.infolist()
        info = next(info for info in infos if info.filename.endswith(member))
        info.flag_bits |= flags
        info.header_offset = info.header_offset if offset is None else offset
    content = path.read_bytes()[:directory]
    with path.open("wb") as file:
        file.write(content)
        archive = zipfile.ZipFile(file, "w")
        archive.filelist, archive.start_dir, archive._didModify = infos, directory, True  # type: ignore[attr-defined]
        archive.close()


@pytest.mark.parametrize("offset", [2**64 - 1, 2**62, 5])
def test_members_at_places_that_no_file_has(tmp_path: Path, offset: int) -> None:
    path = save(tmp_path, {"a": torch.ones(3)})
    changed_directory(path, "data/0", offset=offset)
    with pytest.raises(BadInputError, match="is not in the file"):
        open_torch(path)


@pytest.mark.parametrize("member", ["data.pkl", "byteorder", "data/0"])
def test_encrypted_members(tmp_path: Path, member: str) -> None:
    path = save(tmp_path, {"a": torch.ones(3)})
    changed_directory(path, member, flags=1)
    with pytest.raises(BadInputError, match="encrypted member"):
        open_torch(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["adapter_model/data/0", "adapter_model/data.pkl", "b/data.pkl"])
def test_archives_that_others_may_read_otherwise(tmp_path: Path, name: str) -> None:
    """Two members of one name, or two pickles: which one counts depends on who reads."""
    path = save(tmp_path, {"a": torch.ones(3)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"\0" * 12)
    with pytest.raises(BadInputError, match=r"two members of one name|several files data\.pkl"):
        open_torch(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_that_are_cut_or_changed(tmp_path: Path, zipped: bool) -> None:
    """Whatever byte is lost or another one, the tensors are there or it is said what is wrong."""
    state = {"a": torch.randn(4, 4), "b": torch.arange(3), "c": torch.ones(2, dtype=torch.bfloat16)}
    data = save(tmp_path, state, _use_new_zipfile_serialization=zipped).read_bytes()
    random = Random(1)
    path = tmp_path / "changed.bin"
    for _ in range(300):
        changed = bytearray(data[: random.randrange(len(data))] if random.random() < 0.3 else data)
        for _ in range(random.randrange(1, 4)):
            if changed:
                changed[random.randrange(len(changed))] = random.randrange(256)
        path.write_bytes(changed)
        try:
            opened = open_torch(path)
        except BadInputError:
            continue
        assert all(isinstance(name, str) for name in opened)
        assert sum(array.nbytes for array in opened.values()) <= 10 * len(data)


def test_a_tensor_that_lacks_its_strides(tmp_path: Path) -> None:
    """A call with fewer arguments than it takes is no plain tensor."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00aNK\x04tQ"
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x04\x85tR"
    file = tmp_path / "adapter_model.bin"
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("a/data.pkl", b"\x80\x02}X\x01\x00\x00\x00w" + made + b"s.")
        out.writestr("a/data/a", b"\0" * 16)
    with pytest.raises(BadInputError, match="lacks its storage, its shape or its strides"):
        open_torch(file)


class Held:
    """A class that no reader knows."""

    def __init__(self, inside: Any = None) -> None:
        self.inside = inside


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_objects_beside_the_model_are_left_and_said(
    tmp_path: Path, zipped: bool, protocol: int
) -> None:
    """A run's arguments and whatever else lies beside the tensors: never made, and named."""
    state = {
        "args": argparse.Namespace(lr=0.1, nested=Held({1, 2})),
        "model": {"w": torch.arange(6.0).reshape(2, 3)},
        "sets": {"a": {1}, "b": frozenset({2}), "c": Held(torch.ones(2)), 1.5: bytearray(b"x")},
        "counts": Counter("aab"),
        "when": datetime(2026, 1, 1, tzinfo=UTC),
        "kind": Held,
        "scalar": np.float64(3.0),
        "tuple keys": {(1, 2): 3, None: 4},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
    }
    path = tmp_path / "run.ckpt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    tensors, left = read_run(path, None)
    assert {name: info.shape for name, info in tensors.items()} == {"w": (2, 3)}
    said = " ".join(left)
    for text in (
        "args (made by argparse.Namespace)",
        "sets.a",
        "sets.c (made by",
        "counts",
        "when",
    ):
        assert text in said
    assert "optimizer.state.0.exp_avg" in left
    state["model"]["odd"] = Held()
    torch.save(state, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    with pytest.raises(BadInputError, match="odd: expected a tensor, and it is made by"):
        read_run(path, None)


@pytest.mark.parametrize("what", [eval, os.system, getattr, subprocess.Popen, __import__])
def test_a_file_that_runs_code_is_refused_whole(tmp_path: Path, what: Any) -> None:
    """Wherever in it that is; the tensors beside it are not read either."""

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return what, ("x",)

    path = save(tmp_path, {"model": {"w": torch.ones(2)}, "args": {"deep": [Evil()]}})
    with pytest.raises(BadInputError, match="by which a pickle runs code"):
        read_run(path, "model")


def test_tensors_that_share_their_bytes_are_no_way_to_fill_memory(tmp_path: Path) -> None:
    row = torch.zeros(100_000)
    tied = {"embed": row.view(10, 10_000), "head": row.view(10, 10_000)}
    assert len(open_torch(save(tmp_path, tied))) == 2
    many = save(tmp_path, {str(i): row.view(10, 10_000) for i in range(1000)})
    with pytest.raises(BadInputError, match="share their bytes"):
        open_torch(many)
