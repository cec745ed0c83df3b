"""What stands before a module's name: which component it is of, and whether the name is flat.

Sources: sd-scripts ``networks/lora*.py``, OneTrainer ``modules/model/*Model.py``, diffusers
``loaders/lora_pipeline.py``, ComfyUI ``comfy/lora.py:model_lora_keys_clip``, ai-toolkit ``toolkit/lora_special.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from regraft.dialects.image.families import DENOISER

FLAT = re.compile(r"lora_(?:unet__?|transformer_|prior_unet_|te[123]?_|prior_te_)|lycoris_")


@dataclass(frozen=True, slots=True)
class Place:
    """A file's name of a module in two: the component as the file says it, and the module."""

    prefix: str
    component: str
    """``denoiser``, a text encoder as diffusers calls it, or ``te:`` and what the file says."""
    module: str
    flat: bool


_DOTTED = (
    ("model.diffusion_model.", DENOISER),
    ("diffusion_model.", DENOISER),
    ("transformer_2.", "transformer_2"),
    ("transformer.", DENOISER),
    ("unet.", DENOISER),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder_3.", "text_encoder_3"),
    ("text_encoder.", "text_encoder"),
)
KNOWN_PREFIXES = (
    "lora_unet_, lora_te_, lora_te1_, lora_te2_, lora_te3_, lora_transformer_ and lycoris_ before names with "
    "underscores; diffusion_model., unet., transformer., text_encoder., text_encoder_2., text_encoder_3. and "
    "text_encoders.NAME.transformer. before names with dots"
)
"""For messages."""
_TOOLKIT = re.compile(r"(lora_te[123]?)\.(.+)")
"""ai-toolkit's text encoders beside a transformer, in PEFT's leaves."""
_COMFY = re.compile(r"text_encoders\.(\w+)\.transformer\.(.+)")


def place_of(stem: str) -> Place:
    """The component and the module of a name.

    >>> place_of("lora_te1_text_model_encoder_layers_0_mlp_fc1")
    Place(prefix='lora_te1_', component='te:lora_te1_', module='text_model_encoder_layers_0_mlp_fc1', flat=True)
    >>> place_of("base_model.model.double_blocks.0.img_attn.qkv").module
    'double_blocks.0.img_attn.qkv'
    """
    found = FLAT.match(stem)
    if found is not None:
        prefix = found[0]
        component = f"te:{prefix}" if "_te" in prefix else DENOISER
        return Place(prefix, component, stem[len(prefix) :], flat=True)
    wrapped = "base_model.model."
    if stem.startswith(wrapped):
        inner = place_of(stem.removeprefix(wrapped))
        return Place(wrapped + inner.prefix, inner.component, inner.module, inner.flat)
    comfy = _COMFY.fullmatch(stem)
    if comfy is not None:
        return Place(
            f"text_encoders.{comfy[1]}.transformer.", f"te:{comfy[1]}", comfy[2], flat=False
        )
    toolkit = _TOOLKIT.fullmatch(stem)
    if toolkit is not None:
        return Place(f"{toolkit[1]}.", f"te:{toolkit[1]}_", toolkit[2], flat=False)
    for prefix, component in _DOTTED:
        if stem.startswith(prefix):
            return Place(prefix, component, stem[len(prefix) :], flat=False)
    return Place("", DENOISER, stem, flat=False)
