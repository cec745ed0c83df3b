"""Opening files that torch.save wrote."""

import pickle
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from regraft.errors import BadInputError
from regraft.storage.bin import open_bin

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
        # torch cannot load 8-bit floats from its older form with weights_only.
        tensors["f8"] = torch.zeros(1)
    path = save(tmp_path, tensors, _use_new_zipfile_serialization=zipped)
    opened = open_bin(path)
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
        open_bin(path)
    (finding,) = caught.value.findings
    assert (finding.where, finding.key) == (str(path), key)
    assert text in str(finding)
    assert "as safetensors" in str(finding) or finding.code == "unknown-dtype"


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_refuses_a_type_without_numpy(tmp_path: Path) -> None:
    path = save(tmp_path, {"h": torch.ones(1, dtype=torch.complex32)})
    with pytest.raises(BadInputError, match="h: the tensor's dtype is complex32"):
        open_bin(path)


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm"),))


@pytest.mark.parametrize("zipped", [True, False])
def test_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, {"a": Harm()}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(BadInputError, match="torch cannot load") as caught:
        open_bin(path)
    assert "weights_only=False" not in str(caught.value)
    assert not Path("harm").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "torch cannot load"),
        (b"garbage", "torch cannot load"),
        (pickle.dumps({"a": 1}), "torch cannot load"),
        (b"PK\x03\x04 cut off", "torch cannot load|zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<html>", "HTML page"),
    ],
)
def test_other_content(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=text):
        open_bin(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="does not exist"):
        open_bin(tmp_path / "adapter_model.bin")


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, {"a": torch.ones(1)})
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BadInputError, match=r"pip install regraft\[torch\]"):
        open_bin(path)
