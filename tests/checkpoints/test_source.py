"""Opening checkpoints: hostile and broken ones end with an error that says what is wrong."""

import json
import pickle
import zipfile

import numpy as np
import pytest
from checkpoints.models import mixtral, write_folder

import regraft
from regraft.checkpoints.source import is_checkpoint, open_checkpoint
from regraft.checkpoints.verify import verify
from regraft.errors import BadInputError
from regraft.storage.safetensors import open_tensors, write_tensors
from regraft.storage.torch_file import read_torch

INDEX = "model.safetensors.index.json"


def folder(tmp_path, change=None, shards=2):
    src = write_folder(tmp_path / "src", mixtral(), shards=shards)
    if change is not None:
        index = json.loads((src / INDEX).read_text())
        change(index)
        (src / INDEX).write_text(json.dumps(index))
    return src


@pytest.mark.parametrize(
    "name",
    ["../other.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "x.txt", 7, None],
)
def test_an_index_that_leads_elsewhere(tmp_path, name):
    src = folder(tmp_path, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(BadInputError, match="must be a file of this folder"):
        open_checkpoint(src)


def test_an_index_that_is_none(tmp_path):
    src = folder(tmp_path, lambda index: index.update(weight_map=[1, 2]))
    with pytest.raises(BadInputError, match="weight_map"):
        open_checkpoint(src)


def test_everything_that_is_wrong_is_told_together(tmp_path):
    src = folder(tmp_path, shards=3)
    (src / "model-00001-of-00003.safetensors").unlink()
    (src / "model-00002-of-00003.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(BadInputError) as caught:
        open_checkpoint(src)
    assert [finding.code for finding in caught.value.findings] == [
        "missing-file",
        "header-too-large",
    ]


def test_keys_that_are_not_where_the_index_says(tmp_path):
    def change(index):
        index["weight_map"]["model.extra"] = "model-00001-of-00002.safetensors"

    with pytest.raises(BadInputError, match="it is in no file") as caught:
        open_checkpoint(folder(tmp_path, change))
    assert {finding.key for finding in caught.value.findings} == {"model.extra"}


def changed(index):
    """Not what is in the files: loaders do not look at it, for they read whole files."""
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    index["weight_map"]["model.embed_tokens.weight"] = "model-00002-of-00002.safetensors"
    del index["weight_map"]["lm_head.weight"]


def test_an_index_that_is_not_right_is_mended(tmp_path):
    src = folder(tmp_path, changed)
    report = regraft.convert(src, tmp_path / "out", to="transformers-v5")
    told = [note for note in report.notes if INDEX in note]
    assert len(told) == 2 and "lm_head.weight" in told[1]
    listed = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    for shard in (tmp_path / "out").glob("*.safetensors"):
        assert all(listed[name] == shard.name for name in open_tensors(shard))


@pytest.mark.parametrize("shard", [["a"], {}, None, 3])
def test_an_index_of_anything_beside_a_whole_file_is_left_aside(tmp_path, shard):
    src = write_folder(tmp_path / "src", mixtral())
    (src / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    assert any("left aside" in note for note in open_checkpoint(src).notes)


def test_a_whole_file_beside_a_stale_index(tmp_path):
    src = folder(tmp_path)
    for shard in src.glob("model-*"):
        shard.unlink()
    write_tensors(src / "model.safetensors", mixtral(), {"format": "pt"})
    write_tensors(src / "model-00001-of-00007.safetensors", {"old": np.zeros(1)}, {})
    report = regraft.convert(src, tmp_path / "out", to="transformers-v5")
    assert any("left aside" in note for note in report.notes)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["config.json", "model.safetensors"]


def test_shards_of_another_save_beside_a_whole_set(tmp_path):
    src = folder(tmp_path)
    (src / INDEX).unlink()
    write_tensors(src / "model-00001-of-00007.safetensors", {"old": np.zeros(1)}, {})
    report = regraft.convert(src, tmp_path / "out", to="transformers-v5")
    assert any("00007" in note and "no whole set" in note for note in report.notes)
    assert (tmp_path / "out" / INDEX).is_file()


def test_downloads_that_are_not_complete(tmp_path):
    src = folder(tmp_path, shards=3)
    (src / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(BadInputError, match=r"00002-of-00003.*2 of 3 files are, .*not complete"):
        open_checkpoint(src)
    (src / INDEX).unlink()
    with pytest.raises(BadInputError, match=r"2 of 3 files are here.*model-00002-of-00003"):
        open_checkpoint(src)


def test_a_whole_state_dict_of_fsdp(tmp_path):
    torch = pytest.importorskip("torch")
    src = folder(tmp_path)
    for file in src.glob("model*"):
        file.unlink()
    state = {k: torch.from_numpy(v) for k, v in mixtral().items()}
    torch.save(state, src / "pytorch_model_fsdp.bin")
    torch.save({"state": {}}, src / "optimizer.bin")
    report = regraft.convert(src, tmp_path / "out", to="transformers-v5")
    assert any("optimizer.bin" in note for note in report.notes)
    assert "model.layers.0.mlp.experts.down_proj" in open_tensors(
        tmp_path / "out/model.safetensors"
    )


def test_one_tensor_in_two_shards(tmp_path):
    src = folder(tmp_path)
    tensors = dict(open_tensors(src / "model-00001-of-00002.safetensors"))
    tensors["lm_head.weight"] = np.zeros(1)
    other = dict(open_tensors(src / "model-00002-of-00002.safetensors"))
    other["lm_head.weight"] = np.zeros(1)
    write_tensors(src / "model-00001-of-00002.safetensors", tensors, {})
    write_tensors(src / "model-00002-of-00002.safetensors", other, {})
    with pytest.raises(BadInputError, match=r"is in .* as well"):
        open_checkpoint(src)


def test_links(tmp_path):
    src = folder(tmp_path)
    shard = src / "model-00001-of-00002.safetensors"
    outside = shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(outside)
    with pytest.raises(BadInputError, match="leads out of the folder"):
        open_checkpoint(src)


def test_a_link_to_nothing(tmp_path):
    src = folder(tmp_path)
    (src / "tokenizer.json").symlink_to("nowhere.json")
    with pytest.raises(BadInputError, match=r"tokenizer\.json: it is a link to .*nowhere"):
        open_checkpoint(src)


def test_the_links_of_a_download_cache(tmp_path):
    snapshots = tmp_path / "models--a--b" / "snapshots" / "1234"
    src = write_folder(snapshots, mixtral())
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for file in list(src.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(blobs / file.name)
    regraft.convert(src, tmp_path / "out", to="transformers-v5")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_shards_without_an_index(tmp_path):
    src = folder(tmp_path)
    (src / INDEX).unlink()
    assert len(open_checkpoint(src).tensors) == len(mixtral())
    (src / "model-00001-of-00002.safetensors").rename(src / "other.safetensors")
    with pytest.raises(BadInputError, match="belong together"):
        open_checkpoint(src)


def test_what_is_a_checkpoint(tmp_path):
    src = folder(tmp_path)
    assert is_checkpoint(src) and is_checkpoint(src / "model-00001-of-00002.safetensors")
    (src / "adapter_config.json").write_text("{}")
    assert not is_checkpoint(src)
    assert not is_checkpoint(tmp_path / "nothing")


class TestTorch:
    """Files that torch.save wrote."""

    def save(self, path, state):
        torch = pytest.importorskip("torch")
        torch.save(state, path)

    def state(self):
        torch = pytest.importorskip("torch")
        return {name: torch.from_numpy(array) for name, array in mixtral().items()}

    def test_converts(self, tmp_path):
        src = write_folder(tmp_path / "src", mixtral())
        regraft.convert(src, tmp_path / "wanted", to="transformers-v5")
        (src / "model.safetensors").unlink()
        self.save(src / "pytorch_model.bin", self.state())
        regraft.convert(src, tmp_path / "out", to="transformers-v5")
        wanted, found = (
            open_tensors(tmp_path / name / "model.safetensors") for name in ("wanted", "out")
        )
        assert all(np.array_equal(wanted[name], found[name]) for name in wanted)
        assert wanted.keys() == found.keys()
        assert verify(src, tmp_path / "out").equal

    def test_shared_and_cut_storages_and_types(self, tmp_path):
        torch = pytest.importorskip("torch")
        base = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
        state = {
            "a": base,
            "b": base[1:3],
            "c": torch.nn.Parameter(torch.ones(3)),
            "d": torch.tensor(5),
            "e": torch.ones(2, dtype=torch.float8_e4m3fn),
            "f": torch.zeros(0, 3),
        }
        self.save(tmp_path / "x.bin", state)
        infos = read_torch(tmp_path / "x.bin")
        data = (tmp_path / "x.bin").read_bytes()
        for name, tensor in state.items():
            info = infos[name]
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            assert data[info.start : info.end] == flat.tobytes()
            assert info.shape == tuple(tensor.shape)
        assert [infos[name].dtype for name in "abcde"] == ["BF16", "BF16", "F32", "I64", "F8_E4M3"]

    def test_not_in_a_row(self, tmp_path):
        torch = pytest.importorskip("torch")
        self.save(tmp_path / "x.bin", {"a": torch.ones(3, 4).t()})
        with pytest.raises(BadInputError, match="do not lie in a row"):
            read_torch(tmp_path / "x.bin")

    @pytest.mark.parametrize("what", [print, zipfile.ZipFile, np.dtype])
    def test_code_is_never_run(self, tmp_path, what):
        class Evil:
            def __reduce__(self):
                return what, ("x",)

        with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"a": Evil()}))
        with pytest.raises(BadInputError, match=f"made by .*{what.__name__}"):
            read_torch(tmp_path / "x.bin")

    def test_storages_that_lie(self, tmp_path):
        self.save(tmp_path / "x.bin", self.state())
        data = (tmp_path / "x.bin").read_bytes()
        for cut in (100, len(data) // 2, len(data) - 10):
            (tmp_path / "cut.bin").write_bytes(data[:cut])
            with pytest.raises(BadInputError):
                read_torch(tmp_path / "cut.bin")
