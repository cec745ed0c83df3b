"""LoRAs of image models: read, moved and written, compared with plain numpy."""

import json

import numpy as np
import pytest
from dialects.image.samples import (
    RANK,
    H,
    in_diffusers,
    kohya_flux,
    numbers,
    pair,
    product,
    read_diffusers,
    read_pairs,
)

import regraft
from regraft.cli import main
from regraft.storage.safetensors import open_tensors, read_header, write_tensors


@pytest.fixture
def convert(tmp_path):
    """Write tensors to a file, convert it, and read the result: its tensors and its header."""

    def run(tensors, to, metadata=None, **options):
        src, dst = tmp_path / "source.safetensors", tmp_path / "made.safetensors"
        write_tensors(src, tensors, metadata or {})
        run.report = regraft.convert(src, dst, to=to, overwrite=True, **options)
        return open_tensors(dst), dict(read_header(dst).metadata)

    return run


def check(got, want):
    assert got.keys() == want.keys()
    for name, delta in want.items():
        np.testing.assert_allclose(got[name], delta, rtol=1e-5, atol=1e-6, err_msg=name)


def same_bits(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape, name
        assert tensor.tobytes() == np.ascontiguousarray(other[name]).tobytes(), name


# -- FLUX: fused and split


def test_flux_from_kohya_to_diffusers(convert):
    """One qkv becomes three, linear1 four, the halves of the last modulation change places; alpha is in the header."""
    tensors, added = kohya_flux(alpha=1)
    made, header = convert(tensors, "diffusers")
    check(read_diffusers(made, header), in_diffusers(added))
    assert json.loads(header["lora_adapter_metadata"])["transformer.lora_alpha"] == 1
    shared = made["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"]
    assert (
        shared.tobytes()
        == tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].tobytes()
    )


@pytest.mark.parametrize("via", ["diffusers", "comfyui"])
@pytest.mark.parametrize("alpha", [RANK, 3])
def test_the_way_back_is_bit_for_bit(convert, via, alpha):
    tensors, _ = kohya_flux(alpha)
    header = {"ss_network_dim": "2", "modelspec.hash_sha256": "0x12"}
    there, between = convert(tensors, via, header)
    assert "modelspec.hash_sha256" not in between and between["ss_network_dim"] == "2"
    back, restored = convert(there, "kohya", between)
    same_bits(back, tensors)
    assert restored == header


def test_comfyui_has_the_models_own_names(convert):
    tensors, added = kohya_flux(alpha=3)
    made, _ = convert(tensors, "comfyui", source="flux")
    check(read_pairs(made), {f"diffusion_model.{name}": delta for name, delta in added.items()})


def test_block_diagonals_are_undone_and_made_again(convert):
    """sd-scripts' split_qkv: each part has components of its own; the scale is that of the file."""
    down, up = numbers(6, H), np.zeros((3 * H, 6), np.float32)
    for n in range(3):
        up[n * H : (n + 1) * H, 2 * n : 2 * n + 2] = 1 + numbers(H, 2) ** 2
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{stem}.lora_down.weight": down,
        f"{stem}.lora_up.weight": up,
        f"{stem}.alpha": np.float32(2),
    }
    tensors |= {k: v for k, v in kohya_flux(2, np.float32)[0].items() if "mod_lin" in k}
    header = {"ss_network_args": json.dumps({"split_qkv": "True"})}
    made, between = convert(tensors, "diffusers", header)
    assert made["transformer.transformer_blocks.0.attn.to_v.lora_A.weight"].shape == (2, H)
    assert any("split_qkv" in note for note in convert.report.notes)
    want = np.split(product(down, up, 2 / 6), 3)
    got = read_diffusers(made, between)
    for x, delta in zip("qkv", want, strict=True):
        np.testing.assert_allclose(got[f"transformer_blocks.0.attn.to_{x}"], delta, rtol=1e-6)
    back, _ = convert(made, "kohya", between, source="flux")
    same_bits(back, tensors)


def test_a_part_alone_is_fused_with_zeros(convert):
    down, up = pair(H, H)
    name = "transformer.single_transformer_blocks.3.attn.to_k"
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    made, _ = convert(tensors, "kohya", source="flux")
    (delta,) = read_pairs(made).values()
    want = np.zeros((7 * H, H))
    want[H : 2 * H] = product(down, up)
    np.testing.assert_array_equal(delta, want)


