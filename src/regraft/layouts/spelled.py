"""The names that ``to`` and ``source`` know without a rule book of the user's, for editors to complete.

The set is open, because rule books add layouts to it, so what takes a layout takes any text, too. A test compares the
names with those of the books and dialects.
"""

from __future__ import annotations

from typing import Literal

LayoutName = Literal[
    "transformers-v5",
    "transformers-v4",
    "ai-toolkit",
    "bfl",
    "comfyui",
    "diffusers",
    "gguf",
    "hunyuan",
    "kohya",
    "ldm",
    "litgpt",
    "ltx",
    "lumina",
    "megatron",
    "megatron-bridge",
    "mlx",
    "nemo",
    "onetrainer",
    "peft",
    "peft-image",
    "qwen-image",
    "sd3",
    "sglang",
    "skyrl",
    "tinker",
    "torchtune",
    "unsloth",
    "unsloth-grouped",
    "unsloth-linear",
    "vllm",
    "wan",
    "xlabs",
    "z-image",
]
