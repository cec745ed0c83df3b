"""The families of image and video models: what tools call their parts, and what tells one from another.

How a family's modules are named and shaped in each layout, its rule book says. Here stands what is about tools: which
layout a tool's files name modules in, what stands before the modules of each component, and the marks in headers.

Sources: sd-scripts (``networks/lora*.py``: ``LORA_PREFIX_*``), musubi-tuner (``networks/``), OneTrainer
(``modules/model/*Model.py``), diffusers 0.42.1 (``loaders/lora_pipeline.py``), ComfyUI (``comfy/lora.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property

DENOISER = "denoiser"

CLIP_V4 = "text_model."
"""What transformers 5 left out of the names of a CLIPTextModel; files have it."""

_CLIP = (
    "text_projection",
    *(
        f"text_model.{name}"
        for name in (
            *(
                f"encoder.layers.{{}}.self_attn.{x}"
                for x in ("q_proj", "k_proj", "v_proj", "out_proj")
            ),
            *(
                f"encoder.layers.{{}}.{x}"
                for x in ("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2")
            ),
            "embeddings.token_embedding",
            "embeddings.position_embedding",
            "final_layer_norm",
        )
    ),
)

_T5 = (
    *(f"encoder.block.{{}}.layer.0.SelfAttention.{x}" for x in "qkvo"),
    *(f"encoder.block.{{}}.layer.1.DenseReluDense.{x}" for x in ("wi", "wi_0", "wi_1", "wo")),
    *(f"encoder.block.{{}}.layer.{{}}.{x}" for x in ("layer_norm",)),
    "encoder.final_layer_norm",
    "shared",
)

_DECODER = tuple(
    f"{root}layers.{{}}.{name}"
    for root in ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
    for name in (
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
        "input_layernorm",
        "post_attention_layernorm",
    )
)

BODIES = {"clip": _CLIP, "t5": _T5, "decoder": _DECODER}
"""The modules of text encoders, by their kind; they are named alike everywhere."""


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """One of a family's text encoders."""

    name: str
    """diffusers' name of the component."""
    body: str
    """The kind of model (`BODIES`)."""
    kohya: tuple[str, ...]
    """Prefixes of flat names; the first one is written."""
    comfy: str
    """ComfyUI's name of it."""


@dataclass(frozen=True)
class Family:
    """A family of models with one architecture."""

    name: str
    title: str
    book: str
    """The name of its rule book."""
    component: str
    """diffusers' name of the denoiser: ``unet`` or ``transformer``."""
    native: str
    """The layout of the model's own code, which ComfyUI names modules in; ``diffusers`` where that is the same."""
    kohya: str
    """The layout that flat names of sd-scripts and musubi-tuner are in."""
    text_encoders: tuple[TextEncoder, ...] = ()
    modules: tuple[str, ...] = ()
    """Of the denoiser, where one layout is all there is, so that no book has them."""
    convolutions: tuple[str, ...] = ()
    """Those of them that are convolutions."""
    excludes: str = ""
    """A pattern of modules that it does not have although a rule of its book would fit."""
    marks: str = ""
    """A pattern of what headers call it."""
    context: int = 0
    """How wide the text is that cross-attention sees, in genuine models; 0 where it tells nothing."""
    kernels: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Patterns of convolutions, and the kernels that they have."""
    ratios: tuple[tuple[str, float], ...] = ()
    """Patterns of modules, and how many times its columns each one's rows are."""
    last_block: tuple[str, float] | None = None
    """A pattern with the number of a block, and how many times its columns the rows are in the last block only."""
    comfy_names: tuple[tuple[str, str], ...] = ()
    """Where ComfyUI's model names modules otherwise than the native code: what is replaced, and by what."""
    comfy_also: tuple[tuple[str, str], ...] = ()
    """The same where ComfyUI takes the native names as well: these are written, and both are read."""
    ai_toolkit: str = "diffusion_model."
    """What ai-toolkit writes before modules; ``lora_unet_`` where it writes kohya's names."""
    ai_toolkit_layout: str = ""
    """The layout of its names there; the native one where it is empty."""

    @cached_property
    def layouts(self) -> tuple[str, ...]:
        """The layouts that its modules may be named in."""
        return tuple(dict.fromkeys(("diffusers", self.native)))

    def in_comfy(self, path: str) -> str:
        """What is written for ComfyUI for a module that has a native name."""
        for native, comfy in self.comfy_names:
            path = path.replace(native, comfy)
        return path

    def of_comfy(self, path: str) -> str:
        """ComfyUI's own name of a module that has a native one."""
        path = self.in_comfy(path)
        for native, comfy in self.comfy_also:
            path = path.replace(native, comfy)
        return path

    def text_encoder(self, name: str) -> TextEncoder | None:
        """A text encoder by diffusers' name of it."""
        return next((x for x in self.text_encoders if x.name == name), None)


_UNET_KERNELS = (
    (r"(?:.*\.)?(?:proj_in|proj_out|conv_shortcut|skip_connection)", (1, 1)),
    (r".*", (3, 3)),
)

