"""Adapters that other tools write in a form of their own, known by their marks.

PEFT reads such a file without a word, or drops what it does not know, so its deltas would be wrong. Until regraft
reads a form, it is refused by name.

Sources: unsloth_zoo 2026.10.9 (``temporary_patches/moe_utils.py``, ``hf_utils.py``), nemo-automodel 0.7.0
(``components/moe/state_dict_mixin.py``, ``components/_peft/lora_experts.py``), tinker-cookbook 0.6.1
(``weights/_adapter.py``), megatron-bridge 0.3.1 (``models/conversion/peft_bridge.py``), mlx-lm 0.32, torchtune 0.6.1,
litgpt 0.5.13.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.adapters.form import Array
from regraft.errors import Finding, RegraftError
from regraft.storage.json_files import load_json

NEMO_CONFIG = "automodel_peft_config.json"
"""A file that NeMo Automodel writes beside the adapter."""

_LAYOUT, _RECORD = "lora_B_layout", "unsloth_fused_expert_lora"
_LIKE_PEFT = "rank_major"
"""Unsloth's name for the order of columns that PEFT packs, too."""
_PACKED = re.compile(r"\.experts(?:\.base_layer)*\.lora_[AB]\.weight$")
_AGAIN = "export it with the tool that wrote it, in PEFT's format"

_KEYS: tuple[tuple[re.Pattern[str], int | None, str], ...] = (
    (
        re.compile(r"\.experts\.lora_(?:gate_and_up|down)_[AB]$"),
        None,
        "NeMo Automodel (grouped experts)",
    ),
    (re.compile(r"\.experts\.w[123]\.lora_[AB]\.weight$"), 3, "Tinker (experts as w1, w2, w3)"),
    (re.compile(r"\.unembed_tokens\.lora_[AB]\.weight$"), None, "Tinker (unembed_tokens)"),
    (
        re.compile(r"^decoder\.layers\..*\.adapter(?:_\w+)?\.linear_(?:in|out)\.weight$"),
        None,
        "Megatron-Bridge",
    ),
    (re.compile(r"^layers\.\d+\.(?:attn|mlp)\.\w+\.lora_[ab]\.weight$"), None, "torchtune"),
    (
        re.compile(r"^layers\.\d+\.(?:attention|feed_forward)\.\w+\.lora_[ab]\.weight$"),
        None,
        "torchtitan",
    ),
    (re.compile(r"^transformer\.h\.\d+\..*\.lora_[AB]$"), None, "LitGPT"),
    (re.compile(r"\.lora_[ab]$"), None, "MLX"),
)
"""Keys that only one tool writes, with the number of dims where it matters."""


def find_dialect(
    config: Mapping[str, Any], names: Sequence[str], tensors: Mapping[str, Array], folder: Path
) -> Finding | None:
    """What says that an adapter is in another tool's form, and in whose; ``None`` where nothing does.

    ``names`` has one of each kind.
    """
    packed = any(map(_PACKED.search, names))
    found = _unsloth(config) or _nemo(config, folder) if packed else None
    if found is None:
        found = _by_keys(names, tensors)
    if found is None:
        return None
    tool, key, mark = found
    return Finding(
        "dialect",
        f"this adapter is in the form of {tool}, which PEFT does not read: {mark}",
        where=str(folder),
        key=key,
        fix=_AGAIN,
    )


_Mark = tuple[str, str, str]
"""The tool, the key that tells it, and what it says."""


def _unsloth(config: Mapping[str, Any]) -> _Mark | None:
    """Packed factors whose B has the columns of one expert side by side.

    The record stands at the top or in ``auto_mapping``; in each, the one by parameter outranks the single word.
    """
    mapping = config.get("auto_mapping")
    mapping = mapping if isinstance(mapping, Mapping) else {}
    for place, fields in (("", config), ("auto_mapping.", mapping)):
        for name, layouts in (
            (_RECORD, list(_recorded(fields.get(_RECORD)))),
            (_LAYOUT, [fields[_LAYOUT]] if fields.get(_LAYOUT) is not None else []),
        ):
            odd = next((layout for layout in layouts if layout != _LIKE_PEFT), None)
            if odd is not None:
                return _named_unsloth(place + name, f"the columns of lora_B are said to be {odd!r}")
            if layouts:
                return None
    if mapping.get("unsloth_fixed") is True and config.get("target_parameters"):
        return _named_unsloth(
            "auto_mapping.unsloth_fixed", "it packed lora_B by expert before it recorded it"
        )
    return None


def says_grouped(config: Mapping[str, Any]) -> bool:
    """Whether a config says that Unsloth packed lora_B by expert."""
    return _unsloth(config) is not None


def _named_unsloth(key: str, mark: str) -> _Mark:
    return "Unsloth (packed experts)", key, mark


def _recorded(record: Any) -> Iterator[Any]:
    """The layouts that Unsloth's record names."""
    if record is None:
        return
    if not isinstance(record, Mapping):
        yield record
        return
    parameters = record.get("parameters")
    if isinstance(parameters, Mapping) and parameters:
        for entry in parameters.values():
            yield entry.get(_LAYOUT) if isinstance(entry, Mapping) else entry
    else:
        yield record.get(_LAYOUT)


def _nemo(config: Mapping[str, Any], folder: Path) -> _Mark | None:
    """Packed factors whose in and out were laid down by NeMo's own stamp, or whose rank is no number of the config."""
    fields: Mapping[str, Any] = {}
    if (folder / NEMO_CONFIG).is_file():
        try:
            fields = load_json(folder / NEMO_CONFIG)
        except RegraftError as error:
            return "NeMo Automodel (packed experts)", NEMO_CONFIG, error.findings[0].message
    for place, found in (("", config), (f"{NEMO_CONFIG}: ", fields)):
        for name in ("paramwrapper_layout", "moe_rank_scaling"):
            if found.get(name):
                said = f"{name} is {found[name]!r}"
                return "NeMo Automodel (packed experts)", place + name, said
    return None


def _by_keys(names: Sequence[str], tensors: Mapping[str, Array]) -> _Mark | None:
    for name in names:
        for pattern, dims, tool in _KEYS:
            if pattern.search(name) and (dims is None or tensors[name].ndim == dims):
                return tool, name, "only it names tensors so"
    return None
