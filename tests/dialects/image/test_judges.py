"""`regraft check --for diffusers|comfyui|kohya`: traps that the loaders have, and the command that fixes the file."""

import json
import shlex

import numpy as np
import pytest
from dialects.image.samples import H, kohya_flux, numbers, pair

import regraft
from regraft.checking.for_tool import check_for
from regraft.cli import main
from regraft.errors import BadInputError
from regraft.storage.safetensors import write_tensors

T = "transformer_blocks.0"
UNET = f"down_blocks.1.attentions.0.{T}"


def flat(name, alpha=None, **factors):
    stem = "lora_unet_" + name.replace(".", "_")
    down, up = pair(H, H)
    made = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    made |= {} if alpha is None else {f"{stem}.alpha": np.float32(alpha)}
    return made | {f"{stem}.{role}": tensor for role, tensor in factors.items()}


def dotted(name, rank=2):
    down, up = pair(H, H, rank)
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


def with_alpha(name, alpha=1.0, leaf=".lora_down.weight .lora_up.weight", out=H, rank=2):
    down, up = pair(out, H, rank)
    first, second = leaf.split()
    # Some tools write a number as a vector with one entry.
    said = np.array([alpha], np.float32) if leaf == PEFT_LAYER else np.float32(alpha)
    return {f"{name}{first}": down, f"{name}{second}": up, f"{name}.alpha": said}


def lumina_block(rows, name="layers.0"):
    """A block in Lumina2's own names; the fused attention has so many rows."""
    leaves = ["attention.out", *(f"feed_forward.w{n}" for n in (1, 2, 3)), "adaLN_modulation.1"]
    made = {k: v for leaf in leaves for k, v in dotted(f"diffusion_model.{name}.{leaf}").items()}
    down, up = pair(rows, H)
    fused = f"diffusion_model.{name}.attention.qkv"
    return made | {f"{fused}.lora_A.weight": down, f"{fused}.lora_B.weight": up}


