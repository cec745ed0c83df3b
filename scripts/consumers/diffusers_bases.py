"""Compare the rule books of image and video models with diffusers' own converters of single files.

    python scripts/consumers/diffusers_bases.py [FAMILY ...] [--write FOLDER]

For every family, at two sizes: the tensors of diffusers' own model, every element different, go through the book to the
names of the single file, and from there through diffusers' converter. What comes back must be what there was, and the
book must make of the single file what the converter does: every tensor, bit for bit. `--write` notes the hash of each
single file, for tests that have no diffusers.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.loaders import single_file_utils as files
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    MistralConfig,
    MistralModel,
    UMT5Config,
    UMT5EncoderModel,
)

from regraft.arrays.apply import apply_plan
from regraft.layouts.graph import edges_to
from regraft.names.keys import group_names
from regraft.planning.build import build_plan
from regraft.planning.plan import Headers
from regraft.rules.book import Book, books_for, built_in

State = dict[str, torch.Tensor]
Converter = Callable[[State], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """A family at one size."""

    family: str
    size: str
    state: State
    """What diffusers' model has."""
    convert: Converter
    """diffusers' way from the single file."""
    same: tuple[str, ...] = ()
    """Beginnings of names that are the same in both layouts."""


def labelled(model: type[torch.nn.Module], tied: str | None = None, **config: Any) -> State:
    """The tensors of a model of a class, every element another number; one that is ``tied`` is no tensor of its own."""
    with torch.device("meta"):
        made = model(**config)
    state, first = {}, 0
    for name, tensor in made.state_dict().items():
        if name == tied:
            continue
        count = tensor.numel()
        state[name] = torch.arange(first, first + count, dtype=torch.int32).reshape(tensor.shape)
        first += count
    return state


def shrunk(function: Callable[..., Any], **sizes: tuple[str, str]) -> Callable[..., Any]:
    """A converter of diffusers with other sizes in place of those in its code."""
    source = inspect.getsource(function)
    for old, new in sizes.values():
        if old not in source:
            raise SystemExit(f"{function.__name__} has no {old!r} any more")
        source = source.replace(old, new)
    space = dict(vars(files))
    exec(source, space)
    return space[function.__name__]


def unet(family: str) -> list[Case]:
    """The UNets of Stable Diffusion."""
    cases = []
    for width in (8, 16):
        config: dict[str, Any] = {
            "layers_per_block": 2,
            "norm_num_groups": 4,
            "cross_attention_dim": 12,
            "use_linear_projection": family != "sd15",
        }
        if family == "sdxl":
            config |= {
                "block_out_channels": (width, 2 * width, 4 * width),
                "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
                "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
                "transformer_layers_per_block": (1, 2, 10 if width == 8 else 3),
                "attention_head_dim": (1, 2, 4),
            }
        else:
            config |= {
                "block_out_channels": (width, 2 * width, 4 * width, 4 * width),
                "attention_head_dim": 4,
            }
        if family == "sdxl_refiner":
            config |= {
                "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"),
                "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
                "transformer_layers_per_block": 2,
            }
        if family.startswith("sdxl"):
            config |= {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 52,
            }
        if family == "sd2" and width == 16:
            config["num_class_embeds"] = 7
        state = labelled(diffusers.UNet2DConditionModel, **config)

        def convert(native: State, config: dict[str, Any] = config) -> Mapping[str, torch.Tensor]:
            prefixed = {files.LDM_UNET_KEY + name: tensor for name, tensor in native.items()}
            return files.convert_ldm_unet_checkpoint(prefixed, dict(config))

        cases.append(Case(family, f"width {width}", state, convert))
    return cases


def flux() -> list[Case]:
    """FLUX.1, with and without guidance."""
    cases = []
    for heads, double, single in ((2, 2, 11), (3, 11, 2)):
        state = labelled(
            diffusers.FluxTransformer2DModel,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=4,
            num_attention_heads=heads,
            in_channels=6,
            joint_attention_dim=10,
            pooled_projection_dim=14,
            guidance_embeds=heads == 2,
            axes_dims_rope=(2, 1, 1),
        )
        convert = shrunk(
            files.convert_flux_transformer_checkpoint_to_diffusers,
            width=("inner_dim = 3072", f"inner_dim = {4 * heads}"),
        )
        cases.append(Case("flux", f"{double} and {single} blocks", state, convert))
    return cases


