"""Which dialects are asked about a path."""

from importlib import import_module

import numpy as np
import pytest

from regraft.dialects import tool_files
from regraft.dialects.registry import _BUILT_IN, _FILES, sniffed
from regraft.storage import torch_file
from regraft.storage.torch_write import write_torch


@pytest.mark.parametrize("name", sorted(_FILES))
def test_a_dialect_is_asked_where_a_file_of_its_name_is(name):
    module = import_module(_BUILT_IN[name].partition(":")[0])
    own = getattr(module, "WEIGHTS", None) or module.FILE
    assert own.endswith(_FILES[name])


def test_a_folder_without_its_file_needs_no_dialect(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert set(sniffed(tmp_path)) == {"peft"}


@pytest.mark.parametrize(
    "name", ["w.pt", "w.pth", "w.bin", "w.lora", "w.ckpt", "adapter_model.pt", "lit_model.pth.lora"]
)
def test_what_a_file_of_torch_is_is_told_without_its_tensors(name, tmp_path, monkeypatch):
    path = tmp_path / name
    write_torch(path, {"transformer.h.0.attn.qkv.lora_A": np.ones((2, 4), "f4")})

    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(torch_file, "_read", read)
    sniffed(path)
    sniffed(tmp_path)


def test_dialects_share_one_look_at_a_path(monkeypatch, tmp_path):
    looks = []
    look_now = tool_files._look_now
    monkeypatch.setattr(tool_files, "_look_now", lambda src: looks.append(src) or look_now(src))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    sniffed(tmp_path)
    assert looks == [tmp_path]
    sniffed(tmp_path)  # the files may be others now
    assert looks == [tmp_path, tmp_path]
