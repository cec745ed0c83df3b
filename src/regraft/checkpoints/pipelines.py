"""The pipelines of image and video models: which parts they have, and where a single file and a folder keep them.

    single file    model.diffusion_model.…, first_stage_model.…, conditioner.embedders.0.transformer.…
    folder         model_index.json, unet/, vae/, text_encoder/, each with its config.json

How a part's tensors are named and shaped in either, its rule book says.

Sources: diffusers 0.42.1 (``loaders/single_file_utils.py``; the ``model_index.json`` that its pipelines write), ComfyUI
(``comfy/supported_models.py``: prefixes of what it saves as one file).
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from regraft.rules.book import Book

DIFFUSERS = "diffusers"
DENOISER = "model.diffusion_model."
"""What stands before a denoiser's names in a single file."""


class Part(Struct, frozen=True):
    """One model of a pipeline."""

    name: str
    """Its folder."""
    library: str
    cls: str
    """Its class."""
    prefixes: tuple[str, ...]
    """What stands before its names in a single file; the first one is written."""
    book: str = ""
    """The name of its rule book; none where its names are the same in both."""
    unused: tuple[tuple[str, str], ...] = ()
    """Patterns of what the single file has and the folder has not, and why."""

    root: str = ""
    """What all its names begin with, and what transformers 5 leaves out where it saves them."""
    older: tuple[tuple[str, str], ...] = ()
    """What names of older releases have in them, and what stands there since."""
    others: tuple[str, ...] = ()
    """Names of rule books of its other versions; an empty one where a single file may have the folder's names, too."""

    @property
    def stem(self) -> str:
        """What its weights file is called."""
        return "diffusion_pytorch_model" if self.library == DIFFUSERS else "model"


class Pipeline(Struct, frozen=True):
    """A family of pipelines with the same parts."""

    name: str
    """As in ``--from``: the model type of its denoiser's book."""
    title: str
    cls: str
    native: str
    """The layout of its single file."""
    parts: tuple[Part, ...]
    """The denoiser first."""
    helpers: tuple[tuple[str, str, str], ...] = ()
    """What has no weights: folder, library and class."""


_TRANSFORMERS = "transformers"
_CLIP, _CLIP_PROJECTED, _T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
_TOKENIZER, _TOKENIZER_2 = (
    ("tokenizer", _TRANSFORMERS, "CLIPTokenizer"),
    ("tokenizer_2", _TRANSFORMERS, "CLIPTokenizer"),
)
_FLOW = ("scheduler", DIFFUSERS, "FlowMatchEulerDiscreteScheduler")
_EULER = ("scheduler", DIFFUSERS, "EulerDiscreteScheduler")


_LDM_VAE, _COMFY_VAE = "first_stage_model.", "vae."

_ATTENTION = tuple(
    (f".attentions.0.{old}.", f".attentions.0.{new}.")
    for old, new in (
        ("query", "to_q"),
        ("key", "to_k"),
        ("value", "to_v"),
        ("proj_attn", "to_out.0"),
    )
)
"""Names of a VAE's attention up to diffusers 0.16 (``models/modeling_utils.py``: deprecated attention blocks)."""


def _unet(book: str) -> Part:
    return Part("unet", DIFFUSERS, "UNet2DConditionModel", (DENOISER,), book)


def _transformer(cls: str, book: str) -> Part:
    return Part("transformer", DIFFUSERS, cls, (DENOISER,), book)


def _vae_of(cls: str, book: str, *others: str) -> Part:
    """The VAE of a video model, or of a newer image model."""
    prefixes = _COMFY_VAE, _LDM_VAE
    return Part("vae", DIFFUSERS, cls, prefixes, book, others=others)


def _vae(*prefixes: str) -> Part:
    return Part("vae", DIFFUSERS, "AutoencoderKL", prefixes, "autoencoder_kl", older=_ATTENTION)


def _encoder(name: str, cls: str, *prefixes: str) -> Part:
    return Part(name, _TRANSFORMERS, cls, prefixes, root="text_model." if cls == _CLIP else "")


_LAST = "Stable Diffusion 2 does not use the last layer"