def test_parts_of_unequal_scale_share_one(convert):
    tensors, want = {}, []
    said = {
        "transformer.r": RANK,
        "transformer.lora_alpha": RANK,
        "transformer.alpha_pattern": {r"to_k": 6},
    }
    for x in "qkv":
        down, up = pair(H, H)
        name = f"transformer.transformer_blocks.0.attn.to_{x}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down, up
        want.append(product(down, up, 3 if x == "k" else 1))
    header = {"lora_adapter_metadata": json.dumps(said)}
    made, _ = convert(tensors, "comfyui", header, source="flux")
    check(read_pairs(made), {"diffusion_model.double_blocks.0.img_attn.qkv": np.concatenate(want)})


def test_a_header_that_does_not_say_the_rank(convert):
    """diffusers gives the header to PEFT, whose own rank is 8, and cannot load factors of another one."""
    down, up = pair(H, H)
    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 3})}
    with pytest.raises(regraft.BadInputError, match="gives it 8"):
        convert(tensors, "kohya", header, source="flux")


def test_the_names_of_several_families_are_asked_about(convert):
    """Blocks are named alike by diffusers in FLUX and others, and their own names differ."""
    down, up = pair(H, H)
    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    with pytest.raises(regraft.AmbiguousError, match="--from flux"):
        convert(tensors, "kohya")
    made, _ = convert(tensors, "diffusers")
    same_bits(made, tensors)
    assert list(read_pairs(convert(tensors, "kohya", source="flux")[0])) == [
        "lora_unet_double_blocks_0_img_attn_qkv"
    ]


def test_xlabs_adds_nothing_to_the_mlp(convert):
    names = {
        "double_blocks.0.processor.qkv_lora1": "transformer_blocks.0.attn.to_{}",
        "double_blocks.0.processor.qkv_lora2": "transformer_blocks.0.attn.add_{}_proj",
        "single_blocks.4.processor.qkv_lora": "single_transformer_blocks.4.attn.to_{}",
    }
    tensors, want = {}, {}
    for name, module in names.items():
        tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"] = pair(3 * H, H)
        whole = product(*pair_of(tensors, name))
        want |= {module.format(x): part for x, part in zip("qkv", np.split(whole, 3), strict=True)}
    made, header = convert(tensors, "diffusers")
    check(read_diffusers(made, header), want)


def pair_of(tensors, name):
    return tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"]


# -- UNets: numbered blocks, convolutions, text encoders


T = "transformer_blocks"
UNET = {
    f"lora_unet_input_blocks_4_1_{T}_1_attn1_to_q": f"down_blocks.1.attentions.0.{T}.1.attn1.to_q",
    "lora_unet_input_blocks_8_0_in_layers_2": "down_blocks.2.resnets.1.conv1",
    "lora_unet_input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "lora_unet_middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    f"lora_unet_output_blocks_2_1_{T}_0_attn2_to_out_0": f"up_blocks.0.attentions.2.{T}.0.attn2.to_out.0",
    "lora_te1_text_model_encoder_layers_3_mlp_fc1": "text_encoder.text_model.encoder.layers.3.mlp.fc1",
    "lora_te2_text_model_encoder_layers_3_mlp_fc2": "text_encoder_2.text_model.encoder.layers.3.mlp.fc2",
}


def sdxl():
    tensors, want = {}, {}
    for stem, module in UNET.items():
        conv = any(x in module for x in ("resnets", "samplers"))
        down, up = pair(H, H, kernel=(3, 3) if conv else ())
        tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": np.float32(4),
        }
        want[module] = product(down, up, 4 / RANK)
    return tensors, want


def test_sdxl_with_both_text_encoders(convert):
    tensors, want = sdxl()
    made, header = convert(tensors, "diffusers")
    check(read_diffusers(made, header), want)
    comfy, _ = convert(made, "comfyui", header)
    assert (
        "text_encoders.clip_g.transformer.text_model.encoder.layers.3.mlp.fc2.lora_A.weight"
        in comfy
    )
    assert "diffusion_model.input_blocks.8.0.in_layers.2.lora_A.weight" in comfy
    back, _ = convert(comfy, "kohya")
    assert back.keys() == tensors.keys()