def chroma() -> list[Case]:
    """Chroma."""
    cases = []
    for heads, double, single in ((2, 2, 11), (3, 11, 2)):
        state = labelled(
            diffusers.ChromaTransformer2DModel,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=4,
            num_attention_heads=heads,
            in_channels=6,
            joint_attention_dim=10,
            approximator_num_channels=8,
            approximator_hidden_dim=12,
            approximator_layers=2,
            axes_dims_rope=(2, 1, 1),
        )
        convert = shrunk(
            files.convert_chroma_transformer_checkpoint_to_diffusers,
            width=("inner_dim = 3072", f"inner_dim = {4 * heads}"),
        )
        same = ("distilled_guidance_layer.in_proj.", "distilled_guidance_layer.out_proj.")
        cases.append(Case("chroma", f"{double} and {single} blocks", state, convert, same))
    return cases


def flux2() -> list[Case]:
    """FLUX.2, with and without guidance."""
    cases = []
    for heads, double, single in ((2, 2, 11), (3, 11, 2)):
        state = labelled(
            diffusers.Flux2Transformer2DModel,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=4,
            num_attention_heads=heads,
            in_channels=6,
            joint_attention_dim=10,
            timestep_guidance_channels=14,
            guidance_embeds=heads == 2,
            axes_dims_rope=(1, 1, 1, 1),
        )
        convert = files.convert_flux2_transformer_checkpoint_to_diffusers
        cases.append(Case("flux2", f"{double} and {single} blocks", state, convert))
    return cases


def sd3() -> list[Case]:
    """Stable Diffusion 3, and 3.5 with norms and second attention."""
    cases = []
    for heads, layers, norm, dual in ((2, 3, None, ()), (3, 11, "rms_norm", (0, 1))):
        state = labelled(
            diffusers.SD3Transformer2DModel,
            num_layers=layers,
            attention_head_dim=4,
            num_attention_heads=heads,
            in_channels=2,
            out_channels=2,
            joint_attention_dim=10,
            caption_projection_dim=4 * heads,
            pooled_projection_dim=14,
            pos_embed_max_size=4,
            sample_size=8,
            dual_attention_layers=dual,
            qk_norm=norm,
        )
        convert = files.convert_sd3_transformer_checkpoint_to_diffusers
        cases.append(Case("sd3", f"{layers} blocks", state, convert, ("context_embedder.",)))
    return cases


def wan() -> list[Case]:
    """Wan: text to video, image to video, VACE."""
    cases = []
    for heads, layers, more in ((2, 2, {}), (3, 11, {"image_dim": 10, "added_kv_proj_dim": 12})):
        config = {
            "num_layers": layers,
            "num_attention_heads": heads,
            "attention_head_dim": 4,
            "in_channels": 3,
            "out_channels": 3,
            "text_dim": 14,
            "freq_dim": 16,
            "ffn_dim": 18,
        }
        state = labelled(diffusers.WanTransformer3DModel, **config, **more)
        convert = files.convert_wan_transformer_to_diffusers
        same = ("patch_embedding.", "vace_patch_embedding.")
        cases.append(Case("wan", f"{layers} blocks", state, convert, same))
        state = labelled(
            diffusers.WanVACETransformer3DModel, **config, vace_layers=[0, 1], vace_in_channels=5
        )
        cases.append(Case("wan", f"VACE, {layers} blocks", state, convert, same))
    return cases


def hunyuan_video() -> list[Case]:
    """HunyuanVideo."""
    cases = []
    for heads, double, single in ((2, 2, 11), (3, 11, 2)):
        state = labelled(
            diffusers.HunyuanVideoTransformer3DModel,
            num_layers=double,
            num_single_layers=single,
            num_refiner_layers=2,
            attention_head_dim=4,
            num_attention_heads=heads,
            in_channels=3,
            out_channels=3,
            text_embed_dim=10,
            pooled_projection_dim=14,
            guidance_embeds=heads == 2,
            rope_axes_dim=(2, 1, 1),
        )
        convert = shrunk(
            files.convert_hunyuan_video_transformer_to_diffusers,
            width=("hidden_size = 3072", f"hidden_size = {4 * heads}"),
        )
        cases.append(Case("hunyuan-video", f"{double} and {single} blocks", state, convert))
    return cases


