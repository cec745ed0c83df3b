"""Which method quantised a checkpoint, what its tensors are called, and what a loader makes of its experts.

A quantised weight is several tensors. Some methods keep the weight beside its scales, under its own name
(``X.weight``, ``X.weight_scale_inv``); others keep packed state only (``X.qweight``, ``X.scales``), and nothing is
called ``X.weight``.

Source: the quantizers and the load operations of transformers 5.23 (``quantizers/``, ``integrations/``,
``HfQuantizer.update_weight_conversions``), run on the CPU and on meta models; what GPTQModel, AutoAWQ, bitsandbytes,
compressed-tensors, HQQ, torchao, quanto, EETQ, AQLM and ModelOpt save.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from msgspec import Struct

from regraft.checkpoints.config import V5

USUAL_BLOCK = 128
"""The rows, and the columns, that share a scale of FP8 where nothing else is told."""
MODULE = "@"
"""What the suffix of a companion begins with that is named after its module, not after its weight."""

BESIDE = (
    "weight_scale_inv",
    "weight_scale",
    "weight_scale_2",
    "weight_scales",
    "weight_zero_point",
    "weight_global_scale",
    "weight_format",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "activation_scale",
    "output_scale",
    "input_scale_ub",
    "qscale_weight",
    "qscale_act",
    "scale",
    "SCB",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
)
"""Tensors of a module that belong to its ``weight``, which stands beside them."""

PACKED = {
    "qweight": "gptq",
    "weight_packed": "compressed-tensors",
    "W_q": "hqq",
    "_weight_qdata": "torchao",
    "weight._data": "quanto",
    "codes": "aqlm",
    "q_weight": "exl2",
}
"""A tensor that stands for a module's ``weight``, which is not there, and the method that writes it. All other
tensors of the module but its bias belong to it, too."""

STACKED = ("_blocks", "_scales")
"""MXFP4 keeps the weight ``X`` as ``X_blocks`` and ``X_scales``."""

BITSANDBYTES = tuple(name.removeprefix("weight") for name in BESIDE if "weight." in name)
SINGLES = ("_scale_2", "@input_scale", "@activation_scale", "@output_scale")
"""What is one number for the whole weight."""
ONLY_QUANTISED = ("@scale", "_scale", "_scales", "_format", "_g_idx", "_zero_point")
"""Suffixes that ordinary tensors have as well: they are companions of 8-bit weights only."""

_TITLES = {
    "fp8": "FP8",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "mxfp4": "MXFP4",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "aqlm": "AQLM",
    "exl2": "EXL2",
    "nvfp4": "NVFP4",
    "fbgemm_fp8": "FBGEMM FP8",
}
_COLLECTED_FORMATS = ("float-quantized", "pack-quantized")
"""Formats of compressed-tensors whose experts transformers 5.23 reads one by one."""


class Quantization(Struct, frozen=True):
    """A method, as far as a conversion must know it.

    >>> read_quantization({"quantization_config": {"quant_method": "awq"}}, {"@qweight"}).title
    'AWQ'
    """

    method: str
    """As in ``quant_method`` of ``config.json``, such as ``gptq``."""
    title: str
    """For messages."""
    evidence: str
    """What says so."""
    obstacle: str | None = None
    """Why transformers 5 does not read its experts one by one; ``None`` where it does."""

    @property
    def is_in_config(self) -> bool:
        """Whether ``config.json`` names the method, so that a loader knows of it."""
        return self.evidence.startswith("config.json")

    def collects_experts(self, layout: str) -> bool:
        """Whether the loader of a layout takes experts one by one with their scales, and stacks them itself."""
        return layout == V5 and self.obstacle is None


def suffix_of(leaf: str) -> str:
    """The suffix that a companion adds to its weight; names of the module itself are marked.

    >>> suffix_of("weight_scale_inv"), suffix_of("weight.absmax"), suffix_of("input_scale")
    ('_scale_inv', '.absmax', '@input_scale')
    """
    return leaf.removeprefix("weight") if leaf.startswith("weight") else MODULE + leaf


def name_of(base: str, suffix: str) -> str:
    """The name of a weight's companion.

    >>> name_of("a.weight", "_scale_inv"), name_of("a.weight", "@input_scale"), name_of("a.up", "@input_scale")
    ('a.weight_scale_inv', 'a.input_scale', 'a.up_input_scale')
    """
    if not suffix.startswith(MODULE):
        return base + suffix
    leaf = suffix.removeprefix(MODULE)
    if base.endswith(".weight"):
        return base.removesuffix("weight") + leaf
    return f"{base}_{leaf}"


def read_quantization(
    config: Mapping[str, Any] | None,
    suffixes: Collection[str],
    algorithm: str | None = None,
    *,
    packed_like_awq: bool = False,
) -> Quantization | None:
    """The method, from a model's config or, where that says nothing, from its tensors; ``None`` where there is none.

    ``suffixes`` are those that the checkpoint's companions have, ``algorithm`` is what ModelOpt's
    ``hf_quant_config.json`` names.
    """
    data = _config_of(config or {})
    method = str(data.get("quant_method", "")).lower() if data else ""
    if data and not method and (data.get("load_in_4bit") or data.get("load_in_8bit")):
        method = "bitsandbytes"
    if method and suffixes:
        return _described(method, f"config.json says quant_method {method}", data, suffixes)
    if algorithm is not None and suffixes:
        told = f"hf_quant_config.json says {algorithm}"
        return _described("modelopt", told, {"quant_algo": algorithm}, suffixes)
    for method, mark in _marks(suffixes, packed_like_awq=packed_like_awq):
        leaf = name_of("weight", mark).removeprefix("weight_") if mark[0] == MODULE else mark
        return _described(method, f"its tensors are named ...{leaf}", {}, suffixes)
    return None


def title_of_part(name: str) -> str | None:
    """The method that a tensor's name tells, where the tensor is a part of a quantised weight and no weight itself.

    >>> title_of_part("a.q_proj.weight_scale_inv"), title_of_part("a.q_proj.qweight"), title_of_part("a.q_proj.weight")
    ('FP8', 'GPTQ or AWQ', None)
    """
    ends = sorted((*BESIDE, *PACKED), key=len, reverse=True)
    leaf = next((end for end in ends if name.endswith("." + end)), None)
    if leaf == "qweight":
        return "GPTQ or AWQ"
    if leaf in (None, "scale", "codes"):  # other tensors are called so, too
        return "MXFP4" if name.endswith(STACKED) else None
    told = read_quantization(None, {suffix_of(leaf)})
    return told.title if told is not None else None


def _config_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that speaks of quantisation: the model's, or that of its language model."""
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, Mapping) else {}):
        for field in ("quantization_config", "compression_config"):
            found = holder.get(field)
            if isinstance(found, Mapping):
                return found
    return {}


