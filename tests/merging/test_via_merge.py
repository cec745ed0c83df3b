"""`--via merge`: the base with the adapter in it, where the result cannot hold the adapter."""

import numpy as np
import pytest
from merge_samples import flux_file, kohya_flux, read, write

import regraft
from regraft.cli import main


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return flux_file(tmp_path_factory.mktemp("flux") / "flux.safetensors")


def test_what_cannot_be_held_is_merged_and_what_can_is_not(flux, tmp_path):
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {f"{stem}.weight": np.arange(8, dtype=np.float32), f"{stem}.on_input": np.array(True)}
    ia3 = write(tmp_path / "ia3.safetensors", tensors, {"ss_base_model_version": "flux1"})
    with pytest.raises(regraft.RefusedError):
        regraft.convert(ia3, tmp_path / "out.safetensors", to="comfyui", model=flux)
    report = regraft.convert(
        ia3, tmp_path / "out.safetensors", to="comfyui", model=flux, via="merge"
    )
    assert any("merged into the base" in note and "IA3" in note for note in report.notes)
    key = "model.diffusion_model.double_blocks.0.img_attn.proj.weight"
    before, after = read(flux), read(tmp_path / "out.safetensors")
    want = before[key].astype(float) * (1 + np.arange(8))
    assert (after.pop(key) == want.astype(np.float32)).all()
    assert all((before[name] == x).all() for name, x in after.items())
    lora, _ = kohya_flux(tmp_path / "lora.safetensors")
    regraft.convert(lora, tmp_path / "held.safetensors", to="comfyui", model=flux, via="merge")
    assert any("lora_A" in name for name in read(tmp_path / "held.safetensors"))


def test_one_lora_of_an_image_model_is_merged_by_convert_as_well(flux, tmp_path, capsys):
    lora, _ = kohya_flux(tmp_path / "lora.safetensors")
    regraft.merge(flux, [lora], tmp_path / "want.safetensors")
    out = tmp_path / "out.safetensors"
    arguments = ["convert", str(lora), str(out), "--to", "diffusers", "--merge"]
    assert main([*arguments, "--model", str(flux)]) == 0
    assert "merged" in capsys.readouterr().out
    assert out.read_bytes() == (tmp_path / "want.safetensors").read_bytes()
