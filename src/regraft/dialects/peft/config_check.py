"""Checking the fields of ``adapter_config.json`` that a conversion reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from regraft.adapters.families.table import added_families
from regraft.dialects.peft.family_fields import family_problems, problems_together
from regraft.dialects.peft.field_types import (
    COUNT,
    EXPRESSIONS,
    FLAG,
    LAYERS,
    NAMES,
    NUMBER,
    OBJECT,
    SIZE,
    TARGETS,
    TEXT,
    WORD,
    FieldType,
    is_count,
    is_names,
    is_number,
    is_replication,
    is_token_indices,
    pattern_of,
)
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
    for key, expected in _problems(config, _plain(peft_type)):
        message = f"expected {expected}, found {_shown(config.get(key))}"
        findings.append(Finding("config", message, where=where, key=key, fix=_AGAIN))
    return findings


def _plain(peft_type: object) -> str:
    """A config's type as text; PEFT's own configs hold an enum's member."""
    return str.__str__(peft_type) if isinstance(peft_type, str) else ""


def _is_known(peft_type: str) -> bool:
    return peft_type in PEFT_TYPES or any(peft_type in each.types for each in added_families())


def _problems(config: Mapping[str, Any], peft_type: str) -> Iterator[tuple[str, str]]:
    """Each field that is wrong, and what was expected."""
    needed = _NEEDED.get(peft_type, ())
    wrong = set()
    for key, kind in _FIELDS.items():
        if peft_type == "OFT" and key == "r":
            kind = SIZE  # 0: the block size counts
        value = config.get(key)
        if (value is not None or key in needed) and not kind.accepts(value):
            wrong.add(key)
            yield key, kind.expected
    for key, expected in family_problems(config, peft_type, needed):
        if key not in wrong:
            wrong.add(key)
            yield key, expected
    if not wrong:
        yield from problems_together(config, peft_type)
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


_FIELDS: Mapping[str, FieldType] = {
    # of most types
    "r": COUNT,
    "lora_alpha": NUMBER,
    "alpha": NUMBER,
    "rank_pattern": pattern_of(is_count, "whole numbers from 1 on"),
    "alpha_pattern": pattern_of(is_number, "finite numbers"),
    "target_modules": TARGETS,
    "exclude_modules": EXPRESSIONS,
    "target_parameters": NAMES,
    "modules_to_save": FieldType(
        lambda value: is_names(value) and all(map(is_expression, value)), "a list of names"
    ),
    "layers_to_transform": LAYERS,
    "layers_pattern": EXPRESSIONS,
    "layer_replication": FieldType(is_replication, "a list of pairs of layer numbers"),
    "trainable_token_indices": FieldType(
        is_token_indices, "a list of token numbers, each once, or a table of such lists"
    ),
    "auto_mapping": OBJECT,
    "lora_dropout": NUMBER,
    "use_rslora": FLAG,
    "use_dora": FLAG,
    "lora_bias": FLAG,
    "use_qalora": FLAG,
    "qalora_group_size": COUNT,
    "use_bdlora": OBJECT,
    "arrow_config": OBJECT,
    "init_lora_weights": WORD,
    "bias": FieldType(
        lambda value: (
            isinstance(value, str) and (value in ("none", "all") or value.endswith("_only"))
        ),
        "none, all or what ends in _only",
    ),
    "fan_in_fan_out": FLAG,
    "eva_config": OBJECT,
    "corda_config": OBJECT,
    "lora_ga_config": OBJECT,
    "velora_config": OBJECT,
    "monteclora_config": OBJECT,
    "kasa_config": OBJECT,
    # of one family or a few
    "init_r": COUNT,
    "delora_lambda": NUMBER,
    "lambda_pattern": pattern_of(is_number, "finite numbers"),
    "n_frequency": COUNT,
    "n_frequency_pattern": pattern_of(is_count, "whole numbers from 1 on"),
    "block_size": COUNT,
    "block_size_pattern": pattern_of(is_count, "whole numbers from 1 on"),
    "effective_rank": NUMBER,
    "feedforward_modules": EXPRESSIONS,
    "scaling": NUMBER,
    "sparsity": NUMBER,
    "randlora_alpha": NUMBER,
    "eps": NUMBER,
    "cayley_neumann_eps": NUMBER,
    "num_cayley_neumann_terms": COUNT,
    "depth": SIZE,
    "group_size": COUNT,
    "vector_length": COUNT,
    "topk": COUNT,
    "stride_A": COUNT,
    "n_tasks": COUNT,
    "random_loc_seed": SIZE,
    "projection_prng_key": SIZE,
    "projection_seed": SIZE,
    "save_projection": FLAG,
    "sample_at_inference": FLAG,
    "use_idwt": FLAG,
    "use_cayley_neumann": FLAG,
    "coft": FLAG,
    "block_share": FLAG,
    "apply_GS": FLAG,
    "psoft_orth": FLAG,
    "psoft_svd": TEXT,
    "ab_svd_init": TEXT,
    "decomposition_method": TEXT,
    "wavelet_family": TEXT,
    "act_fn": TEXT,
    "variant": FieldType(
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
    "GLORA": ("r",),
    "LILY": ("r", "scaling"),
    "MISS": ("r",),
    "PEANUT": ("r", "scaling", "depth", "act_fn"),
    "POLY": ("r", "n_tasks"),
    "PSOFT": ("r",),
    "PVERA": ("r", "projection_prng_key"),
    "RANDLORA": ("r", "randlora_alpha", "projection_prng_key"),
    "ROAD": ("variant", "group_size"),
    "SHIRA": ("r",),
    "SUPERTUNING": ("sparsity",),
    "TINYLORA": ("r", "projection_seed", "u"),
    "UNILORA": ("r", "theta_d_length"),
    "VBLORA": ("r", "vector_length", "topk", "num_vectors"),
    "VERA": ("r", "projection_prng_key"),
    "WAVEFT": ("n_frequency", "scaling", "random_loc_seed", "wavelet_family"),
}
"""Fields without which nothing can be said of the weights, by ``peft_type``."""
