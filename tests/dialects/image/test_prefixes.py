"""Names that begin as no tool writes them: what is said of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import regraft
from regraft.checking.for_tool import check_for
from regraft.dialects.image.inspect import summarize


def _lora(path: Path, *modules: str) -> Path:
    tensors = {}
    for module in modules:
        tensors[f"{module}.lora_down.weight"] = np.ones((2, 8), "f4")
        tensors[f"{module}.lora_up.weight"] = np.ones((8, 2), "f4")
        tensors[f"{module}.alpha"] = np.array(2, "f4")
    save_file(tensors, path)
    return path


_UNET = "mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("prefix", "module"),
    [
        ("lora_net_", _UNET),
        ("lora_unett_", _UNET),
        ("lora_te9_", _UNET),
        ("net.", "double_blocks.0.img_attn.qkv"),
        ("pipe.dit.", "blocks.0.self_attn.q"),
    ],
)
def test_a_wrong_prefix_is_named(tmp_path: Path, prefix: str, module: str) -> None:
    src = _lora(tmp_path / "lora.safetensors", prefix + module)
    with pytest.raises(regraft.UnmatchedKeysError) as raised:
        regraft.convert(src, tmp_path / "out.safetensors", to="diffusers")
    (finding,) = raised.value.findings
    assert repr(prefix) in finding.message
    assert finding.key == prefix + module
    assert "lora_unet_" in (finding.fix or "")
    assert repr(prefix) in summarize(src).problem
    assert repr(prefix) in check_for(src, "diffusers").failures[0]


def test_names_of_no_known_model_in_kohyas_form(tmp_path: Path) -> None:
    src = _lora(tmp_path / "lora.safetensors", "some_strange_layer_0", "some_strange_layer_1")
    with pytest.raises(regraft.UnmatchedKeysError, match="no family of image or video models"):
        regraft.convert(src, tmp_path / "out.safetensors", to="diffusers")


def test_factors_alone_are_no_checkpoint(tmp_path: Path) -> None:
    src = _lora(tmp_path / "lora.safetensors", "base_model.model.model.layers.0.self_attn.q_proj")
    with pytest.raises(regraft.BadInputError, match=r"there is no adapter_config\.json beside it"):
        regraft.convert(src, tmp_path / "out", to="transformers-v5")