PIPELINES: tuple[Pipeline, ...] = (
    Pipeline(
        "sd15",
        "Stable Diffusion 1",
        "StableDiffusionPipeline",
        "ldm",
        (
            _unet("sd15"),
            _vae(_LDM_VAE),
            _encoder("text_encoder", _CLIP, "cond_stage_model.transformer."),
        ),
        (_TOKENIZER, ("scheduler", DIFFUSERS, "PNDMScheduler")),
    ),
    Pipeline(
        "sd2",
        "Stable Diffusion 2",
        "StableDiffusionPipeline",
        "ldm",
        (
            _unet("sd2"),
            _vae(_LDM_VAE),
            Part(
                "text_encoder",
                _TRANSFORMERS,
                _CLIP,
                ("cond_stage_model.model.",),
                "open_clip_sd2",
                (("transformer.resblocks.23.*", _LAST),),
                "text_model.",
            ),
        ),
        (_TOKENIZER, ("scheduler", DIFFUSERS, "DDIMScheduler")),
    ),
    Pipeline(
        "sdxl",
        "Stable Diffusion XL",
        "StableDiffusionXLPipeline",
        "ldm",
        (
            _unet("sdxl"),
            _vae(_LDM_VAE),
            _encoder("text_encoder", _CLIP, "conditioner.embedders.0.transformer."),
            Part(
                "text_encoder_2",
                _TRANSFORMERS,
                _CLIP_PROJECTED,
                ("conditioner.embedders.1.model.",),
                "open_clip",
            ),
        ),
        (_TOKENIZER, _TOKENIZER_2, _EULER),
    ),
    Pipeline(
        "sdxl_refiner",
        "Stable Diffusion XL's refiner",
        "StableDiffusionXLImg2ImgPipeline",
        "ldm",
        (
            _unet("sdxl_refiner"),
            _vae(_LDM_VAE),
            Part(
                "text_encoder_2",
                _TRANSFORMERS,
                _CLIP_PROJECTED,
                ("conditioner.embedders.0.model.",),
                "open_clip",
            ),
        ),
        (_TOKENIZER_2, _EULER),
    ),
    Pipeline(
        "sd3",
        "Stable Diffusion 3",
        "StableDiffusion3Pipeline",
        "sd3",
        (
            _transformer("SD3Transformer2DModel", "sd3"),
            _vae(_LDM_VAE, _COMFY_VAE),
            _encoder("text_encoder", _CLIP_PROJECTED, "text_encoders.clip_l.transformer."),
            _encoder("text_encoder_2", _CLIP_PROJECTED, "text_encoders.clip_g.transformer."),
            _encoder("text_encoder_3", _T5, "text_encoders.t5xxl.transformer."),
        ),
        (
            _TOKENIZER,
            _TOKENIZER_2,
            ("tokenizer_3", _TRANSFORMERS, "T5TokenizerFast"),
            _FLOW,
        ),
    ),
    Pipeline(
        "flux",
        "FLUX.1",
        "FluxPipeline",
        "bfl",
        (
            _transformer("FluxTransformer2DModel", "flux"),
            _vae(_COMFY_VAE, _LDM_VAE),
            _encoder("text_encoder", _CLIP, "text_encoders.clip_l.transformer."),
            _encoder("text_encoder_2", _T5, "text_encoders.t5xxl.transformer."),
        ),
        (_TOKENIZER, ("tokenizer_2", _TRANSFORMERS, "T5TokenizerFast"), _FLOW),
    ),
    Pipeline(
        "chroma",
        "Chroma",
        "ChromaPipeline",
        "bfl",
        (
            _transformer("ChromaTransformer2DModel", "chroma"),
            _vae(_COMFY_VAE, _LDM_VAE),
            _encoder("text_encoder", _T5, "text_encoders.t5xxl.transformer."),
        ),
        (("tokenizer", _TRANSFORMERS, "T5TokenizerFast"), _FLOW),
    ),
    Pipeline(
        "wan",
        "Wan",
        "WanPipeline",
        "wan",
        (
            _transformer("WanTransformer3DModel", "wan"),
            _vae_of("AutoencoderKLWan", "wan_vae", "wan22_vae"),
            _encoder("text_encoder", "UMT5EncoderModel", "text_encoders.umt5xxl.transformer."),
        ),
        (
            ("tokenizer", _TRANSFORMERS, "T5TokenizerFast"),
            ("scheduler", DIFFUSERS, "UniPCMultistepScheduler"),
        ),
    ),
    Pipeline(
        "z-image",
        "Z-Image",
        "ZImagePipeline",
        "z-image",
        (
            _transformer("ZImageTransformer2DModel", "z_image"),
            _vae(_COMFY_VAE, _LDM_VAE),
            _encoder("text_encoder", "Qwen3Model", "text_encoders.qwen3_4b.transformer."),
        ),
        (("tokenizer", _TRANSFORMERS, "Qwen2Tokenizer"), _FLOW),
    ),
    Pipeline(
        "lumina2",
        "Lumina-Image 2",
        "Lumina2Pipeline",
        "lumina",
        (
            _transformer("Lumina2Transformer2DModel", "lumina2"),
            _vae(_COMFY_VAE, _LDM_VAE),
            _encoder("text_encoder", "Gemma2Model", "text_encoders.gemma2_2b.transformer.model."),
        ),
        (("tokenizer", _TRANSFORMERS, "GemmaTokenizer"), _FLOW),
    ),
    Pipeline(
        "flux2",
        "FLUX.2",
        "Flux2Pipeline",
        "bfl",
        (
            _transformer("Flux2Transformer2DModel", "flux2"),
            _vae_of("AutoencoderKLFlux2", "flux2_vae"),
            Part(
                "text_encoder",
                _TRANSFORMERS,
                "Mistral3ForConditionalGeneration",
                ("text_encoders.mistral3_24b.transformer.model.",),
                "mistral3_text",
                older=(("model.language_model.", "language_model.model."),),
            ),
        ),
        (("tokenizer", _TRANSFORMERS, "PixtralProcessor"), _FLOW),
    ),
    Pipeline(
        "qwen-image",
        "Qwen-Image",
        "QwenImagePipeline",
        "qwen-image",
        (
            _transformer("QwenImageTransformer2DModel", "qwen_image"),
            _vae_of("AutoencoderKLQwenImage", "wan_vae"),
            Part(
                "text_encoder",
                _TRANSFORMERS,
                "Qwen2_5_VLForConditionalGeneration",
                ("text_encoders.qwen25_7b.transformer.",),
                older=(("model.language_model.", "model."), ("model.visual.", "visual.")),
            ),
        ),
        (("tokenizer", _TRANSFORMERS, "Qwen2Tokenizer"), _FLOW),
    ),
    Pipeline(
        "hunyuan-video",
        "HunyuanVideo",
        "HunyuanVideoPipeline",
        "hunyuan",
        (
            _transformer("HunyuanVideoTransformer3DModel", "hunyuan_video"),
            _vae_of("AutoencoderKLHunyuanVideo", "hunyuan_video_vae", ""),
            _encoder("text_encoder", "LlamaModel", "text_encoders.llama.transformer.model."),
            _encoder("text_encoder_2", _CLIP, "text_encoders.clip_l.transformer."),
        ),
        (
            ("tokenizer", _TRANSFORMERS, "LlamaTokenizerFast"),
            ("tokenizer_2", _TRANSFORMERS, "CLIPTokenizer"),
            _FLOW,
        ),
    ),
    Pipeline(
        "ltx-video",
        "LTX-Video",
        "LTXPipeline",
        "ltx",
        (
            _transformer("LTXVideoTransformer3DModel", "ltx_video"),
            _vae_of("AutoencoderKLLTXVideo", "ltx_vae_095", "ltx_vae_091", "ltx_vae"),
            _encoder("text_encoder", _T5, "text_encoders.t5xxl.transformer."),
        ),
        (("tokenizer", _TRANSFORMERS, "T5TokenizerFast"), _FLOW),
    ),
)


