"""What anybody can write into a file's metadata under regraft's name: it changes no number and costs no memory."""

import json
import shutil
import tracemalloc

import numpy as np
import pytest
from test_golden import GOLDEN, base_of, read

import regraft
from regraft.adapters.provenance import KEY
from regraft.storage.safetensors import open_tensors, read_header, write_tensors

V4, V5 = "transformers-v4", "transformers-v5"
CASE = "mixtral__gud_attn"
SOURCE = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "new"
    regraft.convert(GOLDEN / "cases" / CASE, folder, to=V5, model=base_of(CASE))
    return folder


def inject(converted, folder, change):
    """The converted adapter with another entry of regraft's."""
    shutil.copytree(converted, folder)
    file = folder / "adapter_model.safetensors"
    tensors, header = dict(open_tensors(file)), read_header(file)
    entry = json.loads(header.metadata[KEY])
    change(entry)
    tensors = {name: np.array(tensor) for name, tensor in tensors.items()}
    write_tensors(file, tensors, {**header.metadata, KEY: json.dumps(entry)})
    return folder


def parts(*noted):
    return lambda entry: entry.update(parts={"x": [list(item) for item in noted]})


PARTS = {
    "a rank that no factor has": parts((SOURCE, 4, 1 << 19, 8, 0)),
    "experts without end": parts(*((f"x{n}.{{}}.w", 1 << 19, 1 << 19, 8, 0) for n in range(999))),
    "places that are none": parts((SOURCE, 4, 4, 8, [900000, 1, 1, 2])),
    "places below zero": parts((SOURCE, 4, 4, 8, -3)),
    "another scale": parts((SOURCE, 4, 4, 1e-200, 0)),
    "no scale at all": parts((SOURCE, 4, 4, 0, 0)),
    "the components of another": parts((SOURCE, 4, 4, 8, 2)),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_record_of_something_else_changes_nothing(name, converted, tmp_path):
    src = inject(converted, tmp_path / "src", PARTS[name])
    tracemalloc.start()
    done = regraft.convert(src, tmp_path / "out", to=V4, model=base_of(CASE), verify=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    assert done.written
    assert {t.dtype.kind for t in read(tmp_path / "out")[0].values()} == {"f"}
