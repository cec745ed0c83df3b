"""LoRAs of image models added to their base: one file, a folder, any tool's names; checked by plain numpy."""

import json

import ml_dtypes
import numpy as np
import pytest
from merge_samples import flux_file, kohya_flux, pair, read, sdxl_file, wan_folder, write

import regraft


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return flux_file(tmp_path_factory.mktemp("flux") / "flux.safetensors")


def summed(before, *weighted):
    made = dict(before)
    for name in {name for added, _ in weighted for name in added}:
        total = sum(added[name] * weight for added, weight in weighted if name in added)
        made[name] = (before[name].astype(float) + total).astype(before[name].dtype)
    return made


def same(one, other):
    assert one.keys() == other.keys()
    return [n for n in one if one[n].tobytes() != other[n].tobytes()]


def test_two_loras_are_numpy_s_sum_rounded_once(flux, tmp_path):
    one, added = kohya_flux(tmp_path / "one.safetensors")
    two, more = kohya_flux(tmp_path / "two.safetensors", alpha=3.0, seed=50)
    out = tmp_path / "out.safetensors"
    report = regraft.merge(flux, [one, (two, -0.3)], out)
    want = summed(read(flux), (added, 1.0), (more, -0.3))
    assert same(read(out), want) == []
    assert len({t.key for t in report.targets}) == len(added) == 6
    assert [a.targets[0].scale for a in report.adapters] == [1.0, -0.3]


def test_a_folder_gets_the_same_numbers_as_a_file(flux, tmp_path):
    lora, _ = kohya_flux(tmp_path / "one.safetensors")
    other = tmp_path / "in_diffusers.safetensors"
    regraft.convert(lora, other, to="diffusers")
    regraft.convert(flux, tmp_path / "folder", to="diffusers")
    regraft.merge(flux, [(lora, 0.5)], tmp_path / "out.safetensors")
    regraft.convert(tmp_path / "out.safetensors", tmp_path / "want", to="diffusers")
    for name, path in {"kohya": lora, "diffusers": other}.items():
        regraft.merge(tmp_path / "folder", [(path, 0.5)], tmp_path / name)
        assert same(read(tmp_path / name), read(tmp_path / "want")) == []
    names = {str(f.relative_to(tmp_path / "kohya")) for f in (tmp_path / "kohya").rglob("*.json")}
    assert "model_index.json" in names
    regraft.merge(flux, [(other, 0.5)], tmp_path / "back.safetensors")
    assert same(read(tmp_path / "back.safetensors"), read(tmp_path / "out.safetensors")) == []


@pytest.mark.parametrize("algebra", ["OFT", "BOFT", "OFT v2"])
def test_rotations_of_a_weight_that_the_base_has_under_another_name(flux, tmp_path, algebra):
    """A rotation shows one axis of its weight; the other is the base's, whichever layout that is in."""
    stem, h = "lora_unet_single_blocks_0_linear2", 8
    random = np.random.default_rng(0)
    shapes = {"OFT": (2, 4, 4), "BOFT": (2, 2, 4, 4), "OFT v2": (10, 6)}
    leaf = "oft_R.weight" if algebra == "OFT v2" else "oft_blocks"
    turn = {f"{stem}.{leaf}": 0.1 * random.standard_normal(shapes[algebra])}
    if algebra != "OFT v2":
        turn[f"{stem}.alpha"] = np.array(0)
    lora = write(tmp_path / "lora.safetensors", turn, {"ss_base_model_version": "flux1"})
    regraft.convert(flux, tmp_path / "pipe", to="diffusers")
    regraft.merge(flux, [lora], tmp_path / "single.safetensors")
    regraft.merge(tmp_path / "pipe", [lora], tmp_path / "folder")
    regraft.convert(tmp_path / "single.safetensors", tmp_path / "want", to="diffusers")
    key = "transformer/diffusion_pytorch_model.safetensors"
    got, want, before = (read(tmp_path / x / key) for x in ("folder", "want", "pipe"))
    name = "single_transformer_blocks.0.proj_out.weight"
    assert got[name].shape == (h, 5 * h) and not np.allclose(got[name], before[name])
    assert all(np.allclose(got[n], want[n], atol=1e-6) for n in want)