def is_fp8(config: Mapping[str, Any] | None) -> bool:
    """Whether a config names the method of FP8 in blocks, whose loader takes bytes for two numbers of 4 bits each."""
    return str(_config_of(config or {}).get("quant_method", "")).lower() == "fp8"


def block_size(config: Mapping[str, Any] | None) -> tuple[int, ...]:
    """The blocks that share a scale, as the config gives them: (rows, columns); () where it does not.

    What transformers takes for FP8 where ``weight_block_size`` is not there counts as given (``FineGrainedFP8Config``).

    >>> block_size({"quantization_config": {"quant_method": "fp8"}})
    (128, 128)
    >>> weights = {"strategy": "block", "block_structure": [64, 32]}
    >>> block_size({"quantization_config": {"config_groups": {"group_0": {"weights": weights}}}})
    (64, 32)
    """
    data = _config_of(config or {})
    found = [data.get("weight_block_size", [USUAL_BLOCK] * 2 if is_fp8(config) else None)]
    weights = (group.get("weights") for group in _groups(data))
    found += [w.get("block_structure") for w in weights if isinstance(w, Mapping)]
    told = {
        tuple(block)
        for block in found
        if isinstance(block, list) and all(type(n) is int and n > 0 for n in block)
    }
    return told.pop() if len(told) == 1 else ()


