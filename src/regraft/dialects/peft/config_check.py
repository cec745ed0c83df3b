"""Checking the fields of ``adapter_config.json`` that a conversion reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import isfinite
from typing import Any

from msgspec import Struct

from regraft.adapters.families.settings import whole_path
from regraft.adapters.families.table import added_families
from regraft.dialects.peft.config import ALL_LINEAR
from regraft.errors import Finding
from regraft.storage.expressions import is_expression

PEFT_TYPES = frozenset(
    [
        "ADALORA",
        "ADAMSS",
        "ADAPTION_PROMPT",
        "ARROW",
        "BEFT",
        "BOFT",
        "BONE",
        "C3A",
        "CARTRIDGE",
        "CPT",
        "DEFT",
        "DELORA",
        "FOURIERFT",
        "FROD",
        "GLORA",
        "GRALORA",
        "HIRA",
        "HRA",
        "IA3",
        "LILY",
        "LN_TUNING",
        "LOHA",
        "LOKR",
        "LORA",
        "MISS",
        "MULTITASK_PROMPT_TUNING",
        "OFT",
        "OSF",
        "PEANUT",
        "POLY",
        "PREFIX_TUNING",
        "PROMPT_TUNING",
        "PSOFT",
        "PVERA",
        "P_TUNING",
        "RANDLORA",
        "ROAD",
        "SHADOW",
        "SHIRA",
        "SUPERTUNING",
        "TINYLORA",
        "TRAINABLE_TOKENS",
        "UNILORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
        "XLORA",
    ]
)
"""The values of ``peft_type`` that PEFT up to 0.21.2 knows."""

_AGAIN = "use the adapter_config.json that was saved with the weights"
_SHOWN = 80
"""Characters of a value that a message repeats."""
_LARGEST = 2**31 - 1
"""Of whole numbers: sizes of tensors, ranks and layer numbers are far below it."""


class _Type(Struct, frozen=True):
    """What the value of a field must be: a predicate, and its description."""

    accepts: Callable[[Any], bool]
    expected: str


def check_fields(config: Mapping[str, Any], where: str) -> list[Finding]:
    """All fields of a config that have a value of a wrong type or range; ``where`` is the file.

    >>> [finding.key for finding in check_fields({"peft_type": "LORA", "r": 0, "lora_alpha": "8"}, "a.json")]
    ['r', 'lora_alpha']
    """
    peft_type = config.get("peft_type")
    findings = []
    if not isinstance(peft_type, str) or not _is_known(peft_type):
        findings.append(
            Finding(
                "peft-type",
                f"unknown peft_type {_shown(peft_type)}; PEFT knows LORA, IA3, LOHA, … ({len(PEFT_TYPES)} types)",
                where=where,
                key="peft_type",
                fix="check the spelling; a config without peft_type is not PEFT's",
            )
        )
    for key, expected in _problems(config, str(peft_type)):
        message = f"expected {expected}, found {_shown(config.get(key))}"
        findings.append(Finding("config", message, where=where, key=key, fix=_AGAIN))
    return findings


def _is_known(peft_type: str) -> bool:
    return peft_type in PEFT_TYPES or any(peft_type in each.types for each in added_families())


def _problems(config: Mapping[str, Any], peft_type: str) -> Iterator[tuple[str, str]]:
    """Each field that is wrong, and what was expected."""
    needed = _NEEDED.get(peft_type, ())
    for key, kind in _FIELDS.items():
        if peft_type == "OFT" and key == "r":
            kind = _SIZE  # 0: the block size counts
        value = config.get(key)
        if (value is not None or key in needed) and not kind.accepts(value):
            yield key, kind.expected
    # As PEFT's own checks of a config.
    expression = isinstance(config.get("target_modules"), str)
    for key, types in _NOT_BESIDE_EXPRESSION.items():
        if expression and peft_type in types and config.get(key) is not None:
            yield key, "nothing (target_modules is an expression)"
    patterned = peft_type in _LAYERS_BESIDE_PATTERN and config.get("layers_pattern")
    if patterned and config.get("layers_to_transform") is None:
        yield "layers_to_transform", "the layers that layers_pattern finds"
    if peft_type == "LORA" and config.get("target_parameters") and config.get("fan_in_fan_out"):
        yield "fan_in_fan_out", "false (PEFT loads no parameters of target_parameters with it)"


def _shown(value: object) -> str:
    """The start of a value's repr. Python refuses to print integers of thousands of digits."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a very large {type(value).__name__}"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _is_count(value: object) -> bool:
    return _is_size(value) and value != 0


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(x, str) for x in value)