def test_names_of_transformers_5_get_the_level_that_files_have(convert):
    down, up = pair(H, H)
    stem = "lora_te1_encoder_layers_0_self_attn_q_proj"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up} | sdxl()[0]
    made, _ = convert(tensors, "diffusers")
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in made


def test_old_attention_processors(convert):
    base = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora"
    tensors = {f"{base}.down.weight": numbers(2, H), f"{base}.up.weight": numbers(H, 2)}
    made, _ = convert(tensors, "diffusers")
    assert (
        sorted(made)[0]
        == "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight"
    )


def test_a_file_with_both_kinds_of_block_names_loses_none(convert):
    tensors, want = sdxl()
    down, up = pair(H, H)
    tensors |= {"lora_unet_up_blocks_1_attentions_0_proj_in.lora_down.weight": down}
    tensors |= {"lora_unet_up_blocks_1_attentions_0_proj_in.lora_up.weight": up}
    made, header = convert(tensors, "diffusers")
    check(
        read_diffusers(made, header), want | {"up_blocks.1.attentions.0.proj_in": product(down, up)}
    )


# -- alpha


def test_alpha_of_the_header_only_gets_keys(convert):
    down, up = pair(H, H)
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    said = {"unet.r": 2, "unet.lora_alpha": 8, "unet.rank_pattern": {}, "unet.use_rslora": False}
    made, _ = convert(tensors, "kohya", {"lora_adapter_metadata": json.dumps(said)}, source="sd15")
    (alpha,) = (float(t) for key, t in made.items() if key.endswith(".alpha"))
    assert alpha == 8
    del said["unet.lora_alpha"]
    made, _ = convert(tensors, "kohya", {"lora_adapter_metadata": json.dumps(said)}, source="sd15")
    (alpha,) = (float(t) for key, t in made.items() if key.endswith(".alpha"))
    assert alpha == 8, "PEFT's own, which diffusers leaves to it"
    said |= {"unet.lora_alpha": 8, "unet.use_rslora": True}
    made, _ = convert(tensors, "kohya", {"lora_adapter_metadata": json.dumps(said)}, source="sd15")
    np.testing.assert_allclose(
        next(iter(read_pairs(made).values())), product(down, up, 8 / np.sqrt(2)), rtol=1e-6
    )


def test_alpha_is_folded_where_there_is_none(convert):
    tensors, added = kohya_flux(alpha=3, dtype=np.float32)
    made, _ = convert(tensors, "ai-toolkit")
    assert not any(key.endswith("alpha") for key in made)
    check(read_diffusers(made, {}), in_diffusers(added))
    assert any("alpha / rank was multiplied into" in note for note in convert.report.notes)
    assert not convert.report.targets[0].exact


def test_ai_toolkits_text_encoders_have_dots(convert):
    """Beside a transformer it writes ``lora_te1.`` and ``lora_te2.``, with PEFT's leaves."""
    clip, t5 = "text_model.encoder.layers.0.mlp.fc1", "encoder.block.0.layer.0.SelfAttention.q"
    tensors = {}
    for name in (
        "transformer.transformer_blocks.0.attn.to_q",
        f"text_encoder.{clip}",
        f"text_encoder_2.{t5}",
    ):
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = pair(H, H)
    made, _ = convert(tensors, "ai-toolkit", source="flux")
    assert {f"lora_te1.{clip}.lora_A.weight", f"lora_te2.{t5}.lora_B.weight"} <= set(made)
    again, _ = convert(made, "diffusers", source="flux", verify=True)
    same_bits(again, tensors)
    kohya, _ = convert(made, "kohya", source="flux")
    assert "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight" in kohya


def test_ranks_that_differ_are_said_in_the_header(convert):
    """Releases of diffusers before 0.42 give every module the most common rank as alpha without it."""
    tensors = {}
    for rank, x in ((2, "q"), (2, "k"), (3, "v")):
        name = f"transformer.transformer_blocks.0.attn.to_{x}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = pair(H, H, rank)
    _, header = convert(tensors, "diffusers")
    said = json.loads(header["lora_adapter_metadata"])
    assert said["transformer.rank_pattern"] == {r"^transformer_blocks\.0\.attn\.to_v": 3}
    assert said["transformer.alpha_pattern"] == {r"^transformer_blocks\.0\.attn\.to_v": 3}


# -- what cannot be


