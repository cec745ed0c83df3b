"""Names in the metadata that stand for other tensors."""

import numpy as np
import pytest
from checkpoints.models import MIXTRAL, mixtral, write_folder

import regraft
from regraft.checkpoints.verify import verify
from regraft.errors import UnmatchedKeysError
from regraft.storage.safetensors import open_tensors, read_header

V4, V5 = "transformers-v4", "transformers-v5"
OLD = "model.layers.{}.block_sparse_moe."
GRANITE = {**MIXTRAL, "model_type": "granitemoe"}


def metadata_of(folder):
    return dict(read_header(folder / "model.safetensors").metadata)


def write(folder, tensors, aliases, config=MIXTRAL, **more):
    for name in aliases:
        tensors.pop(name, None)
    return write_folder(folder, tensors, config, metadata={"format": "pt", **aliases, **more})


def test_names_that_do_not_change_are_kept(tmp_path):
    aliases = {"lm_head.weight": "model.embed_tokens.weight"}
    src = write(tmp_path / "src", mixtral(), aliases, trained="yes")
    report = regraft.convert(src, tmp_path / "out", to=V5)
    assert metadata_of(tmp_path / "out") == metadata_of(src)
    assert report.notes == []
    regraft.convert(tmp_path / "out", tmp_path / "back", to=V4)
    assert metadata_of(tmp_path / "back") == metadata_of(src)
    assert verify(src, tmp_path / "back").equal


def test_names_on_both_sides_follow_the_renames(tmp_path):
    gates = [f"{OLD.format(layer)}gate.weight" for layer in range(2)]
    src = write(tmp_path / "src", mixtral(), {gates[1]: gates[0]})
    report = regraft.convert(src, tmp_path / "out", to=V5)
    new = "model.layers.{}.mlp.gate.weight"
    assert metadata_of(tmp_path / "out") == {"format": "pt", new.format(1): new.format(0)}
    assert new.format(1) not in open_tensors(tmp_path / "out" / "model.safetensors")
    assert report.notes == []
    regraft.convert(tmp_path / "out", tmp_path / "back", to=V4)
    assert metadata_of(tmp_path / "back") == {"format": "pt", gates[1]: gates[0]}


def test_in_place(tmp_path):
    tensors = {}
    for layer in range(2):
        tensors[f"{OLD.format(layer)}router.layer.weight"] = np.full((3, 8), layer, np.float32)
    tensors["model.norm.weight"] = np.zeros(8, np.float32)
    first, second = sorted(name for name in tensors if "router" in name)
    src = write(tmp_path / "src", tensors, {second: first}, GRANITE)
    regraft.convert(src, tmp_path / "out", to=V5)
    after = metadata_of(tmp_path / "out")
    assert len(after) == 2 and all("block_sparse_moe.router.layer" not in k for k in after)
    wide = write(tmp_path / "wide", tensors | {second: tensors[first]}, {second: first}, GRANITE)
    regraft.convert(wide, wide, to=V5, in_place=True)
    assert metadata_of(wide) == after


def test_what_an_equation_takes_gets_bytes_of_its_own(tmp_path):
    tensors = mixtral()
    one, other = (f"{OLD.format(0)}experts.{e}.w2.weight" for e in (0, 2))
    src = write(tmp_path / "src", tensors, {other: one})
    report = regraft.convert(src, tmp_path / "out", to=V5)
    made = open_tensors(tmp_path / "out" / "model.safetensors")
    down = made["model.layers.0.mlp.experts.down_proj"]
    assert np.array_equal(down[2], tensors[one]) and np.array_equal(down[0], tensors[one])
    assert metadata_of(tmp_path / "out") == {"format": "pt"}
    (note,) = report.notes
    assert other in note and "bytes of their own" in note
    assert verify(src, tmp_path / "out").equal


def test_a_name_that_nothing_explains(tmp_path):
    src = write(tmp_path / "src", mixtral(), {"model.surprise": "model.norm.weight"})
    with pytest.raises(UnmatchedKeysError, match="surprise"):
        regraft.convert(src, tmp_path / "out", to=V5)
    src = write(tmp_path / "two", mixtral(), {}, tied="model.norm.weight")
    regraft.convert(src, tmp_path / "out", to=V5)
    assert metadata_of(tmp_path / "out")["tied"] == "model.norm.weight"


def test_what_save_model_wrote_is_loaded_by_load_model(tmp_path):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")

    class Model(torch.nn.Module):
        def __init__(self, tensors):
            super().__init__()
            for name, tensor in tensors.items():
                at = self
                *path, last = name.split(".")
                for part in path:
                    if part not in at._modules:
                        at.add_module(part, torch.nn.Module())
                    at = at._modules[part]
                at.register_parameter(last, torch.nn.Parameter(torch.from_numpy(tensor.copy())))
            self.lm_head.weight = self.model.embed_tokens.weight

    old = Model(mixtral())
    src = write_folder(tmp_path / "src", mixtral())
    safetensors.save_model(old, str(src / "model.safetensors"))
    assert metadata_of(src)
    regraft.convert(src, tmp_path / "full", to=V5)
    made = open_tensors(tmp_path / "full" / "model.safetensors")
    new = Model(
        {**made, "lm_head.weight": made.get("lm_head.weight", np.zeros((10, 8), "f4"))}
        | {"model.embed_tokens.weight": np.zeros((10, 8), np.float32)}
    )
    safetensors.load_model(new, str(tmp_path / "full" / "model.safetensors"))
    assert torch.equal(new.lm_head.weight, old.lm_head.weight)
