"""Headers that are rewritten where they are."""

import os
import shutil

import numpy as np
import pytest
from checkpoints.models import mixtral, snapshot, write_folder
from killing import run_killed

import regraft
from regraft.checkpoints import in_place
from regraft.checkpoints.source import open_checkpoint
from regraft.checkpoints.verify import verify
from regraft.errors import BadInputError, RefusedError
from regraft.storage.safetensors import open_tensors

GRANITE = {
    "model_type": "granitemoe",
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_local_experts": 3,
    "num_hidden_layers": 1,
    "rope_theta": 1e4,
}


def granite():
    at = "model.layers.0.block_sparse_moe."
    shapes = {
        "model.embed_tokens.weight": (10, 8),
        at + "input_linear.weight": (3, 12, 8),
        at + "output_linear.weight": (3, 8, 6),
        at + "router.layer.weight": (3, 8),
    }
    return {name: np.random.default_rng(1).random(shape) for name, shape in shapes.items()}


def make(tmp_path, shards=1):
    """With room for longer names in the headers."""
    src = write_folder(tmp_path / "src", granite(), GRANITE, shards=shards)
    for file in src.glob("*.safetensors"):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        head = data[8 : 8 + length] + b" " * 400
        file.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length :])
    return src


def test_there_and_back(tmp_path):
    src = make(tmp_path)
    regraft.convert(src, tmp_path / "wanted", to="transformers-v5")
    before = open_tensors(src / "model.safetensors")
    regraft.convert(src, src, to="transformers-v5", in_place=True)
    assert verify(tmp_path / "wanted", src).equal
    assert {path.name for path in src.iterdir()} == {"config.json", "model.safetensors"}
    regraft.convert(src, src, to="transformers-v4", in_place=True)
    after = open_tensors(src / "model.safetensors")
    assert list(before) == list(after)


def test_a_header_that_does_not_fit(tmp_path):
    regraft.convert(make(tmp_path), tmp_path / "v5", to="transformers-v5")
    src = tmp_path / "v5"
    before = snapshot(src)
    with pytest.raises(RefusedError, match="takes"):
        regraft.convert(src, src, to="transformers-v4", in_place=True)
    assert snapshot(src) == before


def test_more_than_names(tmp_path):
    src = write_folder(tmp_path / "src", mixtral())
    before = snapshot(src)
    with pytest.raises(RefusedError, match="more than names changes"):
        regraft.convert(src, src, to="transformers-v5", in_place=True)
    assert snapshot(src) == before


@pytest.mark.parametrize("kind", ["symlink", "hardlink"])
def test_a_file_with_another_name(tmp_path, kind):
    src = make(tmp_path)
    file = src / "model.safetensors"
    if kind == "hardlink":
        (src / "twin.txt").hardlink_to(file)
    else:
        file.rename(src / "real.safetensors")
        file.symlink_to("real.safetensors")
    with pytest.raises(RefusedError, match="other names"):
        regraft.convert(src, src, to="transformers-v5", in_place=True)


def test_options_of_writing_are_refused(tmp_path):
    src = make(tmp_path)
    before = snapshot(src)
    options = {"dtype": "float16", "jobs": 2, "overwrite": True}
    with pytest.raises(BadInputError, match="--overwrite and --dtype and --jobs: they say how"):
        regraft.convert(src, src, to="transformers-v5", in_place=True, **options)
    assert snapshot(src) == before


def test_one_run_at_a_time(tmp_path, monkeypatch):
    src = make(tmp_path)
    write_head = in_place._write_head

    def meanwhile(path, head):
        with pytest.raises(BadInputError, match="another run") as caught:
            regraft.convert(src, src, to="transformers-v5", in_place=True)
        assert caught.value.findings[0].code == "in-use"
        write_head(path, head)

    monkeypatch.setattr(in_place, "_write_head", meanwhile)
    regraft.convert(src, src, to="transformers-v5", in_place=True)


def test_a_full_disk_puts_everything_back(tmp_path, monkeypatch):
    src = make(tmp_path)
    before = snapshot(src)
    replace = in_place._replace

    def full(path, data):
        monkeypatch.setattr(in_place, "_replace", replace)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(in_place, "_replace", full)
    with pytest.raises(BadInputError, match="No space left"):
        regraft.convert(src, src, to="transformers-v5", in_place=True)
    assert snapshot(src) == before


@pytest.mark.slow
def test_killed_at_every_step(tmp_path):
    """The next run comes to its end, and in between nothing takes the files for whole."""
    made = make(tmp_path, shards=3)
    wanted = tmp_path / "wanted"
    shutil.copytree(made, wanted)
    regraft.convert(wanted, wanted, to="transformers-v5", in_place=True)
    states = set()
    for step in range(80):
        src = tmp_path / f"killed{step}"
        shutil.copytree(made, src)
        options = {"to": "transformers-v5", "in_place": True}
        done = run_killed(step, [(os, "fsync")], regraft.convert, src, src, **options)
        left = snapshot(src)
        if left in (snapshot(made), snapshot(wanted)):
            states.add("whole")
        elif (src / ".regraft-in-place").exists():
            states.add("unfinished")
            with pytest.raises(BadInputError, match="did not come to its end"):
                open_checkpoint(src)
        regraft.convert(src, src, to="transformers-v5", in_place=True)
        assert snapshot(src) == snapshot(wanted)
        if done:
            break
    else:
        pytest.fail("it never came to its end")
    assert states == {"whole", "unfinished"}