def test_half_a_pair_and_unknown_keys_are_errors(convert):
    tensors, _ = kohya_flux()
    del tensors["lora_unet_final_layer_linear.lora_up.weight"]
    with pytest.raises(regraft.BadInputError, match="lacks the other"):
        convert(tensors, "diffusers")
    tensors, _ = kohya_flux()
    tensors["lora_unet_final_layer_linear.lora_gate"] = numbers(2)
    with pytest.raises(regraft.BadInputError, match="no tool is known to write this key"):
        convert(tensors, "diffusers")


def test_a_module_that_the_family_lacks_is_an_error(convert):
    tensors, _ = kohya_flux()
    down, up = pair(H, H)
    stem = "lora_unet_double_blocks_0_img_attn_qvk"
    tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    with pytest.raises(regraft.UnmatchedKeysError, match="img_attn_qvk: FLUX"):
        convert(tensors, "diffusers")


def test_a_header_that_contradicts_the_names_is_an_error(convert):
    tensors, _ = kohya_flux()
    with pytest.raises(regraft.BadInputError, match="sdxl_base_v1-0"):
        convert(tensors, "diffusers", {"ss_base_model_version": "sdxl_base_v1-0"})
    convert(tensors, "diffusers", {"ss_base_model_version": "sdxl_base_v1-0"}, source="flux")


def test_bookkeeping_is_copied(convert):
    tensors, _ = kohya_flux()
    tensors["bundle_emb.cat.clip_l"] = numbers(2, 4)
    made, _ = convert(tensors, "diffusers")
    assert made["bundle_emb.cat.clip_l"].tobytes() == tensors["bundle_emb.cat.clip_l"].tobytes()


def test_other_commands_say_what_is_possible(tmp_path, capsys):
    tensors, _ = kohya_flux()
    write_tensors(tmp_path / "a.safetensors", tensors, {})
    assert (
        main(["convert", *[str(tmp_path / x) for x in ("a.safetensors", "b")], "--to", "diffusers"])
        == 0
    )
    assert "pipeline.load_lora_weights" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "b").iterdir()] == [
        "pytorch_lora_weights.safetensors"
    ]
    with pytest.raises(regraft.RefusedError, match="image or video model"):
        regraft.convert(tmp_path / "a.safetensors", tmp_path / "out", to="transformers-v5")


@pytest.mark.parametrize("family", ["flux", "sd3", "hunyuan-video"])
def test_the_question_which_family_is_answered(convert, family):
    """Names that several families have; sd3 is a layout's name, too."""
    down, up = pair(H, H)
    name = "transformer.transformer_blocks.0.attn.to_out.0"
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    with pytest.raises(regraft.AmbiguousError) as error:
        convert(tensors, "comfyui")
    assert family in [choice.source for choice in error.value.findings[0].choices]
    made, _ = convert(tensors, "comfyui", source=family)
    (found,) = {key.rpartition(".lora_")[0] for key in made if "lora_" in key}
    assert (
        found
        == {
            "flux": "diffusion_model.double_blocks.0.img_attn.proj",
            "sd3": "diffusion_model.joint_blocks.0.x_block.attn.proj",
            # the native name, which ComfyUI takes beside its own
            "hunyuan-video": "diffusion_model.double_blocks.0.img_attn_proj",
        }[family]
    )


def test_dora_of_ai_toolkit(convert):
    """It has one for all linears or none, on the out axis."""
    name = "transformer.transformer_blocks.0.attn.to_out.0"
    down, up = pair(H, H)
    magnitude = 1 + numbers(H) ** 2
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    with_dora = {**tensors, f"{name}.lora_magnitude_vector": magnitude}
    made, _ = convert(with_dora, "ai-toolkit", source="flux", verify=True)
    assert made[f"{name}.magnitude"].tobytes() == magnitude.tobytes()
    other = {k.replace("to_out.0", "to_add_out"): v for k, v in tensors.items()}
    with pytest.raises(regraft.RefusedError, match="or for none"):
        convert({**with_dora, **other}, "ai-toolkit", source="flux")