def ltx_video() -> list[Case]:
    """LTX-Video."""
    cases = []
    for heads, layers in ((2, 2), (3, 11)):
        state = labelled(
            diffusers.LTXVideoTransformer3DModel,
            num_layers=layers,
            attention_head_dim=4,
            num_attention_heads=heads,
            in_channels=3,
            out_channels=3,
            cross_attention_dim=4 * heads,
            caption_channels=10,
        )
        convert = files.convert_ltx_transformer_checkpoint_to_diffusers
        same = ("transformer_blocks.", "scale_shift_table", "caption_projection.", "proj_out.")
        cases.append(Case("ltx-video", f"{layers} blocks", state, convert, same))
    return cases


def z_image() -> list[Case]:
    """Z-Image."""
    cases = []
    for heads, layers in ((2, 2), (3, 11)):
        state = labelled(
            diffusers.ZImageTransformer2DModel,
            n_layers=layers,
            dim=4 * heads,
            n_heads=heads,
            n_kv_heads=heads,
            in_channels=3,
            cap_feat_dim=10,
            axes_dims=[2, 1, 1],
        )
        convert = files.convert_z_image_transformer_checkpoint_to_diffusers
        same = ("layers.", "noise_refiner.", "context_refiner.", "t_embedder.", "cap_", "x_pad_")
        cases.append(Case("z-image", f"{layers} layers", state, convert, same))
    return cases


def lumina2() -> list[Case]:
    """Lumina-Image 2."""
    cases = []
    for heads, layers in ((3, 2), (6, 11)):
        state = labelled(
            diffusers.Lumina2Transformer2DModel,
            num_layers=layers,
            hidden_size=8 * heads,
            num_attention_heads=heads,
            num_kv_heads=heads // 3,
            in_channels=3,
            cap_feat_dim=10,
            multiple_of=2,
            axes_dim_rope=(4, 2, 2),
        )
        convert = shrunk(
            files.convert_lumina2_to_diffusers,
            query=("q_dim = 2304", f"q_dim = {8 * heads}"),
            key=("v_dim = 768", f"v_dim = {8 * heads // 3}"),
        )
        same = ("x_embedder.", "layers.", "noise_refiner.", "context_refiner.")
        cases.append(Case("lumina2", f"{layers} layers", state, convert, same))
    return cases


def qwen_image() -> list[Case]:
    """Qwen-Image, which has one form."""
    cases = []
    for heads, layers in ((2, 2), (3, 11)):
        state = labelled(
            diffusers.QwenImageTransformer2DModel,
            num_layers=layers,
            attention_head_dim=8,
            num_attention_heads=heads,
            in_channels=3,
            joint_attention_dim=10,
            axes_dims_rope=(4, 2, 2),
            use_additional_t_cond=heads == 3,
        )
        cases.append(Case("qwen-image", f"{layers} blocks", state, dict, ("",)))
    return cases


def autoencoder_kl() -> list[Case]:
    """The VAE of Stable Diffusion, with and without convolutions around its latents."""
    cases = []
    for width, convolutions in ((4, True), (8, False)):
        config = {
            "block_out_channels": (width, 2 * width, 2 * width, 4 * width),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
            "norm_num_groups": 2,
            "use_quant_conv": convolutions,
            "use_post_quant_conv": convolutions,
        }
        state = labelled(diffusers.AutoencoderKL, **config)

        def convert(native: State, config: dict[str, Any] = config) -> Mapping[str, torch.Tensor]:
            return files.convert_ldm_vae_checkpoint(native, dict(config))

        same = ("quant_conv.", "post_quant_conv.", "encoder.conv_", "decoder.conv_")
        cases.append(Case("autoencoder-kl", f"width {width}", state, convert, same))
    return cases


def flux2_vae() -> list[Case]:
    """The VAE of FLUX.2; diffusers' converter of it is a script, and does what the one of FLUX.1's does besides."""
    cases = []
    around = {"quant_conv.": "encoder.quant_conv.", "post_quant_conv.": "decoder.post_quant_conv."}
    for width in (4, 8):
        config = {
            "block_out_channels": (width, 2 * width, 2 * width, 4 * width),
            "layers_per_block": 2,
            "norm_num_groups": 2,
        }
        state = labelled(diffusers.AutoencoderKLFlux2, **config)

        def convert(native: State, config: dict[str, Any] = config) -> Mapping[str, torch.Tensor]:
            names = {
                new + name.removeprefix(old): name
                for new, old in around.items()
                for name in native
                if name.startswith(old)
            }
            plain = {name: x for name, x in native.items() if name not in names.values()}
            plain |= {new: native[old] for new, old in names.items()}
            norm = {name: plain.pop(name) for name in list(plain) if name.startswith("bn.")}
            full = {**config, "down_block_types": [0] * 4, "up_block_types": [0] * 4}
            return {**files.convert_ldm_vae_checkpoint(plain, full), **norm}

        same = ("bn.", "encoder.conv_", "decoder.conv_")
        cases.append(Case("flux2-vae", f"width {width}", state, convert, same))
    return cases


