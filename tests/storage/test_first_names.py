"""The first names of a file, for whoever asks whether it may be theirs."""

import numpy as np

from regraft.storage.header import first_names, read_header
from regraft.storage.safetensors import write_tensors


def test_names_of_a_short_header_are_all_found(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {name: np.zeros(1, np.float32) for name in ("a.0.lora_A.weight", "dtype", "é")}
    write_tensors(path, tensors, {"dtype": "is no tensor", "shape": "{"})
    assert set(first_names(path)) - {"__metadata__"} == set(read_header(path).tensors)


def test_only_the_beginning_of_a_long_header_is_looked_at(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {f"m.{i}.weight": np.zeros(1, np.int8) for i in range(5000)}, {})
    found = first_names(path)
    assert 100 < len(found) < 1000
    assert found == list(read_header(path).tensors)[: len(found)]


def test_what_is_no_such_file_has_none(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"PK\3\4 something else")
    assert first_names(path) == []