def test_comfyui_names_one_of_a_books_indices(convert):
    """HunyuanVideo's linear_1 and linear_2 are in_layer and out_layer there."""
    tensors = {}
    for n in (1, 2):
        down, up = pair(H, H)
        name = f"lora_unet_txt_in_c_embedder_linear_{n}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    made, header = convert(tensors, "comfyui", source="hunyuan-video", verify=True)
    assert "diffusion_model.txt_in.c_embedder.in_layer.lora_A.weight" in made
    back, _ = convert(made, "kohya", header)
    same_bits(back, tensors)


def test_names_that_two_families_share_ask_for_none(convert):
    """ComfyUI's own names of HunyuanVideo's blocks are FLUX's; there is nothing to ask where all modules have them."""
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    down, up = pair(3 * H, H)
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    made, _ = convert(tensors, "comfyui")
    assert "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight" in made


@pytest.mark.parametrize(
    ("to", "words"),
    [
        (
            "kohya",
            "cp {path} WEBUI/models/Lora/ for Automatic1111 or Forge, --network_weights {path} for",
        ),
        ("comfyui", "cp {path} ComfyUI/models/loras/, then choose {file} in the node Load LoRA"),
        ("ai-toolkit", "pretrained_lora_path: {path} under network:"),
    ],
)
@pytest.mark.parametrize("name", ["out.safetensors", "out"])
def test_the_last_line_says_where_the_file_goes(name, to, words, tmp_path, capsys):
    tensors, _ = kohya_flux()
    write_tensors(tmp_path / "lora.safetensors", tensors, {})
    out = tmp_path / name
    assert main(["convert", str(tmp_path / "lora.safetensors"), str(out), "--to", to]) == 0
    file = out if out.is_file() else out / "pytorch_lora_weights.safetensors"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Use it with: " + words.format(path=file, file=file.name))


def test_names_of_two_unets_stay_where_the_file_is_the_tool_s_already(convert):
    """SD 1.5 has these modules, too, and sd-scripts would name them in another way."""
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    down, up = pair(H, H)
    tensors = {
        f"{stem}.lora_down.weight": down,
        f"{stem}.lora_up.weight": up,
        f"{stem}.alpha": np.float32(1),
        f"{stem}.dora_scale": np.ones((1, H), "f4"),
    }
    made, _ = convert(tensors, "kohya")
    same_bits(made, tensors)
    for family, name in (
        ("sdxl", stem),
        ("sd15", "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"),
    ):
        made, _ = convert(tensors, "kohya", source=family)
        assert f"{name}.dora_scale" in made


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_an_alpha_without_factors_is_said(to, convert):
    tensors, _ = kohya_flux()
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    with pytest.raises(regraft.BadInputError, match="an alpha, and no factors") as caught:
        convert({**tensors, f"{stem}.alpha": np.float32(1)}, to)
    assert [finding.key for finding in caught.value.findings] == [stem]


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"ss_network_dim": "8"}, "ss_network_dim is 8, and the tensors have 2"),
        ({"ss_network_alpha": "16"}, "ss_network_alpha is 16, and the tensors have 3"),
        (
            {"ss_network_module": "networks.oft"},
            "ss_network_module is oft, and the tensors are LoRA's",
        ),
        ({"ss_network_module": "networks.lora_flux", "ss_network_dim": "2"}, None),
        ({"ss_network_dim": "2", "ss_network_alpha": "3.0"}, None),
        ({"ss_network_dim": "Dynamic", "ss_network_alpha": "None"}, None),
    ],
)
def test_a_header_that_says_another_rank_or_alpha(tmp_path, header, words):
    write_tensors(tmp_path / "a.safetensors", kohya_flux(alpha=3)[0], header)
    out = tmp_path / "b.safetensors"
    report = regraft.convert(tmp_path / "a.safetensors", out, to="comfyui", source="flux")
    said = [note for note in report.notes if "the header's" in note]
    assert [note.partition(": ")[0] for note in said] == (
        [] if words is None else [f"the header's {words}"]
    )


@pytest.mark.parametrize("to", ["comfyui", "diffusers"])
def test_a_file_that_fits_several_models_alike_names_them_all(tmp_path, to):
    tensors = {n: x for n, x in kohya_flux()[0].items() if "double_blocks_0_img_attn_qkv" in n}
    write_tensors(tmp_path / "a.safetensors", tensors, {})
    report = regraft.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to=to)
    (note,) = [note for note in report.notes if note.startswith("base: ")]
    assert "FLUX.1 or Chroma" in note and "HunyuanVideo; the result is the same" in note
