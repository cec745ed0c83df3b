"""Where one key of a LoRA for an image model goes, and why."""

import numpy as np
import pytest
from dialects.image.samples import H, kohya_flux, numbers, pair

import regraft
from regraft.cli import main
from regraft.explaining.explain import explain
from regraft.storage.safetensors import write_tensors

QKV = "lora_unet_double_blocks_0_img_attn_qkv"


@pytest.fixture
def flux(tmp_path):
    write_tensors(tmp_path / "flux.safetensors", kohya_flux(alpha=1)[0], {})
    return tmp_path / "flux.safetensors"


def test_a_fused_module_goes_to_three(flux):
    found = explain(flux, f"{QKV}.lora_up.weight", to="diffusers")
    assert found.fate == "moved" and found.arrives and found.role == "up"
    assert found.base == "double_blocks.0.img_attn.qkv.weight" and found.rule.startswith("flux/")
    places = {piece.target: piece.source_place for piece in found.pieces}
    assert places["transformer_blocks.0.attn.to_k.weight"] == (f"{H}:{2 * H}", ":")
    told = " ".join(found.steps)
    assert "looked up" in told and "LoRA of rank 2, multiplied by 0.5" in told
    assert f"transformer.transformer_blocks.0.attn.to_v.lora_B.weight [{H}, 2]" in told


@pytest.mark.parametrize(
    "key", [QKV, "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.qkv.weight"]
)
def test_a_module_is_found_by_any_of_its_names(flux, key):
    found = explain(flux, key, to="comfyui")
    assert found.fate == "carried" and found.arrives
    assert "diffusion_model.double_blocks.0.img_attn.qkv.alpha []" in " ".join(found.steps)


def test_a_name_of_the_result_is_explained_backwards(flux):
    found = explain(flux, "transformer.single_transformer_blocks.0.proj_mlp", to="diffusers")
    assert found.base == "single_transformer_blocks.0.proj_mlp.weight" and found.arrives
    assert found.steps[0].endswith("it is made of lora_unet_single_blocks_0_linear1")


def test_what_has_no_equivalent_says_why(tmp_path, capsys):
    stem = "lora_unet_mid_block_resnets_0_conv1"
    tensors = {f"{stem}.lokr_w1": numbers(4, 4), f"{stem}.lokr_w2": numbers(4, 4, 3, 3)}
    write_tensors(tmp_path / "a.safetensors", tensors, {})
    found = explain(tmp_path / "a.safetensors", stem, to="diffusers", source="sd15")
    assert not found.arrives and "--via dense" in found.problems[0].fix
    assert main(["explain", str(tmp_path / "a.safetensors"), stem, "--to", "diffusers"]) == 4
    assert "holds plain LoRA only" in capsys.readouterr().out


def test_an_unknown_name_gets_the_closest(flux, tmp_path):
    found = explain(flux, QKV.replace("qkv", "qkw"), to="kohya")
    assert not found.arrives and found.closest[0].startswith(QKV)
    down, up = pair(H, H)
    odd = QKV.replace("qkv", "qkw")
    more = {f"{odd}.lora_down.weight": down, f"{odd}.lora_up.weight": up}
    write_tensors(tmp_path / "odd.safetensors", {**kohya_flux()[0], **more}, {})
    found = explain(tmp_path / "odd.safetensors", f"{odd}.lora_up.weight", to="diffusers")
    assert found.fate == "unmatched" and QKV in found.closest
    assert found.problems[0].code == "unmatched"


def test_a_text_encoder_keeps_its_names(tmp_path):
    stem = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = kohya_flux()[0]
    down, up = pair(H, H)
    tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    tensors[f"{stem}.alpha"] = np.float16(2)
    write_tensors(tmp_path / "a.safetensors", tensors, {})
    found = explain(tmp_path / "a.safetensors", stem, to="diffusers")
    assert found.arrives
    assert found.base == "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight"


def test_layouts_of_language_models_are_refused(flux):
    with pytest.raises(regraft.RefusedError, match="image or video model"):
        explain(flux, QKV, to="transformers-v5")