def _is_targets(value: object) -> bool:
    if isinstance(value, str):
        return value.lower() == ALL_LINEAR or is_expression(value)
    return _is_names(value)


def _is_token_indices(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _are_tokens(v) for k, v in value.items())
    return _are_tokens(value)


def _are_tokens(value: object) -> bool:
    """Token numbers, each once: of a row that stands twice, nothing says which counts."""
    return isinstance(value, list) and _is_sizes(value) and len(set(value)) == len(value)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_size, value))


def _is_replication(value: object) -> bool:
    return isinstance(value, list) and all(_is_sizes(pair) and len(pair) == 2 for pair in value)


def _pattern_of(accepts: Callable[[Any], bool], what: str) -> _Type:
    def fits(value: object) -> bool:
        return isinstance(value, dict) and all(
            is_expression(key) and is_expression(whole_path(key)) and accepts(item)
            for key, item in value.items()
        )

    return _Type(fits, f"a table of regular expressions and {what}")


_COUNT = _Type(_is_count, f"a whole number from 1 to {_LARGEST}")
_SIZE = _Type(_is_size, f"a whole number from 0 to {_LARGEST}")
_NUMBER = _Type(_is_number, "a finite number")
_FLAG = _Type(lambda value: isinstance(value, bool), "true or false")
_TEXT = _Type(lambda value: isinstance(value, str), "a string")
_OBJECT = _Type(lambda value: isinstance(value, dict), "an object")
_NAMES = _Type(_is_names, "a list of names")
_TARGETS = _Type(_is_targets, "a list of names, a regular expression or 'all-linear'")
_EXPRESSIONS = _Type(
    lambda value: _is_names(value) or is_expression(value),
    "a list of names, or a regular expression",
)
_WORD = _Type(lambda value: isinstance(value, (str, bool)), "a word, true or false")
_LAYERS = _Type(
    lambda value: _is_size(value) or _is_sizes(value), "a layer's number, or a list of them"
)

_FIELDS: Mapping[str, _Type] = {
    # of most types
    "r": _COUNT,
    "lora_alpha": _NUMBER,
    "alpha": _NUMBER,
    "rank_pattern": _pattern_of(_is_count, "whole numbers from 1 on"),
    "alpha_pattern": _pattern_of(_is_number, "finite numbers"),
    "target_modules": _TARGETS,
    "exclude_modules": _EXPRESSIONS,
    "target_parameters": _NAMES,
    "modules_to_save": _Type(
        lambda value: _is_names(value) and all(map(is_expression, value)), "a list of names"
    ),
    "layers_to_transform": _LAYERS,
    "layers_pattern": _EXPRESSIONS,
    "layer_replication": _Type(_is_replication, "a list of pairs of layer numbers"),
    "trainable_token_indices": _Type(
        _is_token_indices, "a list of token numbers, each once, or a table of such lists"
    ),
    "auto_mapping": _OBJECT,
    "lora_dropout": _NUMBER,
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "lora_bias": _FLAG,
    "use_qalora": _FLAG,
    "qalora_group_size": _COUNT,
    "use_bdlora": _OBJECT,
    "arrow_config": _OBJECT,
    "init_lora_weights": _WORD,
    "bias": _Type(
        lambda value: (
            isinstance(value, str) and (value in ("none", "all") or value.endswith("_only"))
        ),
        "none, all or what ends in _only",
    ),
    "fan_in_fan_out": _FLAG,
    "eva_config": _OBJECT,
    "corda_config": _OBJECT,
    "lora_ga_config": _OBJECT,
    "velora_config": _OBJECT,
    "monteclora_config": _OBJECT,
    "kasa_config": _OBJECT,
    # of one family or a few
    "init_r": _COUNT,
    "delora_lambda": _NUMBER,
    "lambda_pattern": _pattern_of(_is_number, "finite numbers"),
    "n_frequency": _COUNT,
    "n_frequency_pattern": _pattern_of(_is_count, "whole numbers from 1 on"),
    "block_size": _COUNT,
    "block_size_pattern": _pattern_of(_is_count, "whole numbers from 1 on"),
    "effective_rank": _NUMBER,
    "feedforward_modules": _EXPRESSIONS,
    "scaling": _NUMBER,
    "sparsity": _NUMBER,
    "randlora_alpha": _NUMBER,
    "eps": _NUMBER,
    "cayley_neumann_eps": _NUMBER,
    "num_cayley_neumann_terms": _COUNT,
    "depth": _SIZE,
    "group_size": _COUNT,
    "vector_length": _COUNT,
    "topk": _COUNT,
    "stride_A": _COUNT,
    "n_tasks": _COUNT,
    "random_loc_seed": _SIZE,
    "projection_prng_key": _SIZE,
    "projection_seed": _SIZE,
    "save_projection": _FLAG,
    "sample_at_inference": _FLAG,
    "use_idwt": _FLAG,
    "use_cayley_neumann": _FLAG,
    "coft": _FLAG,
    "block_share": _FLAG,
    "apply_GS": _FLAG,
    "psoft_orth": _FLAG,
    "psoft_svd": _TEXT,
    "ab_svd_init": _TEXT,
    "decomposition_method": _TEXT,
    "wavelet_family": _TEXT,
    "act_fn": _TEXT,
    "variant": _Type(
        lambda value: value in ("road_1", "road_2", "road_4"), "road_1, road_2 or road_4"
    ),
}
"""Every field that a conversion reads, for all values of ``peft_type``: PEFT gives a name one meaning."""

