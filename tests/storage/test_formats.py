"""Forms of weights that are not read are told by what they are, and torch's files whatever they are called."""

import json
import struct
import zipfile

import numpy as np
import pytest
from checkpoints.models import MIXTRAL, mixtral

import regraft
from regraft.errors import BadInputError
from regraft.storage.safetensors import open_tensors

V5 = "transformers-v5"
GGUF = b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(64)
HDF5 = b"\x89HDF\r\n\x1a\n" + bytes(64)


def npz(path):
    np.savez(path, a=np.ones(3))


def archive(*names):
    def write(path):
        with zipfile.ZipFile(path, "w") as out:
            for name in names:
                out.writestr(name, "x")

    return write


FILES = {
    "model.gguf": (GGUF, "GGUF"),
    "renamed.safetensors": (GGUF, "GGUF"),
    "tf_model.h5": (HDF5, "HDF5"),
    "flax_model.msgpack": (b"\x81", "msgpack"),
    "w.npz": (npz, "numpy archive"),
    "w.npy": (lambda path: np.save(path, np.ones(3)), "array of numpy"),
    "script.pt": (archive("s/code/a.py", "s/data.pkl", "s/constants.pkl"), "TorchScript"),
    "model.onnx": (b"\x08\x08", "ONNX"),
    "big.nemo": (bytes(257) + b"ustar" + bytes(200), "tar"),
    "mp_rank_00_model_states.pt": (b"PK", "DeepSpeed"),
    "optimizer.pt": (b"PK", "optimizer"),
    "consolidated.00.pth": (b"PK", "Meta publishes"),
}
FOLDERS = {
    "zero": (["latest", "zero_to_fp32.py", "global_step9/mp_rank_00_model_states.pt"], "DeepSpeed"),
    "verl": (["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"], "each rank"),
    "megatron": (
        ["latest_checkpointed_iteration.txt", "iter_9/mp_rank_00/model_optim_rng.pt"],
        "Megatron",
    ),
    "llama": (["consolidated.00.pth", "params.json"], "Meta publishes"),
    "orbax": (["manifest.ocdbt", "d/x"], "orbax"),
}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)


def told(src, tmp_path):
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, tmp_path / "out", to=V5)
    (finding,) = caught.value.findings
    # What a GGUF file is, its own dialect says, which reads adapters.
    assert finding.code == "other-format" or "GGUF" in finding.message
    assert finding.fix and not (tmp_path / "out").exists()
    return finding.message


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path):
    content, words = FILES[name]
    write(tmp_path / name, content)
    assert words in told(tmp_path / name, tmp_path)


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name, tmp_path):
    files, words = FOLDERS[name]
    for file in files:
        write(tmp_path / "src" / file, b"PK")
    (tmp_path / "src" / "config.json").write_text("{}")
    assert words in told(tmp_path / "src", tmp_path)


@pytest.mark.parametrize("name", ["flax_model.msgpack", "tf_model.h5", "model.gguf"])
def test_a_folder_of_a_hub_with_other_weights_only(name, tmp_path):
    write(tmp_path / "src" / name, FILES[name][0])
    (tmp_path / "src" / "config.json").write_text(json.dumps(MIXTRAL))
    assert FILES[name][1] in told(tmp_path / "src", tmp_path)


@pytest.mark.parametrize("name", ["plain.pt", "plain.pth", "last.ckpt"])
@pytest.mark.parametrize("under", [None, "state_dict", "model", "model_state_dict", "module"])
def test_torch_files_are_read_whatever_their_name(name, under, tmp_path):
    torch = pytest.importorskip("torch")
    state = {key: torch.from_numpy(value) for key, value in mixtral().items()}
    whole = state if under is None else {under: state, "epoch": 3, "optimizer": {"lr": 0.1}}
    torch.save(whole, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    regraft.convert(tmp_path / name, tmp_path / "out", to=V5)
    made = open_tensors(tmp_path / "out" / "model.safetensors")
    assert "model.layers.1.mlp.experts.down_proj" in made
