"""A family without a rule book is known from the modules of diffusers' class that its base names."""

import json

import numpy as np
import pytest

import regraft
from regraft.bridges import diffusers
from regraft.dialects.image.families import image_families
from regraft.storage.safetensors import open_tensors, write_tensors

MODULES = diffusers.Modules(
    ("blocks.0.attn.to_q", "blocks.0.attn_to.q"), (("pos_embed.proj", (2, 2)),)
)


class Asked:
    """Stands for the process that asks diffusers."""

    def __init__(self):
        self.configs = []

    def ask(self, config):
        self.configs.append(config)
        return MODULES


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setattr(diffusers, "find_spec", lambda name: True)
    monkeypatch.setattr(diffusers, "_THERE", Asked())
    return diffusers._THERE.configs


def pipeline(folder, cls="UnheardTransformer2DModel"):
    (folder / "transformer").mkdir(parents=True)
    config = {"_class_name": cls, "_diffusers_version": "0.42.1"}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    index = {
        "_class_name": "UnheardPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def lora():
    random = np.random.default_rng(0)
    shapes = {
        "lora_unet_blocks_0_attn_to_q": ((2, 8), (6, 2)),
        "lora_unet_pos_embed_proj": ((2, 4, 2, 2), (6, 2, 1, 1)),
        "lora_te2_encoder_block_0_layer_0_SelfAttention_q": ((2, 8), (6, 2)),
    }
    tensors = {}
    for stem, (down, up) in shapes.items():
        tensors[f"{stem}.lora_down.weight"] = random.normal(size=down).astype("f4")
        tensors[f"{stem}.lora_up.weight"] = random.normal(size=up).astype("f4")
        tensors[f"{stem}.alpha"] = np.float32(1)
    return tensors


def test_there_and_back_with_the_bases_folder(asked, tmp_path, monkeypatch):
    base, src = pipeline(tmp_path / "base"), tmp_path / "kohya.safetensors"
    monkeypatch.setattr(
        diffusers, "_THERE", Fixed(diffusers.Modules(MODULES.linears[:1], MODULES.convolutions))
    )
    tensors = lora()
    write_tensors(src, tensors, {})
    made, back = tmp_path / "diffusers.safetensors", tmp_path / "back.safetensors"
    regraft.convert(src, made, to="diffusers", model=base, verify=True)
    assert {key.rsplit(".lora_", 1)[0] for key in open_tensors(made)} == {
        "transformer.blocks.0.attn.to_q",
        "transformer.pos_embed.proj",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
    }
    assert regraft.verify(src, made, model=base).equal
    regraft.convert(made, back, to="kohya", model=base, verify=True)
    got = open_tensors(back)
    assert all(got[key].tobytes() == np.asarray(x).tobytes() for key, x in tensors.items())
    for to in ("comfyui", "ai-toolkit"):
        with pytest.raises(regraft.RefusedError, match="under its own code's names"):
            regraft.convert(src, tmp_path / "no.safetensors", to=to, model=base)
    with pytest.raises(regraft.RegraftError, match="--model"):
        regraft.convert(src, tmp_path / "no.safetensors", to="diffusers")
    assert len(image_families()) > 1


class Fixed:
    def __init__(self, modules):
        self.ask = lambda config: modules


def test_bases_with_a_rule_book_are_not_asked_about(asked, tmp_path):
    for cls in ("FluxTransformer2DModel", "UNet2DConditionModel"):
        assert diffusers.family_of_base(pipeline(tmp_path / cls, cls)) is None
    assert diffusers.family_of_base(tmp_path) is None
    assert diffusers.family_of_base(None) is None
    assert not asked
    assert diffusers.family_of_base(pipeline(tmp_path / "other") / "transformer") is not None
    assert len(asked) == 1


def test_without_diffusers_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers, "find_spec", lambda name: None)
    with pytest.raises(regraft.BadInputError, match=r"regraft\[diffusers\]"):
        diffusers.family_of_base(pipeline(tmp_path / "base"))
