"""Tinker: PEFT's two files with names of its own, and experts with one 3-D tensor per projection. Read only.

Source: tinker-cookbook 0.6.1, ``weights/_adapter.py`` and ``weights/_merge*.py``; the writer is a service.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from regraft.adapters.form import Array
from regraft.dialects.base import Capabilities, Evidence
from regraft.dialects.peft.dialect import PeftFiles
from regraft.dialects.peft.source import Source, open_adapter
from regraft.dialects.stacked import expand_stacks, has_stacks
from regraft.dialects.tool_files import (
    PREFIX,
    ReadOnly,
    Renamed,
    ToolSource,
    look_at,
    tool_source,
)
from regraft.errors import Finding, RefusedError
from regraft.storage.json_files import folder_with_config, load_json

HEAD = ".unembed_tokens."
_ATTENTION = re.compile(r"(\.layers\.\d+)\.attn\.")
_PARTS = {"in_proj_q": ("in_proj_q", "in_proj_k", "in_proj_v")}
"""Projections that Tinker adapts one by one, and transformers has as one: the rows follow each other."""


def _base_config(source: Source) -> dict[str, Any]:
    base = folder_with_config(source.config.get("base_model_name_or_path"))
    return {} if base is None else load_json(base / "config.json")


def as_peft(source: Source) -> dict[str, Any]:
    """The tensors and config as PEFT has them. Raises ``BadInputError``, ``RefusedError``."""
    base = _base_config(source)
    named = str(source.config.get("base_model_name_or_path") or "").lower()
    oss = base.get("model_type") == "gpt_oss" or (
        not base
        and (
            "gpt-oss" in named or "gpt_oss" in named or any(map(_ATTENTION.search, source.tensors))
        )
    )
    tied = bool(base.get("tie_word_embeddings"))
    tensors = Renamed(source.where)
    for name, tensor in source.tensors.items():
        if HEAD in name:
            if tied:
                raise RefusedError(
                    Finding(
                        "no-image",
                        "the base's head is its embedding, and Tinker adapts it as the head; PEFT's LoRA on the "
                        "embedding would change what goes in as well",
                        where=source.where,
                        key=name,
                        fix="merge it with Tinker's own tools",
                    )
                )
            name = PREFIX + "lm_head." + name.partition(HEAD)[2]
        tensors[_ATTENTION.sub(r"\1.self_attn.", name)] = tensor
    config = dict(source.config)
    made = expand_stacks(
        _join_parts(tensors.checked(), source.where), config, interleaved=oss, where=source.where
    )
    entries = made["config"].get("target_modules")
    if isinstance(entries, list) and "unembed_tokens" in entries:
        made["config"]["target_modules"] = [
            "lm_head" if entry == "unembed_tokens" else entry for entry in entries
        ]
    if entries == "all-linear":
        # PEFT leaves the head out of it, and Tinker does not.
        leaves = {n.rsplit(".lora_", 1)[0].rpartition(".")[2] for n in made["tensors"]}
        made["config"]["target_modules"] = sorted(leaves - {"experts", "base_layer"})
    if oss and made["config"].get("target_parameters"):
        # The two ways in which PEFT packs the experts of this model are one.
        made["config"]["peft_version"] = "0.19.0"
    return made


def _join_parts(tensors: dict[str, Array], where: str) -> dict[str, Array]:
    """q, k and v of a linear attention as the one projection that transformers has."""
    made = Renamed(where)
    made.update(tensors)
    for name in tensors:
        if ".in_proj_q.lora_A.weight" not in name:
            continue
        stem = name.removesuffix("in_proj_q.lora_A.weight")
        pairs = []
        for part in _PARTS["in_proj_q"]:
            a, b = (
                made.pop(f"{stem}{part}.lora_A.weight", None),
                made.pop(f"{stem}{part}.lora_B.weight", None),
            )
            if a is None or b is None:
                raise RefusedError(
                    Finding(
                        "no-image",
                        f"{part} has no factors, and transformers has q, k and v of it as one",
                        where=where,
                        key=name,
                        fix="merge it with Tinker's own tools",
                    )
                )
            pairs.append((a, b))
        rank, rows = sum(len(a) for a, _ in pairs), sum(len(b) for _, b in pairs)
        joined = np.zeros((rows, rank), pairs[0][1].dtype)
        row = column = 0
        for a, b in pairs:
            joined[row : row + len(b), column : column + len(a)] = b
            row, column = row + len(b), column + len(a)
        made[f"{stem}in_proj_qkv.lora_A.weight"] = np.concatenate([a for a, _ in pairs])
        made[f"{stem}in_proj_qkv.lora_B.weight"] = joined
    return made.checked()


class Tinker(ReadOnly, PeftFiles):
    """Thinking Machines' Tinker."""

    name = "tinker"
    title = "Tinker: experts as w1, w2 and w3, the head as unembed_tokens (to read)"
    layout = "transformers-v4"
    capabilities = Capabilities()
    unwritten = ("Tinker", "only its service writes them", "convert it to vllm or transformers-v5")

    def sniff(self, src: Path) -> Evidence | None:
        """Keys that only Tinker, and servers that follow it, write."""
        look = look_at(src)
        if look is None or look.config is None:
            return None
        key = has_stacks(look.shapes) or next((n for n in look.shapes if HEAD in n), None)
        if key is None:
            return None
        return Evidence(certain=True, why=f"it has {key}")

    def open(self, folder: Path, root: Path, weights: Path | None) -> ToolSource:
        """One adapter."""
        source = open_adapter(folder, root, weights, foreign=True)
        return tool_source(source, self.name, **as_peft(source))


TINKER = Tinker()
