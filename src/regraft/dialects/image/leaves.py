"""How tools spell a module's tensors: what follows the module's name in a key, and what it means.

Files mix spellings, so every key is read by itself. Sources: sd-scripts (``networks/lora*.py``), lycoris-lora 4.1.3
(``lycoris/modules``), diffusers 0.42.1 (``utils/state_dict_utils.py``), OneTrainer (``modules/module/LoRAModule.py``),
ai-toolkit (``toolkit/network_mixins.py``), BFL's flux (``modules/lora.py``), x-flux.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_A, _B = "down", "up"

_ADAPTER = r"(?:\.(?!weight|bias)\w+)?"
"""PEFT's name of the adapter, where a whole state dict was saved (``lora_A.default.weight``)."""

_SUFFIXES: tuple[tuple[str, str, str], ...] = (
    (rf"\.lora_A{_ADAPTER}\.weight", "down", "lora_A"),
    (rf"\.lora_B{_ADAPTER}\.weight", "up", "lora_A"),
    (rf"\.lora_B{_ADAPTER}\.bias", "up_bias", "lora_A"),
    (r"\.lora_down\.weight", "down", "lora_down"),
    (r"\.lora_up\.weight", "up", "lora_down"),
    (r"\.lora_up\.bias", "up_bias", "lora_down"),
    (r"\.lora_mid\.weight", "mid", "lora_down"),
    (r"\.lora(?:_linear_layer)?\.down\.weight", "down", "lora.down"),
    (r"\.lora(?:_linear_layer)?\.up\.weight", "up", "lora.down"),
    (r"\.lora_magnitude_vector(?:\.\w+)?(?:\.weight)?", "magnitude", "lora_A"),
    (r"\.dora_scale", "dora_scale", "lora_down"),
    (r"\.magnitude", "magnitude", "lora_A"),
    (r"\.alpha", "alpha", ""),
    (r"\.(hada_(?:w[12]_[ab]|t[12]))", "", "lycoris"),
    (r"\.(lokr_(?:w[12](?:_[ab])?|t2))", "", "lycoris"),
    (r"\.(oft_blocks)", "", "lycoris"),
    (r"\.(rescale)", "", "lycoris"),
    (r"\.oft_R\.weight", "oft_R", "onetrainer"),
    (r"\.oft_R\.(scaled_oft)", "", "onetrainer"),
    (r"\.(initial_norm)", "", "onetrainer"),
    (r"\.([ab][12])\.weight", "", "lycoris"),
    (r"\.(on_input)", "", "lycoris"),
    (r"\.diff", "diff", "lycoris"),
    (r"\.diff_b", "diff_b", "lycoris"),
    (r"\.w_norm", "diff", "lycoris"),
    (r"\.b_norm", "diff_b", "lycoris"),
    (r"\.set_weight", "set", "bfl"),
    (r"\.reshape_weight", "reshape", "bfl"),
    (r"(?<=_norm)\.scale", "set.scale", "bfl"),
    (r"\.weight", "ia3", "lycoris"),
)
"""A pattern, the role of the tensor (the pattern's group where it is empty), and the spelling that it belongs to."""

_MOST_SEGMENTS = max(pattern.count(r"\.") for pattern, _, _ in _SUFFIXES)
"""Segments of a key that a pattern may speak of."""

_LEAF = re.compile(
    "(?P<stem>.*?)(?:" + "|".join(f"(?P<l{n}>{p})" for n, (p, _, _) in enumerate(_SUFFIXES)) + ")"
)

_PROCESSORS = re.compile(
    r"(?P<stem>.*?\.)(?:processor\.)?(?:to|add)_(?P<which>q|k|v|out|[kqv]_proj)_lora\.(?P<side>down|up)\.weight"
)
_XLABS = re.compile(
    r"(?P<stem>.*?)(?P<block>(?:double|single)_blocks\.\d+)\.processor\.(?P<which>qkv|proj)_lora(?P<stream>[12]?)"
    r"\.(?P<side>down|up)\.weight"
)
_NO_WEIGHTS = re.compile(r"bundle_emb\..*|emb_params|(?:.*\.)?_aux(?:\..*)?")
"""Embeddings and bookkeeping that trainers store beside their weights."""

