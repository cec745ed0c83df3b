"""Distributed checkpoints of torch, without torch: four ranks' chunks against the whole tensors."""

import os
import pickle
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints.models import MIXTRAL, mixtral, write_folder
from object_server import serving

import regraft
from regraft.cli.run import run
from regraft.errors import BadInputError
from regraft.sources.places import leave, locate
from regraft.storage.chunked import ChunkedFile
from regraft.storage.dcp import Chunk, Chunked, covers, read_dcp
from regraft.storage.safetensors import open_tensors, read_header

DCP = Path(__file__).parent / "dcp"
CONFIG = {**MIXTRAL, "num_hidden_layers": 1, "intermediate_size": 5}


def whole():
    """What scripts/make_dcp.py cut and saved."""
    made = mixtral(inner=5, layers=1)
    return {name: array.astype(kind_of(name)) for name, array in made.items()}


def kind_of(name):
    if "norm" in name:
        return np.float32
    return np.float16 if "lm_head" in name else ml_dtypes.bfloat16


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    leave()


@pytest.mark.parametrize("form", ["nested", "flat", "shards"])
def test_chunks_make_up_the_tensors(form):
    got = open_tensors(locate(DCP / form) / "model.safetensors")
    expected = whole()
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert (got[name].shape, got[name].dtype) == (array.shape, array.dtype)
        assert got[name].tobytes() == array.tobytes(), name


def test_any_part_is_the_same():
    path = locate(DCP / "flat") / "model.safetensors"
    tensors, _ = read_dcp(DCP / "flat")
    file = ChunkedFile(DCP / "flat", tensors, "flat")
    everything = bytes(file.read(0, file.found.size))
    assert read_header(path).size == file.found.size
    random = np.random.default_rng(0)
    for _ in range(300):
        start, stop = sorted(random.integers(0, file.found.size + 1, 2).tolist())
        assert bytes(file.read(start, stop)) == everything[start:stop]
    file.close()


def test_random_grids(tmp_path):
    """Chunks along any dims, many of them with short runs."""
    random = np.random.default_rng(1)
    for trial in range(20):
        shape = tuple(random.integers(1, [7, 150, 5][: (dims := random.integers(1, 4))]).tolist())
        array = random.integers(0, 255, shape).astype(np.uint8)
        cuts = [sorted({0, n, *random.integers(0, n + 1, 2).tolist()}) for n in shape]
        chunks, data = [], b""
        for cell in np.ndindex(*(len(each) - 1 for each in cuts)):
            box = [(each[i], each[i + 1]) for i, each in zip(cell, cuts, strict=True)]
            part = array[tuple(slice(a, b) for a, b in box)].tobytes()
            offsets, sizes = tuple(a for a, _ in box), tuple(b - a for a, b in box)
            chunks.append(
                Chunk(offsets, sizes, "x.safetensors", len(data), len(part), is_item=False)
            )
            data += part
        assert covers(shape, chunks)
        (tmp_path / "x.safetensors").write_bytes(data)
        file = ChunkedFile(tmp_path, {"x": Chunked("U8", shape, tuple(chunks), ("x",))}, "x")
        head = len(file.head)
        for _ in range(20):
            start, stop = sorted(random.integers(0, array.size + 1, 2).tolist())
            expected = array.reshape(-1)[start:stop].tobytes()
            assert bytes(file.read(head + start, head + stop)) == expected, (trial, dims, shape)
        file.close()


def test_converts_like_the_whole(tmp_path, monkeypatch, capsys):
    plain = write_folder(tmp_path / "plain", whole(), CONFIG)
    regraft.convert(plain, tmp_path / "expected", to="transformers-v5")
    expected = open_tensors(tmp_path / "expected" / "model.safetensors")
    with serving() as server:
        for name, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s"), ("REGION", "r")):
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        server.put_folder(DCP / "flat", "b/run")
        places = [DCP / "nested", DCP / "flat", DCP / "shards", "s3://b/run"]
        for number, place in enumerate(places):
            out = tmp_path / f"out{number}"
            report = regraft.convert(place, out, to="transformers-v5")
            made = open_tensors(out / "model.safetensors")
            assert {n: a.tobytes() for n, a in made.items()} == {
                n: a.tobytes() for n, a in expected.items()
            }
            left = [note for note in report.checkpoint.notes if "left behind" in note]
            assert len(left) == (number == 0), "an optimizer's state is named, and left"
    assert run(["verify", str(DCP / "nested"), str(tmp_path / "out0")]) == 0
    assert run(["inspect", str(DCP / "nested"), "--key", "model"]) == 0
    assert str(DCP / "nested") in capsys.readouterr().out