def block_step(size: int, cells: int, told: int | None) -> int | None:
    """How many of ``size`` elements share each of ``cells`` scales; ``told`` is the size of a block in the config.

    ``None`` where they do not fit, and where blocks of two sizes fit and nothing tells which is meant.

    >>> block_step(300, 3, 128), block_step(300, 3, 100), block_step(256, 2, None), block_step(320, 3, None)
    (128, 100, 128, 128)
    >>> block_step(96, 3, 128), block_step(300, 3, None), block_step(300, 7, None)
    (32, None, None)
    """
    if cells == size:
        return 1
    if told is not None and -(-size // told) == cells:
        return told
    if cells == 1:
        return max(size, 1)
    even = size // cells if cells and size % cells == 0 else None
    usual = USUAL_BLOCK if -(-size // USUAL_BLOCK) == cells else None
    if told is None and usual is not None:
        return usual if even in (None, usual) else None
    return even


def bits_of(config: Mapping[str, Any] | None) -> int | None:
    """The bits of a packed number, as the config gives them."""
    data = _config_of(config or {})
    found = data.get("bits", data.get("w_bit"))
    if found is None:
        weights = [g.get("weights") for g in _groups(data)]
        sizes = {w.get("num_bits") for w in weights if isinstance(w, Mapping)}
        found = next(iter(sizes)) if len(sizes) == 1 else None
    return found if type(found) is int and 0 < found <= 32 else None


def _groups(data: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    groups = data.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping):
            yield group


def _marks(suffixes: Collection[str], *, packed_like_awq: bool) -> Iterator[tuple[str, str]]:
    """What tensors tell of their method, the surest first: methods, and the suffix that tells."""
    table = (
        ("awq" if packed_like_awq else "gptq", "@qweight"),
        ("compressed-tensors", "_packed"),
        ("bitsandbytes", ".absmax"),
        ("bitsandbytes", "@SCB"),
        ("mxfp4", "_blocks"),
        ("hqq", "@W_q"),
        ("torchao", "@_weight_qdata"),
        ("quanto", "._data"),
        ("aqlm", "@codes"),
        ("exl2", "@q_weight"),
        ("nvfp4", "_scale_2"),
        ("fp8", "_scale_inv"),
        ("eetq", "_scales"),
        ("8 bits", "_scale"),
        ("8 bits", "@scale"),
    )
    return ((method, mark) for method, mark in table if mark in suffixes)


def _described(
    method: str, evidence: str, data: Mapping[str, Any], suffixes: Collection[str]
) -> Quantization:
    describe = {
        "fp8": _fp8,
        "compressed-tensors": _compressed_tensors,
        "modelopt": _modelopt,
        "bitsandbytes": _bitsandbytes,
        "8 bits": _unnamed,
    }.get(method)
    if describe is not None:
        return describe(evidence, data, suffixes)
    title = _TITLES.get(method, method)
    obstacle = "transformers 5 quantises modules, and stacked experts are parameters"
    return Quantization(method, title, evidence, obstacle)


def _fp8(evidence: str, data: Mapping[str, Any], suffixes: Collection[str]) -> Quantization:
    return Quantization("fp8", "FP8", evidence)


def _unnamed(evidence: str, data: Mapping[str, Any], suffixes: Collection[str]) -> Quantization:
    obstacle = "config.json has no quantization_config that says how it is to be read"
    return Quantization("unknown", "a method that is not named", evidence, obstacle)


def _modelopt(evidence: str, data: Mapping[str, Any], suffixes: Collection[str]) -> Quantization:
    algorithm = data.get("quant_algo") or ("NVFP4" if "_scale_2" in suffixes else "FP8")
    obstacle = "transformers 5 has no loader for ModelOpt's files"
    return Quantization("modelopt", f"{algorithm} (modelopt)", evidence, obstacle)


def _bitsandbytes(
    evidence: str, data: Mapping[str, Any], suffixes: Collection[str]
) -> Quantization:
    bits = "8-bit" if "@SCB" in suffixes else "4-bit"
    obstacle = "transformers 5 quantises modules, and stacked experts are parameters"
    return Quantization("bitsandbytes", f"bitsandbytes, {bits}", evidence, obstacle)


def _compressed_tensors(
    evidence: str, data: Mapping[str, Any], suffixes: Collection[str]
) -> Quantization:
    formats = {str(f) for f in (data.get("format"), *(g.get("format") for g in _groups(data))) if f}
    formats -= {"mixed-precision", "dense"}
    if not formats:
        packed = "nvfp4-pack-quantized" if "_global_scale" in suffixes else "pack-quantized"
        formats = {packed if "_packed" in suffixes else "float-quantized"}
    title = f"compressed-tensors ({', '.join(sorted(formats))})"
    obstacle = None
    strange = sorted(formats - set(_COLLECTED_FORMATS))
    if any("nvfp4" in name for name in strange):
        obstacle = "transformers 5 leaves out the second scale (weight_global_scale) of experts"
    elif strange:
        obstacle = f"transformers 5 does not decompress experts of the format {', '.join(strange)}"
    elif "_zero_point" in suffixes:
        obstacle = "transformers 5 leaves out the zero points of experts"
    elif "_g_idx" in suffixes:
        obstacle = "transformers 5 leaves out the order of the groups (weight_g_idx) of experts"
    return Quantization("compressed-tensors", title, evidence, obstacle)
