"""Files that people hand over and that are no safetensors: each is answered in its own words, and nothing is written.

Found by trying; the formats by their own first bytes.
"""

import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
from rebuilt import V5, lora, write_adapter, write_base

import regraft
from regraft.checkpoints.source import open_checkpoint

HDF5 = b"\x89HDF\r\n\x1a\n" + b"\0" * 64
NPZ = BytesIO()
np.savez(NPZ, a=np.ones(2))
KINDS = {
    "model.gguf": (b"GGUF\x03\0\0\0" + b"\0" * 64, "gguf"),
    "tf_model.h5": (HDF5, "tensorflow"),
    "flax_model.msgpack": (b"\x81\xa6params\x80", "flax"),
    "weights.npz": (NPZ.getvalue(), "npz"),
    "model.onnx": (b"\x08\x07\x12\x07pytorch" + b"\0" * 64, "onnx"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_format_is_named(name, tmp_path):
    content, word = KINDS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(regraft.RegraftError) as caught:
        regraft.convert(tmp_path / name, tmp_path / "new", to=V5)
    said = str(caught.value).lower()
    assert word in said and "adapter_config" not in said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_what_lies_beside_weights_is_no_weights_file(name, tmp_path):
    src = write_base(tmp_path / "src", "llama")
    (src / name).write_text("{}")
    with pytest.raises(regraft.RegraftError) as caught:
        open_checkpoint(src / name)
    assert "JSON" in str(caught.value) and "folder" in str(caught.value)


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_with_one_is_named(name, tmp_path):
    src = write_base(tmp_path / "src", "llama")
    (src / name).write_bytes(KINDS[name][0])
    with pytest.raises(regraft.RegraftError) as caught:
        regraft.convert(src, tmp_path / "new", to=V5)
    assert name in str(caught.value)


def test_an_empty_folder_says_what_is_looked_for(tmp_path):
    (tmp_path / "src").mkdir()
    with pytest.raises(regraft.RegraftError) as caught:
        regraft.convert(tmp_path / "src", tmp_path / "new", to=V5)
    assert "safetensors" in str(caught.value)


def test_adapters_in_a_folder_are_each_converted(tmp_path):
    """One that is wrong does not keep the others."""
    write_base(tmp_path / "base", "llama")
    (tmp_path / "all").mkdir()
    for n, layer in enumerate((0, 9)):
        shapes = lora({f"model.layers.{layer}.self_attn.q_proj": (16, 16)})
        write_adapter(tmp_path / "all" / f"a{n}", shapes, target_modules=["q_proj"])
    run = [sys.executable, "-m", "regraft", "convert", "all", "new", "--to", V5, "--model", "base"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "a1" in done.stdout + done.stderr
    assert (tmp_path / "new" / "a0" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "new" / "a1").exists()