def test_text_encoders_have_a_weight_of_their_own(flux, tmp_path):
    lora, added = kohya_flux(tmp_path / "one.safetensors")
    regraft.merge(flux, [lora], tmp_path / "out.safetensors", clip_weight=0.25)
    text = {n: x for n, x in added.items() if n.startswith("text")}
    rest = {n: x for n, x in added.items() if n not in text}
    want = summed(read(flux), (rest, 1.0), (text, 0.25))
    assert same(read(tmp_path / "out.safetensors"), want) == []


def test_a_sum_is_rounded_once_to_the_type_that_is_asked_for(flux, tmp_path):
    lora, added = kohya_flux(tmp_path / "one.safetensors")
    regraft.merge(flux, [lora], tmp_path / "out.safetensors", dtype="bfloat16")
    got, before = read(tmp_path / "out.safetensors"), read(flux)
    for name, tensor in before.items():
        want = (tensor.astype(float) + added.get(name, 0.0)).astype(ml_dtypes.bfloat16)
        assert got[name].tobytes() == want.tobytes()


def test_everything_that_does_not_fit_is_said_at_once_and_nothing_is_written(flux, tmp_path):
    lora, _ = kohya_flux(tmp_path / "one.safetensors")
    tensors = read(lora)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors[f"{stem}.lora_up.weight"] = np.ones((27, 2), np.float32)
    far = {n.replace("double_blocks_1_", "double_blocks_18_"): x for n, x in tensors.items()}
    wrong = write(tmp_path / "wrong.safetensors", far, {"ss_base_model_version": "flux1"})
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.merge(flux, [lora, wrong, wrong], tmp_path / "out.safetensors")
    said = {(f.key, f.message) for f in caught.value.findings}
    assert len(said) == 2
    assert len(caught.value.findings) == 4
    assert any("(27, 8)" in message and "(24, 8)" in message for _, message in said)
    assert any("double_blocks.18" in key and "no weight" in message for key, message in said)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_lora_of_another_family_is_refused_by_name(flux, tmp_path):
    sdxl = {
        f"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.{leaf}": np.ones(
            shape, np.float32
        )
        for leaf, shape in (("lora_down.weight", (2, 2048)), ("lora_up.weight", (640, 2)))
    }
    path = write(tmp_path / "sdxl.safetensors", sdxl)
    with pytest.raises(regraft.BadInputError, match=r"Stable Diffusion XL.*FLUX\.1") as caught:
        regraft.merge(flux, [path], tmp_path / "out.safetensors")
    assert caught.value.findings[0].code == "wrong-base"


def test_a_part_that_the_base_has_not_is_missed(flux, tmp_path):
    state = {n: x for n, x in read(flux).items() if n.startswith("model.")}
    base = write(tmp_path / "denoiser.safetensors", state)
    lora, added = kohya_flux(tmp_path / "one.safetensors")
    with pytest.raises(regraft.BadInputError, match="the base has none"):
        regraft.merge(base, [lora], tmp_path / "out.safetensors")
    regraft.merge(base, [lora], tmp_path / "out.safetensors", clip_weight=0)
    mine = {n: x for n, x in added.items() if n in state}
    assert same(read(tmp_path / "out.safetensors"), summed(state, (mine, 1.0))) == []


def test_deltas_that_depend_on_the_base_and_norms_and_biases(flux, tmp_path):
    before = read(flux)
    stem, module = "lora_unet_double_blocks_0_img_attn_proj", "double_blocks.0.img_attn.proj"
    key = f"model.diffusion_model.{module}"
    random = np.random.default_rng(3)
    down, up = random.standard_normal((2, 8)), random.standard_normal((8, 2))
    magnitude = random.standard_normal((8, 1)).astype(np.float32)
    tensors = {
        f"{stem}.lora_down.weight": down.astype(np.float32),
        f"{stem}.lora_up.weight": up.astype(np.float32),
        f"{stem}.dora_scale": magnitude,
        f"{stem}.diff_b": np.arange(8, dtype=np.float32),
    }
    lora = write(tmp_path / "dora.safetensors", tensors, {"ss_base_model_version": "flux1"})
    regraft.merge(flux, [(lora, 0.5)], tmp_path / "out.safetensors")
    w = before[f"{key}.weight"].astype(float)
    whole = w + up.astype(np.float32).astype(float) @ down.astype(np.float32).astype(float)
    whole *= magnitude / np.linalg.norm(whole, axis=1, keepdims=True)
    got = read(tmp_path / "out.safetensors")
    assert np.allclose(got[f"{key}.weight"], w + (whole - w) / 2, rtol=1e-6, atol=1e-6)
    bias = before[f"{key}.bias"].astype(float) + np.arange(8) / 2
    assert (got[f"{key}.bias"] == bias.astype(np.float32)).all()


