"""`regraft check --for diffusers|comfyui|kohya`: traps that the loaders have, and the command that fixes the file."""

import json

import numpy as np
import pytest
from dialects.image.samples import H, kohya_flux, numbers, pair

from regraft.checking.for_tool import check_for
from regraft.cli import main
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
        },
        {},
        {"diffusers": ("wrong-scale", "its alpha is left out")},
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


def test_the_command_that_fixes_it(tmp_path, capsys):
    src = tmp_path / "a.safetensors"
    write_tensors(src, kohya_flux()[0], {})
    assert main(["check", str(src), "--for", "diffusers"]) == 4
    assert f"regraft convert {src} OUT --to diffusers" in capsys.readouterr().out.replace("\n", " ")
    assert main(["convert", str(src), str(tmp_path / "b.safetensors"), "--to", "diffusers"]) == 0
    assert main(["check", str(tmp_path / "b.safetensors"), "--for", "diffusers"]) == 0