PEFT_LAYER = ".lora.down.weight .lora.up.weight"
FLUX_FIRST = with_alpha("transformer.x_embedder") | with_alpha(
    "transformer.time_text_embed.text_embedder.linear_1"
)
META = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 4})}
CASES = {
    "alphas of attention that differ": (
        flat(f"{UNET}.attn1.to_q", 1) | flat(f"{UNET}.attn1.to_k", 2) | flat(f"{UNET}.ff.net.2", 2),
        {},
        {
            "diffusers": ("wrong-scale", "most common alpha"),
            "kohya": ("full", ""),
            "comfyui": ("full", ""),
        },
    ),
    "both kinds of block names": (
        flat(f"{UNET[:-1]}1.attn1.to_q") | flat("input_blocks.8.1.transformer_blocks.0.attn1.to_q"),
        {},
        {"diffusers": ("partial", "are deleted"), "comfyui": ("full", "")},
    ),
    "alpha in the header only": (
        dotted(f"transformer.{T}.attn.to_q") | dotted("transformer.x_embedder"),
        META,
        {
            "diffusers": ("full", ""),
            "comfyui": ("wrong-scale", "metadata"),
            "kohya": ("none", "no dots"),
        },
    ),
    "embedders and the last layer": (
        kohya_flux()[0],
        {},
        {"diffusers": ("partial", "filtered out"), "comfyui": ("full", "")},
    ),
    "DoRA": (
        flat(f"{UNET}.attn1.to_q", 2, dora_scale=np.ones((H, 1), np.float32))
        | flat(f"{UNET[:-1]}1.attn1.to_k", 2, dora_scale=np.ones((H, 1), np.float32)),
        {},
        {
            "diffusers": ("wrong-scale", "plain LoRA"),
            "comfyui": ("wrong-scale", "lengths of the base"),
        },
    ),
    "Wan with one of two image projections": (
        dotted("transformer.blocks.0.attn2.add_k_proj") | dotted("transformer.blocks.0.attn2.to_k"),
        {},
        {
            "diffusers": ("partial", "overwritten with zeros"),
            "comfyui": ("none", "their own names"),
        },
    ),
    "ranks that differ": (
        dotted("transformer.x_embedder", 3)
        | dotted(f"transformer.{T}.attn.to_k")
        | dotted(f"transformer.{T}.attn.to_v"),
        {},
        {"diffusers": ("full", "")},
    ),
    "names that PEFT puts base_model before": (
        dotted(f"base_model.model.{UNET}.attn1.to_q"),
        {},
        {"diffusers": ("none", "does not begin with 'unet.'")},
    ),
    "alphas beside diffusers' names of a UNet": (
        dotted(f"unet.{UNET}.attn1.to_q") | {f"unet.{UNET}.attn1.to_q.alpha": numbers()},
        {},
        {"diffusers": ("fails", "not all names contain 'lora'")},
    ),
    "alphas beside diffusers' names of FLUX": (
        {
            f"transformer.{T}.attn.to_q.{leaf}": numbers(*shape)
            for leaf, shape in {
                "lora_down.weight": (2, H),
                "lora_up.weight": (H, 2),
                "alpha": (),
            }.items()
        }
        | FLUX_FIRST,
        {},
        {"diffusers": ("wrong-scale", "its alpha is left out")},
    ),
    "alphas of FLUX by how names end": (
        with_alpha("transformer.proj_out", 4, PEFT_LAYER)
        | with_alpha("transformer.single_transformer_blocks.0.proj_out", 2, PEFT_LAYER)
        | with_alpha("transformer.x_embedder", 2, PEFT_LAYER)
        | with_alpha("transformer.time_text_embed.text_embedder.linear_1", 2, PEFT_LAYER),
        {},
        {"diffusers": ("wrong-scale", "looked up by how names end")},
    ),
    "alphas of LTX-Video": (
        with_alpha("diffusion_model.transformer_blocks.0.attn1.to_q")
        | with_alpha("diffusion_model.patchify_proj"),
        {},
        {"diffusers": ("fails", "not all names contain 'lora'")},
    ),
    "LTX-Video's own names": (
        dotted("diffusion_model.transformer_blocks.0.attn1.to_q")
        | dotted("diffusion_model.patchify_proj"),
        {},
        {"diffusers": ("partial", "renames what stands before names")},
    ),
    "a block of Lumina2": (lumina_block(3840), {}, {"diffusers": ("full", "")}),
    "a block of Lumina2 of another width": (
        lumina_block(3 * H),
        {},
        {"diffusers": ("fails", "3840 rows that are split")},
    ),
    "part of a block of Lumina2": (
        {k: v for k, v in lumina_block(3840).items() if ".w2." not in k},
        {},
        {"diffusers": ("fails", "takes whole blocks alone")},
    ),
    "a module of Lumina2 beside its blocks": (
        lumina_block(3840) | dotted("diffusion_model.x_embedder"),
        {},
        {"diffusers": ("fails", "x_embedder is left over")},
    ),
    "Lumina2 in diffusers' names with ComfyUI's prefix": (
        dotted("diffusion_model.layers.0.attn.to_q")
        | dotted("diffusion_model.noise_refiner.0.norm1.linear"),
        {},
        {"diffusers": ("fails", "takes whole blocks alone")},
    ),
    "HunyuanVideo's refiner": (
        dotted("diffusion_model.double_blocks.0.img_attn_qkv")
        | dotted("diffusion_model.txt_in.individual_token_refiner.blocks.0.self_attn_qkv", 3),
        {},
        {"diffusers": ("fails", "split in three")},
    ),
    "HunyuanVideo's last modulation": (
        dotted("diffusion_model.double_blocks.0.img_attn_qkv")
        | dotted("diffusion_model.final_layer.adaLN_modulation.1", 4),
        {},
        {"diffusers": ("wrong-scale", "halves of its A")},
    ),
    "HunyuanVideo's last modulation with one row": (
        dotted("diffusion_model.double_blocks.0.img_attn_qkv")
        | dotted("diffusion_model.final_layer.adaLN_modulation.1", 1),
        {},
        {"diffusers": ("fails", "has one row")},
    ),
    "LyCORIS' names of a UNet": (
        {
            key.replace("lora_unet_", "lycoris_"): value
            for key, value in flat(f"{UNET}.attn1.to_q", 2).items()
        },
        {},
        {"diffusers": ("fails", "not all names contain 'lora'")},
    ),
    "a transformer's name where diffusers puts one before": (
        dotted("transformer.transformer_blocks.0.img_mlp.net.0.proj")
        | {"transformer.transformer_blocks.0.img_mlp.net.0.proj.alpha": numbers()},
        {},
        {"diffusers": ("fails", "NoMatchingPeftModuleError")},
    ),
    "Wan in diffusers' names with ComfyUI's prefix": (
        dotted("diffusion_model.blocks.0.attn2.to_k"),
        {},
        {"diffusers": ("fails", "left over")},
    ),
    "FLUX's own names": (
        dotted("double_blocks.0.img_attn.qkv"),
        {},
        {"diffusers": ("none", "no converter"), "comfyui": ("none", "without 'diffusion_model.'")},
    ),
    "LoKr": (
        {
            f"lora_unet_{UNET.replace('.', '_')}_attn1_to_q.{role}": numbers(*shape)
            for role, shape in {"lokr_w1": (2, 2), "lokr_w2": (4, 4)}.items()
        },
        {},
        {
            "diffusers": ("fails", "not renamed"),
            "comfyui": ("full", ""),
            "kohya": ("none", "plain LoRA only"),
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_traps(tmp_path, name):
    tensors, header, wanted = CASES[name]
    src = tmp_path / "a.safetensors"
    write_tensors(src, tensors, header)
    for tool, (verdict, reason) in wanted.items():
        found = check_for(src, tool)
        reasons = " ".join([*found.failures, *(target.reason for target in found.targets)])
        assert found.verdict == verdict, (tool, reasons)
        assert reason in reasons


def test_names_of_several_models(tmp_path, capsys):
    src = tmp_path / "a.safetensors"
    write_tensors(src, with_alpha(f"transformer.{T}.attn.to_q"), {})
    found = check_for(src, "diffusers")
    assert found.verdict == "fails"
    (note,) = found.notes
    assert "does not tell which model" in note
    for family, verdict in {"sd3": "fails", "flux": "wrong-scale"}.items():
        assert main(["check", str(src), "--for", "diffusers", "--from", family, "--json"]) == 4
        said = json.loads(capsys.readouterr().out)
        assert (said["verdict"], said["notes"]) == (verdict, [])
        assert f"--from {family}" in said["fix"]


@pytest.mark.parametrize(("width", "verdict"), [(1536, "fails"), (3072, "wrong-scale")])
def test_the_width_of_attention_tells_sd3_and_flux_apart(tmp_path, width, verdict):
    down, up = np.ones((2, width), np.float32), np.ones((width, 2), np.float32)
    stem = f"transformer.{T}.attn.to_q"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    src = tmp_path / "a.safetensors"
    write_tensors(src, tensors | {f"{stem}.alpha": np.float32(1)}, {})
    found = check_for(src, "diffusers")
    assert (found.verdict, found.notes) == (verdict, [])


def test_a_family_is_named_for_images_only(tmp_path):
    with pytest.raises(BadInputError, match="--from: only for the family"):
        regraft.check(llama_lora(tmp_path), source="llama")


def llama_lora(folder):
    write_tensors(
        folder / "adapter_model.safetensors",
        dotted("base_model.model.model.layers.0.self_attn.q_proj"),
        {},
    )
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_the_command_that_fixes_it(tmp_path, capsys):
    src = tmp_path / "a.safetensors"
    write_tensors(src, kohya_flux()[0], {})
    assert main(["check", str(src), "--for", "diffusers"]) == 4
    assert main(["check", str(src), "--for", "diffusers", "--json"]) == 4
    told = capsys.readouterr().out
    command = shlex.split(json.loads(told[told.index("\n{") :])["fix"])
    made = tmp_path / "a-diffusers.safetensors"
    assert command == ["regraft", "convert", str(src), str(made), "--to", "diffusers"]
    assert main(command[1:]) == 0
    assert main(["check", str(made), "--for", "diffusers"]) == 0
