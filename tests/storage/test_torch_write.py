"""What is written for torch is what torch reads, and what our own reader reads."""

import ml_dtypes
import numpy as np
import pytest
import torch

import regraft
from regraft.storage.torch_file import open_torch
from regraft.storage.torch_write import write_torch

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "turned": np.arange(6, dtype=np.float64).reshape(2, 3).T,
    "half": np.array([1.5], np.float16),
    "brain": np.ones((300, 2), ml_dtypes.bfloat16),
    "none": np.zeros((0, 4), np.float32),
    "one": np.array(2.5, np.float32),
}


@pytest.mark.parametrize("inside", [None, "model"])
def test_torch_reads_what_was_written(tmp_path, inside):
    path = tmp_path / "some.pt"
    write_torch(path, TENSORS, inside)
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        loaded = loaded[inside] if inside else loaded
        assert list(loaded) == list(TENSORS)
        for name, wanted in TENSORS.items():
            assert tuple(loaded[name].shape) == wanted.shape
            assert np.array_equal(loaded[name].double().numpy(), wanted.astype(np.float64)), name
            assert str(loaded[name].dtype) == f"torch.{wanted.dtype}"
    ours = open_torch(path, inside)
    assert all(np.array_equal(ours[name], TENSORS[name]) for name in TENSORS)
    again = tmp_path / "again.pt"
    write_torch(again, TENSORS, inside)
    assert again.read_bytes() == path.read_bytes()


def test_a_dtype_that_torch_has_no_storage_for_is_refused(tmp_path):
    with pytest.raises(regraft.BadInputError, match="int8"):
        write_torch(tmp_path / "x.pt", {"a": np.zeros(2, np.int8)})


def test_an_empty_dict(tmp_path):
    write_torch(tmp_path / "x.pt", {}, "model")
    assert torch.load(tmp_path / "x.pt", weights_only=True) == {"model": {}}