def ltx_vae(family: str) -> list[Case]:
    """The VAEs of LTX-Video: 0.9, 0.9.1, and from 0.9.5 on."""
    cases = []
    for width, layers in ((4, 2), (6, 3)):
        wide = (width, 2 * width, 4 * width, 4 * width)
        config: dict[str, Any] = {
            "latent_channels": 4,
            "block_out_channels": wide,
            "down_block_types": ("LTXVideoDownBlock3D",) * 4,
            "decoder_block_out_channels": wide,
            "layers_per_block": (layers, 1, 2, 1, 2),
            "decoder_layers_per_block": (layers, 1, 2, 1, 2),
        }
        if family != "ltx-vae":
            config |= {
                "decoder_block_out_channels": (width, 2 * width, 4 * width),
                "decoder_layers_per_block": (layers, 1, 2, 1),
                "decoder_spatio_temporal_scaling": (True,) * 3,
                "decoder_inject_noise": (family == "ltx-vae-091",) * 3 + (False,),
                "upsample_residual": (True,) * 3,
                "upsample_factor": (2,) * 3,
                "timestep_conditioning": True,
            }
        if family == "ltx-vae-095":
            config |= {
                "block_out_channels": (width, 2 * width, 4 * width, 8 * width, 16 * width),
                "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
                "spatio_temporal_scaling": (True,) * 4,
                "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
            }
        state = labelled(diffusers.AutoencoderKLLTXVideo, **config)

        # It tells the newest by the width of the encoder.
        converter = shrunk(
            files.convert_ltx_vae_checkpoint_to_diffusers,
            width=("shape[1] == 2048", f"shape[1] == {16 * width}"),
        )

        def convert(native: State, converter: Converter = converter) -> Mapping[str, torch.Tensor]:
            return converter({f"vae.{name}": tensor for name, tensor in native.items()})

        same = ("encoder.conv_", "decoder.conv_", "decoder.timestep")
        same += tuple(f"decoder.up_blocks.{number}.time_embedder." for number in (0, 2))
        cases.append(Case(family, f"width {width}", state, convert, same))
    return cases


