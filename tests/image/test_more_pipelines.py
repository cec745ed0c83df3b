"""Pipelines of video models and newer image models, with VAEs and text encoders: one file to a folder and back."""

import numpy as np
import pytest
from image_models import both, labelled
from test_pipelines import CLIP, T5, read, same, weights

import regraft
from regraft.checkpoints.verify import verify
from regraft.storage.safetensors import write_tensors

DENOISER = "model.diffusion_model."
DECODER = {
    "embed_tokens.weight": (20, 12),
    "layers.0.input_layernorm.weight": (12,),
    "layers.0.self_attn.q_proj.weight": (12, 12),
    "layers.1.mlp.down_proj.weight": (12, 16),
    "norm.weight": (12,),
}


def write(path, state):
    """One file; scalars stay scalars."""
    write_tensors(path, {name: x.copy(order="C") for name, x in state.items()}, {"format": "pt"})
    return path


def renamed(shapes, before):
    return {before + name: shape for name, shape in shapes.items()}


QWEN_VL = {**renamed(DECODER, "model."), "visual.blocks.0.attn.qkv.weight": (24, 8)}
FAMILIES = {
    "hunyuan-video": (
        "hunyuan-video-vae",
        {"text_encoder": ("text_encoders.llama.transformer.model.", DECODER, DECODER)},
    ),
    "ltx-video": (
        "ltx-vae",
        {"text_encoder": ("text_encoders.t5xxl.transformer.", T5, T5)},
    ),
    "ltx-video 0.9.1": ("ltx-vae-091", {}),
    "ltx-video 0.9.5": ("ltx-vae-095", {}),
    "flux2": (
        "flux2-vae",
        {
            "text_encoder": (
                "text_encoders.mistral3_24b.transformer.model.",
                DECODER,
                renamed(DECODER, "language_model.model."),
            )
        },
    ),
    "qwen-image": (
        "wan-vae",
        {"text_encoder": ("text_encoders.qwen25_7b.transformer.", QWEN_VL, QWEN_VL)},
    ),
    "wan 2.2 5B": (
        "wan22-vae",
        {"text_encoder": ("text_encoders.umt5xxl.transformer.", T5, T5)},
    ),
    "z-image": (
        "autoencoder-kl",
        {
            "text_encoder": (
                "text_encoders.qwen3_4b.transformer.",
                renamed(DECODER, "model."),
                renamed(DECODER, "model."),
            )
        },
    ),
    "lumina2": (
        "autoencoder-kl",
        {"text_encoder": ("text_encoders.gemma2_2b.transformer.model.", DECODER, DECODER)},
    ),
}


def parts(name):
    """One file, and the folders, with every element another number."""
    vae, encoders = FAMILIES[name]
    single, folders = {}, {}
    native, new = both(name.partition(" ")[0])
    single |= {DENOISER + n: x for n, x in native.items()}
    folders["transformer"] = new
    native, new = both(vae)
    single |= {f"vae.{n}": x for n, x in native.items()}
    folders["vae"] = new
    for part, (prefix, inside, there) in encoders.items():
        single |= {prefix + n: x for n, x in labelled(inside).items()}
        folders[part] = labelled(there)
    return single, folders


@pytest.mark.parametrize("name", list(FAMILIES))
def test_one_file_becomes_a_folder_and_comes_back(name, tmp_path):
    single, folders = parts(name)
    src = write(tmp_path / "model.safetensors", single)
    report = regraft.convert(src, tmp_path / "folder", to="diffusers")
    made = weights(tmp_path / "folder")
    assert made.keys() == folders.keys()
    assert [part for part in folders if not same(made[part], folders[part])] == []
    native = report.checkpoint.source_layout
    regraft.convert(tmp_path / "folder", tmp_path / "back.safetensors", to=native)
    assert same(read(tmp_path / "back.safetensors"), single)


def test_the_parts_are_compared_element_by_element(tmp_path):
    single, _ = parts("ltx-video 0.9.5")
    src = write(tmp_path / "model.safetensors", single)
    regraft.convert(src, tmp_path / "folder", to="diffusers")
    assert verify(src, tmp_path / "folder").equal
    single["vae.latents"] = single.pop("vae.per_channel_statistics.mean-of-means")
    write(src, single)
    with pytest.raises(regraft.RegraftError) as caught:
        regraft.convert(src, tmp_path / "no", to="diffusers")
    assert any("latents" in (finding.key or "") for finding in caught.value.findings)


def test_hunyuan_s_own_file_has_the_names_of_diffusers(tmp_path):
    native, new = both("hunyuan-video")
    _, vae = both("hunyuan-video-vae")
    single = {DENOISER + n: x for n, x in native.items()} | {f"vae.{n}": x for n, x in vae.items()}
    single |= {f"text_encoders.clip_l.transformer.{n}": x for n, x in labelled(CLIP).items()}
    src = write(tmp_path / "model.safetensors", single)
    regraft.convert(src, tmp_path / "folder", to="diffusers")
    made = weights(tmp_path / "folder")
    assert same(made["vae"], vae)
    assert same(made["transformer"], new)
    assert same(made["text_encoder_2"], labelled(CLIP))


def test_what_ltx_has_besides_is_dropped_and_said(tmp_path):
    single, folders = parts("ltx-video")
    single["vae.per_channel_statistics.channel"] = np.arange(4, dtype=np.int32)
    src = write(tmp_path / "model.safetensors", single)
    report = regraft.convert(src, tmp_path / "folder", to="diffusers")
    assert same(weights(tmp_path / "folder")["vae"], folders["vae"])
    assert any("per_channel_statistics.channel" in note for note in report.notes)


def test_flux2_s_towers_stay_out_of_one_file(tmp_path):
    single, folders = parts("flux2")
    src = write(tmp_path / "model.safetensors", single)
    regraft.convert(src, tmp_path / "folder", to="diffusers")
    encoder = dict(folders["text_encoder"])
    encoder["vision_tower.patch_conv.weight"] = np.ones((2, 2), np.int32)
    write(tmp_path / "folder" / "text_encoder" / "model.safetensors", encoder)
    report = regraft.convert(tmp_path / "folder", tmp_path / "back.safetensors", to="bfl")
    assert same(read(tmp_path / "back.safetensors"), single)
    assert any("vision_tower" in note for note in report.notes)