_NO_PATTERN_BESIDE_EXPRESSION = frozenset(
    [
        "ADALORA",
        "C3A",
        "DEFT",
        "FOURIERFT",
        "HIRA",
        "HRA",
        "LORA",
        "MISS",
        "PSOFT",
        "SHADOW",
        "UNILORA",
        "WAVEFT",
    ]
)
_NOT_BESIDE_EXPRESSION = {
    "layers_to_transform": _NO_PATTERN_BESIDE_EXPRESSION | {"DELORA"},
    "layers_pattern": _NO_PATTERN_BESIDE_EXPRESSION,
}
"""The types of which PEFT takes no such field beside an expression in ``target_modules`` (``__post_init__`` of each
config of PEFT 0.21.2)."""
_LAYERS_BESIDE_PATTERN = frozenset(
    [
        "ADALORA",
        "BOFT",
        "DEFT",
        "DELORA",
        "FOURIERFT",
        "FROD",
        "HRA",
        "LILY",
        "LOHA",
        "LOKR",
        "LORA",
        "OFT",
        "PEANUT",
        "PSOFT",
        "PVERA",
        "SHADOW",
        "TINYLORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
    ]
)
"""Those of which it takes no ``layers_pattern`` without ``layers_to_transform``."""

_NEEDED: Mapping[str, tuple[str, ...]] = {
    "LORA": ("r", "lora_alpha"),
    "ADALORA": ("lora_alpha", "init_r"),
    "DEFT": ("r",),
    "DELORA": ("r", "delora_lambda"),
    "C3A": ("block_size",),
    "FOURIERFT": ("n_frequency", "scaling"),
    "GRALORA": ("r", "alpha"),
    "HIRA": ("r",),
    "HRA": ("r",),
    "LOHA": ("r", "alpha"),
    "LOKR": ("r", "alpha"),
    "LILY": ("r", "scaling"),
    "PEANUT": ("r", "scaling", "depth", "act_fn"),
    "POLY": ("r", "n_tasks"),
    "PSOFT": ("r",),
    "PVERA": ("r", "projection_prng_key"),
    "RANDLORA": ("r", "randlora_alpha", "projection_prng_key"),
    "ROAD": ("variant", "group_size"),
    "SUPERTUNING": ("sparsity",),
    "TINYLORA": ("r", "projection_seed"),
    "VBLORA": ("vector_length", "topk"),
    "VERA": ("r", "projection_prng_key"),
    "WAVEFT": ("n_frequency", "scaling", "random_loc_seed", "wavelet_family"),
}
"""Fields without which nothing can be said of the weights, by ``peft_type``."""