UNREAD = {
    "lambda_layer": "T-LoRA",
    "q_layer": "T-LoRA",
    "p_layer": "T-LoRA",
    "vera_lambda": "VeRA",
    "boft_R": "PEFT's BOFT",
    "diff_m": "a delta of a modulation parameter",
}
"""Segments of keys that tell an adapter which no reader here knows."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A key in two: the module as the file names it, and what the tensor is to it."""

    stem: str
    role: str
    spelling: str


_USUAL = {
    "lora_A.weight": ("down", "lora_A"),
    "lora_B.weight": ("up", "lora_A"),
    "lora_down.weight": ("down", "lora_down"),
    "lora_up.weight": ("up", "lora_down"),
}
"""What most keys of most files end in; the patterns say the same, and take longer."""


def _usual(key: str) -> Leaf | None:
    last = key.rfind(".")
    if key[last + 1 :] == "alpha":
        return Leaf(key[:last], "alpha", "")
    first = key.rfind(".", 0, last)
    found = _USUAL.get(key[first + 1 :]) if first > 0 else None
    return None if found is None else Leaf(key[:first], *found)


def split_key(key: str) -> Leaf | None:
    """The module and the role of a key; ``None`` where no tool is known to write it.

    >>> split_key("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight")
    Leaf(stem='lora_unet_mid_block_attentions_0_proj_in', role='up', spelling='lora_down')
    >>> split_key("unet.mid_block.attn1.processor.to_out_lora.down.weight").stem
    'unet.mid_block.attn1.to_out.0'
    >>> split_key("double_blocks.3.processor.qkv_lora2.up.weight")
    Leaf(stem='double_blocks.3.txt_attn.qkv', role='up', spelling='xlabs')
    """
    usual = _usual(key)
    if usual is not None:
        return usual
    found = _XLABS.fullmatch(key) if "_lora" in key else None
    if found is not None:
        return Leaf(found["stem"] + _xlabs_module(found), _side(found["side"]), "xlabs")
    found = _PROCESSORS.fullmatch(key) if "_lora." in key else None
    if found is not None:
        return Leaf(found["stem"] + _processor_module(found), _side(found["side"]), "processor")
    last = _start_of_last(key, _MOST_SEGMENTS)
    found = _LEAF.fullmatch(key, last)
    if found is None:
        return None
    number = next(n for n in range(len(_SUFFIXES)) if found[f"l{n}"] is not None)
    pattern, role, spelling = _SUFFIXES[number]
    if not role:
        inner = re.fullmatch(pattern, found[f"l{number}"])
        assert inner is not None
        role = inner[1]
    return Leaf(key[:last] + found["stem"], role, spelling)


def _start_of_last(key: str, segments: int) -> int:
    """Where the last segments of a key begin, with the dot before them."""
    at = len(key)
    for _ in range(segments):
        at = key.rfind(".", 0, at)
        if at < 0:
            return 0
    return at


def has_no_weights(key: str) -> bool:
    """Whether a key is of something beside the weights of the model: an embedding, or a trainer's bookkeeping.

    >>> has_no_weights("bundle_emb.cat.string_to_param.*"), has_no_weights("lora_unet_x.alpha")
    (True, False)
    """
    return _NO_WEIGHTS.fullmatch(key) is not None


def unread_kind(key: str) -> str | None:
    """The kind of adapter that a key is of, where it is one that cannot be read."""
    parts = key.split(".")
    if "oft_R" in parts and parts[0] == "base_model":
        return "PEFT's OFT"
    return next((kind for part, kind in UNREAD.items() if part in parts), None)


def _side(word: str) -> str:
    return _A if word == "down" else _B


def _xlabs_module(found: re.Match[str]) -> str:
    block, which = found["block"], found["which"]
    if block.startswith("single"):
        return f"{block}.{'linear1' if which == 'qkv' else 'linear2'}"
    return f"{block}.{'txt' if found['stream'] == '2' else 'img'}_attn.{which}"


def _processor_module(found: re.Match[str]) -> str:
    """The module that an attention processor's LoRA is for; in a text encoder, whose attention has other names."""
    which = found["which"]
    if ".self_attn." in found["stem"]:
        return {"out": "out_proj"}.get(which, f"{which}_proj")
    if which.endswith("_proj"):
        return f"add_{which}"
    return "to_out.0" if which == "out" else f"to_{which}"