def test_dry_run_writes_nothing(flux, tmp_path):
    lora, _ = kohya_flux(tmp_path / "one.safetensors")
    report = regraft.merge(flux, [lora], tmp_path / "out.safetensors", dry_run=True)
    assert not report.written
    assert len(report.targets) == 6
    assert list(tmp_path.iterdir()) == [lora]


def kohya_sdxl(path):
    """A kohya LoRA on a convolution, a linear, and both text encoders."""
    layer = "text_model_encoder_layers_0_"
    modules = {
        "lora_unet_input_blocks_1_0_in_layers_2": (16, 16, (3, 3)),
        "lora_unet_input_blocks_4_0_skip_connection": (32, 16, (1, 1)),
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (32, 32, ()),
        f"lora_te1_{layer}self_attn_q_proj": (12, 12, ()),
        f"lora_te2_{layer}self_attn_q_proj": (8, 8, ()),
        f"lora_te2_{layer}self_attn_v_proj": (8, 8, ()),
        f"lora_te2_{layer}mlp_fc1": (32, 8, ()),
    }
    tensors = {}
    for number, (stem, (out, into, kernel)) in enumerate(modules.items()):
        down, up = pair(out, into, kernel=kernel, seed=number)
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    return write(path, tensors, {"ss_base_model_version": "sdxl_base_v1-0"})


def test_convolutions_and_a_text_encoder_whose_weights_are_fused(tmp_path):
    """OpenCLIP has q, k and v in one tensor: the law holds for numbers as for adapters."""
    base = sdxl_file(tmp_path / "sdxl.safetensors")
    lora = kohya_sdxl(tmp_path / "lora.safetensors")
    regraft.convert(base, tmp_path / "folder", to="diffusers")
    regraft.merge(base, [(lora, 0.5)], tmp_path / "out.safetensors")
    before, after = read(base), read(tmp_path / "out.safetensors")
    assert len([n for n in before if before[n].tobytes() != after[n].tobytes()]) == 6
    regraft.convert(tmp_path / "out.safetensors", tmp_path / "want", to="diffusers")
    regraft.merge(tmp_path / "folder", [(lora, 0.5)], tmp_path / "got")
    assert same(read(tmp_path / "got"), read(tmp_path / "want")) == []


def test_the_second_transformer_of_a_pipeline_has_weights_of_its_own(tmp_path):
    """DoRA depends on the base: each of Wan 2.2's two transformers has names that are the other's, too."""
    folder = wan_folder(tmp_path / "wan")
    before = read(folder)
    module = "blocks.0.attn1.to_q"
    out, into = before[f"transformer/{module}.weight"].shape
    down, up = pair(out, into)
    magnitude = np.arange(1, out + 1, dtype=np.float32)
    leaves = {"A.weight": down, "B.weight": up, "magnitude_vector": magnitude}
    parts = ("transformer", "transformer_2")
    tensors = {f"{p}.{module}.lora_{leaf}": x for p in parts for leaf, x in leaves.items()}
    said = {
        f"{p}.{n}": v for p in parts for n, v in (("r", 2), ("lora_alpha", 2), ("use_dora", True))
    }
    header = {"lora_adapter_metadata": json.dumps(said)}
    lora = write(tmp_path / "lora.safetensors", tensors, header)
    regraft.merge(folder, [lora], tmp_path / "out", source="wan")
    got = read(tmp_path / "out")
    for part in parts:
        whole = before[f"{part}/{module}.weight"] + up.astype(float) @ down.astype(float)
        whole *= (magnitude / np.linalg.norm(whole, axis=1))[:, None]
        assert np.allclose(got[f"{part}/{module}.weight"], whole, atol=1e-5)
    changed = [n for n in before if before[n].tobytes() != got[n].tobytes()]
    assert changed == [f"{part}/{module}.weight" for part in parts]