def wan22_vae() -> list[Case]:
    """The VAE of Wan 2.2 5B; diffusers' converter is a script, of which the renames stand here."""
    cases = []
    names = (
        (r"residual\.0\.gamma$", "norm1.gamma"),
        (r"residual\.2\.", "conv1."),
        (r"residual\.3\.gamma$", "norm2.gamma"),
        (r"residual\.6\.", "conv2."),
        (r"shortcut\.", "conv_shortcut."),
        (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
        (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
        (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
        (r"^conv1\.", "quant_conv."),
        (r"^conv2\.", "post_quant_conv."),
        (r"middle\.0\.", "mid_block.resnets.0."),
        (r"middle\.1\.", "mid_block.attentions.0."),
        (r"middle\.2\.", "mid_block.resnets.1."),
        (
            r"(down|up)samples\.(\d+)\.\1samples\.\d+\.(resample|time_conv)",
            r"\1_blocks.\2.\1sampler.\3",
        ),
        (r"(down|up)samples\.(\d+)\.\1samples\.(\d+)\.", r"\1_blocks.\2.resnets.\3."),
    )

    def convert(native: State) -> Mapping[str, torch.Tensor]:
        made = {}
        for name, tensor in native.items():
            for pattern, new in names:
                name = re.sub(pattern, new, name)
            made[name] = tensor
        return made

    for width in (4, 8):
        state = labelled(
            diffusers.AutoencoderKLWan,
            base_dim=width,
            decoder_base_dim=2 * width,
            z_dim=4,
            dim_mult=[1, 2, 4, 4],
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
        )
        cases.append(Case("wan22-vae", f"width {width}", state, convert))
    return cases


def hunyuan_video_vae() -> list[Case]:
    """The VAE of HunyuanVideo, as ComfyUI holds it."""
    cases = []
    for width in (4, 8):
        config = {
            "block_out_channels": (width, 2 * width, 2 * width, 4 * width),
            "norm_num_groups": 2,
            "latent_channels": 4,
        }
        state = labelled(diffusers.AutoencoderKLHunyuanVideo, **config)

        def convert(native: State, config: dict[str, Any] = config) -> Mapping[str, torch.Tensor]:
            # diffusers' converter of the flat VAE, for which causal convolutions are plain ones.
            full = {
                **config,
                "layers_per_block": 2,
                "down_block_types": [0] * 4,
                "up_block_types": [0] * 4,
            }
            flat = {re.sub(r"\.conv\.(weight|bias)$", r".\1", name): name for name in native}
            flat |= {
                name + f".conv.{leaf}": old
                for new, old in list(flat.items())
                for name, _, leaf in [new.rpartition(".")]
                if name.endswith("sample")
            }
            flat = {
                new: old
                for new, old in flat.items()
                if not re.search(r"sample\.(weight|bias)$", new)
            }
            square = {
                new: native[old][..., 0]
                if ".attn_1." in new and native[old].ndim == 5
                else native[old]
                for new, old in flat.items()
            }
            made = files.convert_ldm_vae_checkpoint(square, full)
            return {
                name if tensor.ndim < 5 and not _causal(name) else _with_conv(name): tensor
                for name, tensor in made.items()
            }

        same = ("quant_conv.", "post_quant_conv.", "encoder.conv_", "decoder.conv_")
        cases.append(Case("hunyuan-video-vae", f"width {width}", state, convert, same))
    return cases


def _causal(name: str) -> bool:
    return (
        re.search(r"(?:^|\.)(?:conv_in|conv_out|conv1|conv2|conv_shortcut|conv)\.bias$", name)
        is not None
    )


def _with_conv(name: str) -> str:
    path, _, leaf = name.rpartition(".")
    return name if path.endswith("quant_conv") else f"{path}.conv.{leaf}"


def wan_vae() -> list[Case]:
    """The VAE of Wan 2.1."""
    cases = []
    for width in (4, 8):
        state = labelled(diffusers.AutoencoderKLWan, base_dim=width, z_dim=4, dim_mult=[1, 2, 4, 4])
        cases.append(Case("wan-vae", f"width {width}", state, files.convert_wan_vae_to_diffusers))
    return cases


def open_clip(family: str) -> list[Case]:
    """OpenCLIP's text encoders."""
    cases = []
    for width, layers in ((8, 2), (12, 11)):
        config = CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            projection_dim=width,
            vocab_size=20,
            max_position_embeddings=7,
            eos_token_id=19,
            bos_token_id=18,
        )
        state = labelled(CLIPTextModelWithProjection, config=config)
        if family == "open-clip-sd2":
            del state["text_projection.weight"]

        def convert(native: State, config: Any = config) -> Mapping[str, torch.Tensor]:
            prefixed = {f"p.{name}": tensor for name, tensor in native.items()}
            return files.convert_open_clip_checkpoint(
                SimpleNamespace(config=config), prefixed, "p."
            )

        cases.append(Case(family, f"{layers} layers", state, convert))
    return cases


def mistral3_text() -> list[Case]:
    """The language model inside a Mistral 3; ComfyUI's names are those of a Mistral by itself."""
    cases = []
    for width, layers in ((8, 2), (12, 11)):
        config = MistralConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=20,
        )
        inside = "language_model.model."
        state = {inside + name: x for name, x in labelled(MistralModel, config=config).items()}

        def convert(native: State) -> Mapping[str, torch.Tensor]:
            return {f"language_model.model.{name}": tensor for name, tensor in native.items()}

        cases.append(Case("mistral3-text", f"{layers} layers", state, convert))
    return cases


def wan_umt5() -> list[Case]:
    """Wan's text encoder; diffusers takes it from transformers, so the renames stand here."""
    cases = []
    names = {
        "token_embedding": "shared",
        "norm": "encoder.final_layer_norm",
        **{f"attn.{x}": f"layer.0.SelfAttention.{x}" for x in "qkvo"},
        "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
        "norm1": "layer.0.layer_norm",
        "norm2": "layer.1.layer_norm",
        "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
        "ffn.fc1": "layer.1.DenseReluDense.wi_1",
        "ffn.fc2": "layer.1.DenseReluDense.wo",
    }

    def convert(native: State) -> Mapping[str, torch.Tensor]:
        made = {}
        for name, tensor in native.items():
            block = re.match(r"blocks\.(\d+)\.", name)
            rest = name[block.end() :] if block else name
            new = names[rest.removesuffix(".weight")] + ".weight"
            made[f"encoder.block.{block[1]}.{new}" if block else new] = tensor
        return made

    for width, layers in ((8, 2), (12, 11)):
        config = UMT5Config(
            d_model=width, d_kv=4, d_ff=2 * width, num_layers=layers, num_heads=2, vocab_size=20
        )
        state = labelled(UMT5EncoderModel, tied="encoder.embed_tokens.weight", config=config)
        cases.append(Case("wan-umt5", f"{layers} layers", state, convert))
    return cases


FAMILIES: dict[str, Callable[[], list[Case]]] = {
    "autoencoder-kl": autoencoder_kl,
    "open-clip": partial(open_clip, "open-clip"),
    "open-clip-sd2": partial(open_clip, "open-clip-sd2"),
    "flux2-vae": flux2_vae,
    "hunyuan-video-vae": hunyuan_video_vae,
    "ltx-vae": partial(ltx_vae, "ltx-vae"),
    "ltx-vae-091": partial(ltx_vae, "ltx-vae-091"),
    "ltx-vae-095": partial(ltx_vae, "ltx-vae-095"),
    "mistral3-text": mistral3_text,
    "wan-vae": wan_vae,
    "wan22-vae": wan22_vae,
    "wan-umt5": wan_umt5,
    "chroma": chroma,
    "flux": flux,
    "flux2": flux2,
    "hunyuan-video": hunyuan_video,
    "ltx-video": ltx_video,
    "lumina2": lumina2,
    "qwen-image": qwen_image,
    "sd3": sd3,
    "wan": wan,
    "z-image": z_image,
    "sd15": partial(unet, "sd15"),
    "sd2": partial(unet, "sd2"),
    "sdxl": partial(unet, "sdxl"),
    "sdxl_refiner": partial(unet, "sdxl_refiner"),
}


def through(book: Book, state: Mapping[str, torch.Tensor], layout: str) -> State:
    """A state dict by a rule book."""
    tensors = list(state.values())
    headers = Headers(
        group_names(list(state)), [tuple(t.shape) for t in tensors], ["int32"] * len(tensors)
    )
    return apply_plan(build_plan(headers, edges_to([book], layout)), tensors)


def differences(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of tensors that are not the same in both."""
    return [
        name
        for name in sorted({*found, *wanted})
        if name not in found or name not in wanted or not torch.equal(found[name], wanted[name])
    ]


def compare(case: Case) -> tuple[State, list[str]]:
    """The single file of a case, and what is wrong with the book."""
    (book,) = books_for([case.family], built_in())
    native = through(book, case.state, book.left)
    converted = dict(case.convert(dict(native)))
    problems = [f"not undone by diffusers: {n}" for n in differences(converted, case.state)]
    forward = through(book, native, book.right)
    problems += [f"not as diffusers makes it: {n}" for n in differences(forward, converted)]
    unchanged = [n for n in native if n in case.state and not n.startswith(case.same or ("\0",))]
    problems += [f"has the same name in both: {n}" for n in unchanged]
    return native, problems


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """A hash of names, shapes and elements."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(f"{name} {list(state[name].shape)} ".encode())
        found.update(state[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def main() -> int:
    """Compare every family that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--write", type=Path)
    parser.add_argument("--strict", action="store_true", help="nothing here is skipped")
    options = parser.parse_args()
    status = 0
    for family in options.families:
        sizes = []
        for case in FAMILIES[family]():
            native, problems = compare(case)
            verdict = "equal" if not problems else f"{len(problems)} NOT equal"
            print(
                f"{family} ({case.size}): {len(native)} tensors, {len(case.state)} in diffusers: {verdict}"
            )
            for problem in problems[:10]:
                print(f"  {problem}")
            status |= bool(problems)
            shapes = {name: list(tensor.shape) for name, tensor in case.state.items()}
            sizes.append({"size": case.size, "diffusers": shapes, "native": digest(native)})
        if options.write is not None and not status:
            data = json.dumps(sizes, separators=(",", ":")).encode()
            (options.write / f"{family}.json.gz").write_bytes(gzip.compress(data, 9, mtime=0))
    return status


if __name__ == "__main__":
    sys.exit(main())
