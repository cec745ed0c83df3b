"""Forms of weights that are not read are told by what they are, and torch's files whatever they are called."""

import gzip
import json
import lzma
import struct
import zipfile
from functools import partial

import numpy as np
import pytest
from checkpoints.models import MIXTRAL, mixtral

import regraft
from regraft.cli import main
from regraft.errors import BadInputError
from regraft.storage.safetensors import open_tensors, write_tensors

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


def mistral(path):
    write_tensors(path, {"layers.0.attention.wq.weight": np.ones((4, 8), np.float32)}, {})


FILES = {
    "model.gguf": (GGUF, "GGUF"),
    "renamed.safetensors": (GGUF, "GGUF"),
    "tf_model.h5": (HDF5, "HDF5"),
    "flax_model.msgpack": (b"\x81", "msgpack"),
    "w.npz": (npz, "numpy archive"),
    "w.npy": (lambda path: np.save(path, np.ones(3)), "array of numpy"),
    "script.pt": (archive("s/code/a.py", "s/data.pkl", "s/constants.pkl"), "TorchScript"),
    "model.onnx": (b"\x08\x08", "ONNX"),
    "packed.safetensors": (gzip.compress(bytes(64)), "compressed"),
    "pytorch_model.bin": (lzma.compress(bytes(64)), "compressed"),
    "packed.pt": (b"\x28\xb5\x2f\xfd" + bytes(64), "compressed"),
    "big.nemo": (bytes(257) + b"ustar" + bytes(200), "tar"),
    "mp_rank_00_model_states.pt": (b"PK", "DeepSpeed"),
    "optimizer.pt": (b"PK", "optimizer"),
    "consolidated.00.pth": (b"PK", "Meta publishes"),
    "consolidated.safetensors": (mistral, "Mistral publishes"),
    "ggml-model.bin": (b"tjgg" + bytes(64), "before GGUF"),
    "small.tflite": (b"\x1c\0\0\0TFL3" + bytes(64), "TensorFlow Lite"),
    "model.keras": (archive("config.json", "model.weights.h5"), "Keras"),
    "model_state.pdparams": (b"\x80\x04", "PaddlePaddle"),
}
FOLDERS = {
    "zero": (["latest", "zero_to_fp32.py", "global_step9/mp_rank_00_model_states.pt"], "DeepSpeed"),
    "verl": (["extra_state_world_size_2_rank_0.pt"], "each rank"),
    "megatron": (
        ["latest_checkpointed_iteration.txt", "iter_9/mp_rank_00/model_optim_rng.pt"],
        "Megatron",
    ),
    "llama": (["consolidated.00.pth", "params.json"], "Meta publishes"),
    "tensorflow": (["bert_model.ckpt.index", "bert_model.ckpt.meta"], "checkpoint of TensorFlow"),
    "saved": (["saved_model.pb", "variables/variables.index"], "SavedModel"),
    "openvino": (["openvino_model.xml", "openvino_model.bin"], "OpenVINO"),
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
    state = {key: torch.from_numpy(value) for key, value in mixtral().items()}
    whole = state if under is None else {under: state, "epoch": 3, "optimizer": {"lr": 0.1}}
    torch.save(whole, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    regraft.convert(tmp_path / name, tmp_path / "out", to=V5)
    made = open_tensors(tmp_path / "out" / "model.safetensors")
    assert "model.layers.1.mlp.experts.down_proj" in made


@pytest.mark.parametrize("name", ["last.ckpt", "epoch=3.ckpt", "mine.pt", "weights.pth", "a.bin"])
def test_a_folder_with_one_file_of_torchs(name, tmp_path, capsys):
    state = {key: torch.from_numpy(value) for key, value in mixtral().items()}
    (tmp_path / "src").mkdir()
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "src" / name)
    torch.save({"state": {}}, tmp_path / "src" / "optimizer.pt")
    (tmp_path / "src" / "config.json").write_text(json.dumps(MIXTRAL))
    report = regraft.convert(tmp_path / "src", tmp_path / "out", to=V5)
    assert len(open_tensors(tmp_path / "out" / "model.safetensors")) == 19
    assert any(name in note for note in report.notes)
    assert main(["inspect", str(tmp_path / "src")]) == 0
    assert name in capsys.readouterr().out


def test_of_several_files_of_torchs_none_is_chosen(tmp_path):
    for name in ("last.ckpt", "epoch=3.ckpt"):
        write(tmp_path / "src" / name, partial(torch.save, {"a": torch.ones(2)}))
    (tmp_path / "src" / "config.json").write_text(json.dumps(MIXTRAL))
    with pytest.raises(BadInputError, match=r"epoch=3\.ckpt, last\.ckpt"):
        regraft.convert(tmp_path / "src", tmp_path / "out", to=V5)


def test_a_folder_of_torchs_files_without_a_config(tmp_path):
    state = {key: torch.from_numpy(value) for key, value in mixtral().items()}
    (tmp_path / "src").mkdir()
    torch.save(state, tmp_path / "src" / "mine.pt")
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    out = tmp_path / "out"
    arguments = ["convert", str(tmp_path / "src"), str(out), "--to", V5, "--model", str(tmp_path)]
    assert main(arguments) == 0
    assert len(open_tensors(out / "mine.safetensors")) == 19


torch = pytest.importorskip("torch")


def lightning(state, **more):
    """What Lightning's trainer saves."""
    moments = {i: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)} for i in range(2)}
    return {
        "epoch": 3,
        "global_step": 300,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}],
        "lr_schedulers": [],
        **more,
    }


def test_checkpoints_of_training_runs(tmp_path, capsys):
    state = {key: torch.from_numpy(value) for key, value in mixtral().items()}
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    torch.save(state, tmp_path / "plain.pt")
    torch.save(lightning(state), tmp_path / "last.ckpt")
    average = {key: value + 1 for key, value in state.items()}
    torch.save(lightning(state, ema={"shadow": average}), tmp_path / "two.ckpt")
    report = regraft.convert(tmp_path / "plain.pt", tmp_path / "plain", to=V5)
    assert not report.notes
    report = regraft.convert(tmp_path / "last.ckpt", tmp_path / "last", to=V5)
    [note] = report.notes
    assert "5 states of the training, such as callbacks.ModelCheckpoint{}.best_model_score" in note
    with pytest.raises(
        BadInputError, match=r"below several keys: ema\.shadow, state_dict"
    ) as caught:
        regraft.convert(tmp_path / "two.ckpt", tmp_path / "two", to=V5)
    assert caught.value.findings[0].code == "which-key"
    with pytest.raises(BadInputError, match="below several keys: callbacks"):
        regraft.convert(tmp_path / "two.ckpt", tmp_path / "two", to=V5, key="nothing")
    line = ["convert", str(tmp_path / "two.ckpt"), "--to", V5]
    assert main([*line, str(tmp_path / "one"), "--key", "state_dict"]) == 0
    assert "left behind" in capsys.readouterr().out
    assert main([*line, str(tmp_path / "average"), "--key", "ema.shadow", "-q"]) == 0
    made = {
        name: (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("plain", "last", "one", "average")
    }
    assert made["plain"] == made["last"] == made["one"] != made["average"]


def test_a_dict_that_holds_itself(tmp_path):
    state = {key: torch.from_numpy(value) for key, value in mixtral().items()}
    whole = {"state_dict": state}
    whole.update({f"again{number}": whole for number in range(200)})
    torch.save(whole, tmp_path / "loop.ckpt")
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    regraft.convert(tmp_path / "loop.ckpt", tmp_path / "out", to=V5)
