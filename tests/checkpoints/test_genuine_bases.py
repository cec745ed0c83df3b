"""Models that transformers 4 wrote come back as they were: v4 -> v5 -> v4."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import regraft

BASES = Path(__file__).parent.parent / "golden" / "bases"
OLD, NEW = "transformers-v4", "transformers-v5"


def stored(folder):
    """Every tensor's dtype, shape and bytes, and the metadata."""
    tensors, metadata = {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        raw = file.read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:begin])
        metadata[file.name] = header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            tensors[name] = entry["dtype"], entry["shape"], raw[begin + start : begin + end]
    return tensors, metadata


@pytest.mark.parametrize("base", sorted(BASES.iterdir()), ids=lambda base: base.name)
def test_a_genuine_model_is_the_same_after_both_ways(base, tmp_path):
    regraft.convert(base, tmp_path / "new", to=NEW)
    regraft.convert(tmp_path / "new", tmp_path / "old", to=OLD)
    assert stored(tmp_path / "old") == stored(base)
    for file in base.glob("*.json"):
        assert (tmp_path / "old" / file.name).read_bytes() == file.read_bytes()
    assert stored(base)[0]