def test_in_parts(tmp_path):
    regraft.convert(DCP / "nested", tmp_path / "whole", to="transformers-v5")
    options = {"to": "transformers-v5", "stage": tmp_path / "stage", "key": "model"}
    for part in ("0/2", "1/2"):
        regraft.convert(DCP / "nested", tmp_path / "out", part=part, **options)
    regraft.convert(DCP / "nested", tmp_path / "out", commit=True, **options)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_the_key(tmp_path):
    with pytest.raises(BadInputError) as error:
        regraft.convert(DCP / "nested", tmp_path / "out", to="transformers-v5", key="nothing")
    assert error.value.findings[0].code == "which-key"
    regraft.convert(DCP / "nested", tmp_path / "out", to="transformers-v5", key="model")


class _Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/regraft-was-here",)


def _bomb():
    """A key that could never be hashed."""
    value = ()
    for _ in range(60):
        value = (value, value)
    return b"\x80\x04}" + pickle.dumps(value, protocol=4)[2:-1] + b"K\x01s."


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(_Evil(), protocol=2),
        b"",
        b"\x80\x02.",
        b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.",
        _bomb(),
        pickle.dumps({"a": 1}, protocol=2),
        pickle.dumps([1] * 10, protocol=4)[:-3],
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}X\x01\x00\x00\x00ak\x00sb.",
    ],
    ids=["system", "empty", "nothing", "eval", "bomb", "dict", "short", "odd"],
)
def test_hostile_metadata_is_refused(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".metadata").write_bytes(content)
    with pytest.raises(BadInputError) as error:
        read_dcp(tmp_path / "run")
    assert error.value.findings[0].code == "bad-dcp"
    assert not Path("/tmp/regraft-was-here").exists()


@pytest.mark.parametrize("seed", range(3))
def test_damaged_folders_are_errors_or_the_same(tmp_path, seed):
    """Any byte of the metadata or of the items' frames changed: never other numbers, and no crash."""
    random = np.random.default_rng(seed)
    content = (DCP / "flat" / ".metadata").read_bytes()
    shutil.copytree(DCP / "flat", tmp_path / "run")
    for _ in range(60):
        wrong = bytearray(content)
        wrong[random.integers(len(wrong))] ^= 1 << random.integers(8)
        (tmp_path / "run" / ".metadata").write_bytes(wrong)
        try:
            tensors, _ = read_dcp(tmp_path / "run")
            ChunkedFile(tmp_path / "run", tensors, "run").close()
        except BadInputError:
            continue


def test_files_that_are_cut_off_or_change(tmp_path):
    shutil.copytree(DCP / "flat", tmp_path / "run")
    last = tmp_path / "run" / "__3_0.distcp"
    data = last.read_bytes()
    last.write_bytes(data[:-100])
    with pytest.raises(BadInputError, match="a chunk ends at"):
        locate(tmp_path / "run")
    last.write_bytes(data)
    stand_in = locate(tmp_path / "run") / "model.safetensors"
    last.write_bytes(data[::-1])
    with pytest.raises(BadInputError, match="changed while it was read"):
        open_tensors(stand_in)
    last.unlink()
    leave()
    with pytest.raises(BadInputError, match="does not exist"):
        locate(tmp_path / "run")


def test_chunks_that_do_not_fit():
    chunk = lambda at, size: Chunk((at,), (size,), "", 0, 0)  # noqa: E731
    assert covers((4,), [chunk(0, 4)])
    assert not covers((4,), [chunk(0, 2), chunk(1, 2)])
    assert not covers((4,), [chunk(0, 5)])
    assert not covers((4,), [chunk(0, 3)])
    assert covers((0,), [])