_FLUX_RATIOS = (
    (r"single_blocks\.\d+\.linear1", 7),
    (r"(?:single_blocks\.\d+\.linear2|single_transformer_blocks\.\d+\.proj_out)", 1 / 5),
    (
        r"double_blocks\.\d+\.(?:img|txt)_mlp\.(?:0|fc1)|transformer_blocks\.\d+\.ff(?:_context)?\.net\.0\.proj",
        4,
    ),
)
_CLIP_L = TextEncoder("text_encoder", "clip", ("lora_te1_", "lora_te_"), "clip_l")
_CLIP_G = TextEncoder("text_encoder_2", "clip", ("lora_te2_",), "clip_g")

_QWEN = (
    "img_in",
    "txt_in",
    "txt_norm",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    *(
        f"transformer_blocks.{{}}.{name}"
        for name in (
            *(f"attn.to_{x}" for x in ("q", "k", "v", "out.0", "add_out")),
            *(f"attn.add_{x}_proj" for x in "qkv"),
            *(f"attn.norm_{x}" for x in ("q", "k", "added_q", "added_k")),
            *(f"{s}_{x}" for s in ("img", "txt") for x in ("mod.1", "mlp.net.0.proj", "mlp.net.2")),
        )
    ),
    "norm_out.linear",
    "proj_out",
)