def part_by_book(books: Sequence[Book]) -> Part | None:
    """The part that a rule book is for; ``None`` for other books."""
    names = {book.name for book in books}
    return next((x for p in PIPELINES for x in p.parts if names & {x.book, *x.others} - {""}), None)


EXTRAS: tuple[tuple[str, str], ...] = (
    ("model_ema.*", "the moving average of the weights is for training"),
    ("betas", "the scheduler computes it"),
    ("alphas_cumprod*", "the scheduler computes it"),
    ("sqrt_*", "the scheduler computes it"),
    ("log_one_minus_alphas_cumprod", "the scheduler computes it"),
    ("posterior_*", "the scheduler computes it"),
    ("denoiser.*", "the scheduler computes it"),
    ("cond_stage_model.logit_scale", "it is for training only"),
    (
        "text_encoders.*.transformer.lm_head.weight",
        "the pipeline takes what comes before the output",
    ),
    ("text_encoders.*spiece_model", "it is a tokenizer's, and no weight"),
    ("text_encoders.*.scaled_fp8", "it is empty: a mark of how the file was written"),
)
"""Patterns of what single files hold besides their parts, and why a folder has no use for it."""

PREFIXES = tuple(
    sorted(
        {prefix for pipeline in PIPELINES for part in pipeline.parts for prefix in part.prefixes},
        key=len,
        reverse=True,
    )
)
"""Every prefix of a part, the longest first."""
