"""PEFT's folder for the denoiser of an image model, as a source and as a target."""

import json

import numpy as np
import pytest
from dialects.image.samples import RANK, H, in_diffusers, kohya_flux, numbers, pair, read_pairs
from dialects.image.test_image import check, same_bits

import regraft
from regraft.checking.verify import verify
from regraft.cli import main
from regraft.dialects.image.families import FAMILIES
from regraft.dialects.image.modules import names_of
from regraft.dialects.image.recognise import NO_DENOISER
from regraft.storage.safetensors import open_tensors, write_tensors

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0.attn1."


@pytest.fixture
def saved(tmp_path):
    """A folder as ``save_pretrained`` writes it."""

    def save(tensors, **config):
        folder = tmp_path / "peft"
        folder.mkdir(exist_ok=True)
        named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
        write_tensors(folder / "adapter_model.safetensors", named, {"format": "pt"})
        library = "diffusers.models.unets.unet_2d_condition"
        mapping = {"base_model_class": "UNet2DConditionModel", "parent_library": library}
        usual = {"peft_type": "LORA", "task_type": None, "auto_mapping": mapping}
        (folder / "adapter_config.json").write_text(json.dumps({**usual, **config}))
        return folder

    return save


def lora(module, out=H, into=H, rank=RANK):
    down, up = pair(out, into, rank)
    return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}


def test_a_folder_of_a_unet_goes_to_kohya(saved, tmp_path, capsys):
    """Alpha is in the config, for some modules in a pattern."""
    tensors = {**lora(f"{BLOCK}to_q"), **lora(f"{BLOCK}to_k", rank=4)}
    folder = saved(
        tensors, r=RANK, lora_alpha=6, alpha_pattern={"to_k": 1}, rank_pattern={"to_k": 4}
    )
    made = tmp_path / "made.safetensors"
    regraft.convert(folder, made, to="kohya", source="sdxl", verify=True)
    there = open_tensors(made)
    alphas = {k.split("_")[-1][0]: float(v) for k, v in there.items() if k.endswith("alpha")}
    assert alphas == {"q": 6, "k": 1}
    assert verify(folder, made, source="sdxl").equal
    assert main(["inspect", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "PEFT" in told and "6 (header)" in told


def test_rslora_and_the_default_of_alpha(saved, tmp_path):
    down_up = lora(f"{BLOCK}to_q", rank=4)
    made = tmp_path / "made.safetensors"
    regraft.convert(saved(down_up, r=4, use_rslora=True), made, to="kohya", source="sdxl")
    alpha = next(float(v) for k, v in open_tensors(made).items() if k.endswith("alpha"))
    assert alpha == 8 / 2 * 4 / 4 * 4  # 8 / sqrt(4), times the rank


def test_there_and_back(tmp_path):
    """A file of kohya as a folder, and again; names of one segment are told from ends of longer ones."""
    tensors, added = kohya_flux(alpha=3)
    src, folder, back = tmp_path / "a.safetensors", tmp_path / "folder", tmp_path / "b.safetensors"
    write_tensors(src, tensors, {})
    report = regraft.convert(src, folder, to="peft", verify=True)
    assert report.adapters[0].target_layout == "peft-image"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (RANK, 3, None)
    assert "proj_out" in config["target_modules"].split("|")
    named = open_tensors(folder / "adapter_model.safetensors")
    plain = {k.removeprefix("base_model.model."): v for k, v in named.items()}
    check(
        {k: v * 3 / RANK for k, v in read_pairs(plain).items()},
        in_diffusers(added),
    )
    regraft.convert(folder, back, to="kohya", verify=True)
    same_bits(open_tensors(back), tensors)


def test_loha_and_lokr_of_peft(saved, tmp_path):
    """PEFT scales a LoKr of whole factors by alpha / rank, and LyCORIS' files have no scale there."""
    t = {f"{BLOCK}to_q.lokr_w1": numbers(2, 2), f"{BLOCK}to_q.lokr_w2": numbers(4, 4)}
    folder = saved(t, peft_type="LOKR", r=4, alpha=2)
    made = tmp_path / "made.safetensors"
    regraft.convert(folder, made, to="diffusers", source="sdxl", via="dense", verify=True)
    (delta,) = read_pairs(open_tensors(made)).values()
    want = 0.5 * np.kron(t[f"{BLOCK}to_q.lokr_w1"], t[f"{BLOCK}to_q.lokr_w2"])
    np.testing.assert_allclose(delta, want)
    shapes = {"w1_a": (H, 2), "w1_b": (2, H), "w2_a": (H, 2), "w2_b": (2, H)}
    t = {f"{BLOCK}to_q.hada_{x}": numbers(*s) for x, s in shapes.items()}
    folder = saved(t, peft_type="LOHA", r=2, alpha=4)
    regraft.convert(folder, made, to="kohya", source="sdxl", overwrite=True)
    assert next(float(v) for k, v in open_tensors(made).items() if k.endswith("alpha")) == 4


def test_families_that_are_not_read_are_named(saved, tmp_path):
    folder = saved(lora(f"{BLOCK}to_q"), peft_type="VERA")
    with pytest.raises(regraft.RefusedError, match="VERA on an image model"):
        regraft.convert(folder, tmp_path / "made.safetensors", to="kohya")


def test_a_folder_is_for_one_model(tmp_path):
    stem = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    down, up = pair(H, H)
    more = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    write_tensors(tmp_path / "a.safetensors", {**kohya_flux()[0], **more}, {})
    with pytest.raises(regraft.RefusedError, match="take the text_encoder's tensors out"):
        regraft.convert(tmp_path / "a.safetensors", tmp_path / "folder", to="peft")


def test_adapters_of_language_models_stay_pefts(saved):
    """A task, or another library, or other names."""
    from regraft.dialects.image.recognise import weights_in

    tensors = lora(f"{BLOCK}to_q")
    assert weights_in(saved(tensors)) is not None
    assert weights_in(saved(tensors, auto_mapping=None)) is not None
    assert weights_in(saved(tensors, task_type="CAUSAL_LM")) is None
    library = {"base_model_class": "X", "parent_library": "transformers.models.llama"}
    assert weights_in(saved(tensors, auto_mapping=library)) is None
    plain = lora("model.layers.0.self_attn.q_proj")
    assert weights_in(saved(plain, auto_mapping=None)) is None


def test_no_denoiser_begins_where_models_of_transformers_do():
    """What is looked at before any book is read leaves no denoiser out."""
    begin = {
        name.partition(".")[0]
        for family in FAMILIES
        for layout in family.layouts
        if (names := names_of(family, layout)) is not None
        for name in names.spellings(flat=False)
    }
    assert {"down_blocks", "double_blocks", "transformer_blocks"} <= begin
    assert not begin & NO_DENOISER