FAMILIES: tuple[Family, ...] = (
    Family(
        "sd15",
        "Stable Diffusion 1.5",
        "sd15",
        "unet",
        "ldm",
        "diffusers",
        (TextEncoder("text_encoder", "clip", ("lora_te_", "lora_te1_"), "clip_l"),),
        excludes=r".*attentions\.\d+\.transformer_blocks\.[1-9].*|.*\d\.1\.transformer_blocks\.[1-9].*"
        r"|add_embedding.*|label_emb.*|down_blocks\.3\.(?:attentions|downsamplers).*|up_blocks\.0\.attentions.*"
        r"|output_blocks\.[0-2]\.1\.(?:proj|transformer|norm).*|(?:input|output)_blocks\.1[2-9].*"
        r"|output_blocks\.2\.2.*",
        marks=r"sd_?v?1(?:\.5)?|sd_1.*|stable-diffusion-v1.*|sd15",
        context=768,
        kernels=_UNET_KERNELS,
        ai_toolkit="lora_unet_",
        ai_toolkit_layout="diffusers",
    ),
    Family(
        "sdxl",
        "Stable Diffusion XL",
        "sdxl",
        "unet",
        "ldm",
        "ldm",
        (_CLIP_L, _CLIP_G),
        excludes=r"down_blocks\.0\.attentions.*|(?:down|up)_blocks\.3.*|up_blocks\.2\.attentions.*"
        r"|down_blocks\.2\.downsamplers.*|up_blocks\.2\.upsamplers.*"
        r"|input_blocks\.[12]\.1.*|input_blocks\.(?:9|1\d).*|output_blocks\.[678]\.1.*"
        r"|output_blocks\.(?:9|1\d).*|output_blocks\.2\.1\.conv",
        marks=r"sdxl.*|stable-diffusion-xl.*|pony.*|illustrious.*|noobai.*",
        context=2048,
        kernels=_UNET_KERNELS,
        ai_toolkit="lora_unet_",
        ai_toolkit_layout="diffusers",
    ),
    Family(
        "sd2",
        "Stable Diffusion 2",
        "sd2",
        "unet",
        "ldm",
        "diffusers",
        (TextEncoder("text_encoder", "clip", ("lora_te_", "lora_te1_"), "clip_h"),),
        excludes=r".*attentions\.\d+\.transformer_blocks\.[1-9].*|.*\d\.1\.transformer_blocks\.[1-9].*"
        r"|add_embedding.*|label_emb\.0.*|down_blocks\.3\.(?:attentions|downsamplers).*|up_blocks\.0\.attentions.*"
        r"|output_blocks\.[0-2]\.1\.(?:proj|transformer|norm).*|output_blocks\.2\.2.*",
        marks=r"sd_?v?2.*|stable-diffusion-v2.*",
        context=1024,
        kernels=_UNET_KERNELS,
        ai_toolkit="lora_unet_",
        ai_toolkit_layout="diffusers",
    ),
    Family(
        "flux",
        "FLUX.1",
        "flux",
        "transformer",
        "bfl",
        "bfl",
        (_CLIP_L, TextEncoder("text_encoder_2", "t5", ("lora_te3_", "lora_te2_"), "t5xxl")),
        ratios=_FLUX_RATIOS,
        marks=r"flux-?_?1?(?:[.-]?1)?(?:-?(?:dev|schnell|kontext|krea|fill).*)?|flux1.*",
        ai_toolkit="transformer.",
        ai_toolkit_layout="diffusers",
    ),
    Family(
        "chroma",
        "Chroma",
        "chroma",
        "transformer",
        "bfl",
        "bfl",
        (TextEncoder("text_encoder", "t5", ("lora_te1_", "lora_te3_", "lora_te_"), "t5xxl"),),
        ratios=_FLUX_RATIOS,
        marks=r"chroma.*",
    ),
    Family(
        "flux2",
        "FLUX.2",
        "flux2",
        "transformer",
        "bfl",
        "bfl",
        (TextEncoder("text_encoder", "decoder", ("lora_te_", "lora_te1_"), "mistral3_24b"),),
        ratios=(
            (
                r"single_blocks\.\d+\.linear1|single_transformer_blocks\.\d+\.attn\.to_qkv_mlp_proj",
                9,
            ),
            (r"single_blocks\.\d+\.linear2|single_transformer_blocks\.\d+\.attn\.to_out", 1 / 4),
            (
                r"double_blocks\.\d+\.(?:img|txt)_mlp\.0|transformer_blocks\.\d+\.ff(?:_context)?\.linear_in",
                6,
            ),
        ),
        marks=r"flux-?_?2.*",
    ),
    Family(
        "sd3",
        "Stable Diffusion 3 and 3.5",
        "sd3",
        "transformer",
        "sd3",
        "sd3",
        (
            _CLIP_L,
            _CLIP_G,
            TextEncoder("text_encoder_3", "t5", ("lora_te3_", "lora_te2_"), "t5xxl"),
        ),
        last_block=(
            r"(?:joint_blocks\.(\d+)\.context_block\.adaLN_modulation\.1|transformer_blocks\.(\d+)\.norm1_context\.linear)",
            2,
        ),
        marks=r"sd3.*|sd35.*|stable-diffusion-3.*",
    ),
    Family(
        "qwen-image",
        "Qwen-Image",
        "qwen_image",
        "transformer",
        "diffusers",
        "diffusers",
        (TextEncoder("text_encoder", "decoder", ("lora_te_", "lora_te1_"), "qwen25_7b"),),
        modules=_QWEN,
        marks=r"qwen-?_?image.*",
    ),
    Family(
        "wan",
        "Wan 2.x",
        "wan",
        "transformer",
        "wan",
        "wan",
        (TextEncoder("text_encoder", "t5", ("lora_te_", "lora_te1_"), "umt5xxl"),),
        marks=r"wan.*",
    ),
    Family(
        "hunyuan-video",
        "HunyuanVideo",
        "hunyuan_video",
        "transformer",
        "hunyuan",
        "hunyuan",
        (
            TextEncoder("text_encoder", "decoder", ("lora_te1_", "lora_te_"), "llama"),
            TextEncoder("text_encoder_2", "clip", ("lora_te2_",), "clip_l"),
        ),
        ratios=_FLUX_RATIOS,
        comfy_names=(
            ("txt_in.t_embedder.mlp.0", "txt_in.t_embedder.in_layer"),
            ("txt_in.t_embedder.mlp.2", "txt_in.t_embedder.out_layer"),
            ("txt_in.c_embedder.linear_1", "txt_in.c_embedder.in_layer"),
            ("txt_in.c_embedder.linear_2", "txt_in.c_embedder.out_layer"),
            ("_in.mlp.0", "_in.in_layer"),
            ("_in.mlp.2", "_in.out_layer"),
        ),
        comfy_also=(
            ("_mod.linear", "_mod.lin"),
            (".modulation.linear", ".modulation.lin"),
            ("_attn_qkv", "_attn.qkv"),
            ("_attn_proj", "_attn.proj"),
            ("mlp.fc1", "mlp.0"),
            ("mlp.fc2", "mlp.2"),
        ),
        marks=r"hunyuan.*|hv.*",
    ),
    Family(
        "ltx-video",
        "LTX-Video",
        "ltx_video",
        "transformer",
        "ltx",
        "ltx",
        (TextEncoder("text_encoder", "t5", ("lora_te_", "lora_te1_"), "t5xxl"),),
        marks=r"ltx.*",
    ),
    Family(
        "z-image",
        "Z-Image",
        "z_image",
        "transformer",
        "z-image",
        "z-image",
        (TextEncoder("text_encoder", "decoder", ("lora_te_", "lora_te1_"), "qwen3_4b"),),
        marks=r"z-?_?image.*",
    ),
    Family(
        "lumina2",
        "Lumina Image 2",
        "lumina2",
        "transformer",
        "lumina",
        "lumina",
        (TextEncoder("text_encoder", "decoder", ("lora_te_", "lora_te1_"), "gemma2_2b"),),
        marks=r"lumina.*",
    ),
)
"""Where several fit, and their results are the same, the first one counts."""


_OWN: ContextVar[Family | None] = ContextVar("_OWN", default=None)


@contextmanager
def only_image_family(family: Family | None) -> Iterator[None]:
    """Within it there is one family, which was made of a base's own modules; ``None`` changes nothing."""
    token = _OWN.set(family or _OWN.get())
    try:
        yield
    finally:
        _OWN.reset(token)


def image_families() -> tuple[Family, ...]:
    """The families that files may be for."""
    own = _OWN.get()
    return FAMILIES if own is None else (own,)


def family_named(name: str) -> Family | None:
    """A family by its name; ``-`` and ``_`` are the same.

    >>> family_named("qwen_image").title
    'Qwen-Image'
    """
    plain = name.lower().replace("_", "-")
    return next((f for f in image_families() if plain in (f.name, f.book.replace("_", "-"))), None)
