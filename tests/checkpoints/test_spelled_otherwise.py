"""Files that are in the old layout, but not as transformers 4 spells it: what transformers 5 saves of new models."""

import json

import numpy as np
import pytest

import regraft
from regraft.storage.safetensors import open_tensors

pytest.importorskip("transformers", minversion="5.4")


def test_a_new_llava_saved_by_transformers_5_becomes_what_4_reads(tmp_path):
    import torch
    import transformers

    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**small, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(**small, num_key_value_heads=2, vocab_size=32),
        image_token_index=31,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "saved")
    saved = open_tensors(tmp_path / "saved/model.safetensors")
    assert any(name.startswith("vision_tower.encoder.") for name in saved)
    regraft.convert(tmp_path / "saved", tmp_path / "v4", to="transformers-v4")
    made = open_tensors(tmp_path / "v4/model.safetensors")
    assert len(made) == len(saved)
    tower = "vision_tower.vision_model."
    assert {n.replace("vision_tower.", tower) if "vision" in n else n for n in saved} == set(made)
    for name, tensor in made.items():
        assert np.array_equal(tensor, saved[name.replace(tower, "vision_tower.")])
    text = json.loads((tmp_path / "v4/config.json").read_text())["text_config"]
    assert "rope_parameters" not in text and text["rope_theta"] == 10000.0
