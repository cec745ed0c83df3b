"""Convert whole pipelines of image models to single files and back, and let diffusers read both.

    python scripts/consumers/diffusers_pipelines.py [FAMILY ...]

For every family, a tiny pipeline that diffusers saved: as one file, diffusers' `from_single_file` must read what was
saved; and the folder that is made of that file again must hold it, bit for bit, and load.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders import single_file_model
from diffusers.loaders import single_file_utils as files
from diffusers_bases import shrunk
from safetensors.torch import load_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

import regraft

CLIP = {
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 12,
    "vocab_size": 20,
    "max_position_embeddings": 7,
    "eos_token_id": 19,
    "bos_token_id": 18,
    "pad_token_id": 1,
}


def clip(cls: Any, **more: Any) -> Any:
    """A tiny text encoder."""
    return cls(CLIPTextConfig(**(CLIP | more)))


def t5() -> Any:
    """A tiny T5 encoder."""
    return T5EncoderModel(
        T5Config(vocab_size=20, d_model=10, d_kv=4, d_ff=14, num_layers=2, num_heads=2)
    )


def vae(latents: int = 4, *, convolutions: bool = True) -> Any:
    """A tiny VAE with four levels."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=2,
        latent_channels=latents,
        use_quant_conv=convolutions,
        use_post_quant_conv=convolutions,
    )


def sdxl() -> Any:
    """Stable Diffusion XL."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(1, 2, 4),
        cross_attention_dim=24,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=60,
        norm_num_groups=4,
        sample_size=16,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(CLIPTextModel),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(),
    )


def sd15() -> Any:
    """Stable Diffusion 1."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16, 16, 16),
        attention_head_dim=4,
        cross_attention_dim=12,
        norm_num_groups=4,
        sample_size=16,
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(CLIPTextModel),
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.PNDMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def flux() -> Any:
    """FLUX.1; diffusers' converter has its width in its code."""
    classes = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    classes["checkpoint_mapping_fn"] = shrunk(
        files.convert_flux_transformer_checkpoint_to_diffusers,
        width=("inner_dim = 3072", "inner_dim = 8"),
    )
    transformer = diffusers.FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        in_channels=16,
        joint_attention_dim=10,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(2, 1, 1),
    )
    return diffusers.FluxPipeline(
        vae=vae(16, convolutions=False),
        text_encoder=clip(CLIPTextModel),
        text_encoder_2=t5(),
        tokenizer=None,
        tokenizer_2=None,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def sd3() -> Any:
    """Stable Diffusion 3.5."""
    transformer = diffusers.SD3Transformer2DModel(
        num_layers=3,
        attention_head_dim=4,
        num_attention_heads=2,
        in_channels=16,
        out_channels=16,
        joint_attention_dim=10,
        caption_projection_dim=8,
        pooled_projection_dim=24,
        pos_embed_max_size=4,
        sample_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(16, convolutions=False),
        text_encoder=clip(CLIPTextModelWithProjection),
        text_encoder_2=clip(CLIPTextModelWithProjection, hidden_size=14, projection_dim=14),
        text_encoder_3=t5(),
        tokenizer=None,
        tokenizer_2=None,
        tokenizer_3=None,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


FAMILIES: dict[str, tuple[str, Callable[[], Any]]] = {
    "sd15": ("ldm", sd15),
    "sdxl": ("ldm", sdxl),
    "sd3": ("sd3", sd3),
    "flux": ("bfl", flux),
}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a pipeline's folder, by part and name; a text encoder's as transformers 4 names them."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        part = file.parent.name
        for name, tensor in load_file(file).items():
            old = part.startswith("text_encoder") and name.startswith(
                ("embeddings.", "final_layer")
            )
            old = old or (part.startswith("text_encoder") and name.startswith("encoder.layers."))
            found[f"{part}/{'text_model.' * old}{name}"] = tensor
    return found


def unequal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not the same in both."""
    return [
        name
        for name in sorted({*one, *other})
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    ]


def compare(family: str, work: Path) -> list[str]:
    """What is wrong on the way to one file and back."""
    layout, make = FAMILIES[family]
    torch.manual_seed(0)
    saved, single, back = work / "saved", work / "single.safetensors", work / "back"
    pipeline = make()
    pipeline.save_pretrained(saved)
    before = tensors_of(saved)
    report = regraft.convert(saved, single, to=layout)
    assert report.checkpoint is not None
    print(
        f"{family}: {report.checkpoint.tensors_in} -> {report.checkpoint.tensors_out} tensors",
        end="; ",
    )
    problems = []
    for part in ("unet", "transformer", "vae"):
        model = getattr(pipeline, part, None)
        if model is not None:
            read = type(model).from_single_file(str(single), config=str(saved), subfolder=part)
            wrong = unequal(dict(read.state_dict()), dict(model.state_dict()))
            problems += [f"diffusers reads {part}.{name} differently" for name in wrong]
    regraft.convert(single, back, to="diffusers", model=saved)
    problems += [f"not the same after both ways: {n}" for n in unequal(before, tensors_of(back))]
    none = {name: None for name, part in pipeline.components.items() if part is None}
    loaded = type(pipeline).from_pretrained(back, **none)
    for name, model in pipeline.components.items():
        if isinstance(model, torch.nn.Module):
            wrong = unequal(dict(getattr(loaded, name).state_dict()), dict(model.state_dict()))
            problems += [f"diffusers loads {name}.{key} differently" for key in wrong]
    return problems


def main() -> int:
    """Compare every family that is asked for."""
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    status = 0
    for family in [x for x in sys.argv[1:] if x != "--strict"] or FAMILIES:
        with tempfile.TemporaryDirectory() as work:
            problems = compare(family, Path(work))
        print("equal" if not problems else f"{len(problems)} NOT equal")
        for problem in problems[:10]:
            print(f"  {problem}")
        status |= bool(problems)
    return status


if __name__ == "__main__":
    sys.exit(main())
