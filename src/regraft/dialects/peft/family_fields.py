"""What PEFT's own configs and layers accept in the fields of each family.

A value that is not among it is one that PEFT refuses, or fails with, as soon as it reads the config or makes a layer.
Source: PEFT 0.21.2, ``__post_init__`` of each ``peft/tuners/*/config.py`` and ``update_layer`` of each ``layer.py``;
PEFT 0.18.1 says the same of the families that it has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from regraft.dialects.peft.field_types import (
    COUNT,
    FLAG,
    NUMBER,
    SIZE,
    FieldType,
    is_count,
    is_number,
    is_size,
)


def one_of(words: Sequence[str | bool | None]) -> FieldType:
    """One of some words; 0 and 1 are not taken for true and false."""

    def accepts(value: object) -> bool:
        plain = value is None or isinstance(value, (str, bool))
        return plain and value in words

    shown = [word if isinstance(word, str) else json.dumps(word) for word in words]
    return FieldType(accepts, " or ".join([", ".join(shown[:-1]), shown[-1]][len(shown) == 1 :]))


def or_null(kind: FieldType) -> FieldType:
    """The same, or null."""
    return FieldType(
        lambda value: value is None or kind.accepts(value), f"{kind.expected}, or null"
    )


def _number(accepts: Callable[[float], bool], expected: str) -> FieldType:
    return FieldType(lambda value: is_number(value) and accepts(value), expected)


_SHARE = _number(lambda x: 0 <= x <= 1, "a number from 0 to 1")
_BELOW_ONE = _number(lambda x: 0 <= x < 1, "a number from 0 on and below 1")
_BETWEEN = _number(lambda x: 0 < x < 1, "a number between 0 and 1")
_DROPOUT = _number(lambda x: x <= 1, "a number up to 1")
_FROM_ZERO = _number(lambda x: x >= 0, "a number from 0 on")
_ABOVE_ZERO = _number(lambda x: x > 0, "a number above 0")
_EVEN = FieldType(lambda x: is_count(x) and x % 2 == 0, "an even number from 2 on")
_SEVERAL = FieldType(lambda x: is_count(x) and x > 1, "a whole number from 2 on")
_FACTOR = FieldType(lambda x: x == -1 or is_size(x), "a whole number from 0 on, or -1")
_SEED = FieldType(
    lambda x: isinstance(x, int) and not isinstance(x, bool) and abs(x) < 2**63, "a whole number"
)
_WAVELETS = frozenset(
    [f"db{n}" for n in range(1, 39)]
    + [f"sym{n}" for n in range(2, 21)]
    + [f"coif{n}" for n in range(1, 18)]
)
_ACTIVATIONS = frozenset(
    [
        "gelu",
        "gelu_10",
        "gelu_accurate",
        "gelu_fast",
        "gelu_new",
        "gelu_python",
        "gelu_python_tanh",
        "gelu_pytorch_tanh",
        "hardswish",
        "laplace",
        "leaky_relu",
        "linear",
        "mish",
        "prelu",
        "quick_gelu",
        "relu",
        "relu2",
        "relu6",
        "sigmoid",
        "silu",
        "sqrtsoftplus",
        "swish",
        "tanh",
        "xielu",
    ]
)
"""transformers 5.23.0, ``activations.py`` (``ACT2FN``)."""


def _is_lora_start(value: object) -> bool:
    if value is None or isinstance(value, bool) or value == "":
        return True
    if not isinstance(value, str):
        return False
    pissa, _, rounds = value.partition("_niter_")
    return (
        (pissa == "pissa" and (value == "pissa" or rounds.isdecimal()))
        or value.startswith("corda")
        or value.lower() in ("olora", "mica", "gaussian")
        or value in ("loftq", "eva", "orthogonal", "lora_ga")
    )


TASK = or_null(
    one_of(
        ["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
    )
)
"""``task_type``, of all families."""

_OWN: Mapping[str, Mapping[str, FieldType]] = {
    "ADALORA": {
        "beta1": _BETWEEN,
        "beta2": _BETWEEN,
        "lora_dropout": _DROPOUT,
        "orth_reg_weight": _FROM_ZERO,
        "target_r": NUMBER,
        "tfinal": NUMBER,
        "tinit": NUMBER,
        "total_step": _ABOVE_ZERO,
        "use_dora": one_of([False, None]),
    },
    "ADAMSS": {
        "init_weights": one_of(["orthogonal", None, False]),
        "num_subspaces": COUNT,
        "r": COUNT,
        "random_seed": _SEED,
        "subspace_rank": SIZE,
    },
    "BOFT": {
        "boft_block_num": SIZE,
        "boft_block_size": SIZE,
        "boft_dropout": NUMBER,
        "init_weights": FLAG,
    },
    "C3A": {"init_weights": one_of([True, False, "gaussian", "kaiming_uniform", "xavier_uniform"])},
    "DEFT": {"decomposition_method": one_of(["qr", "relu"]), "deft_dropout": _DROPOUT},
    "DELORA": {"module_dropout": _DROPOUT},
    "FOURIERFT": {"random_loc_seed": _SEED},
    "FROD": {
        "frod_dropout": _DROPOUT,
        "projection_prng_key": _SEED,
        "regularization_alpha": NUMBER,
        "runtime_offload_base_weight": or_null(FLAG),
        "sparse_rate": _SHARE,
    },
    "GLORA": {
        "config_A_B": one_of(["lora", "vector", "constant", "none"]),
        "config_C": one_of(["lora", "vector", "none"]),
        "config_D_E": one_of(["vector", "constant", "none"]),
        "r": COUNT,
    },
    "GRALORA": {"gralora_dropout": _DROPOUT, "gralora_k": COUNT, "hybrid_r": SIZE},
    "HIRA": {"hira_dropout": _DROPOUT, "init_weights": one_of([True, False, None, "gaussian"])},
    "LILY": {"num_B": _SEVERAL, "stride_A": COUNT},
    "LOKR": {"decompose_factor": _FACTOR},
    "LORA": {
        "init_lora_weights": FieldType(
            _is_lora_start,
            "true, false or a start that PEFT knows (gaussian, pissa, olora, eva, …)",
        ),
        "lora_dropout": _DROPOUT,
    },
    "MISS": {"miss_dropout": _DROPOUT},
    "OFT": {
        "init_weights": FLAG,
        "module_dropout": NUMBER,
        "oft_block_size": SIZE,
        "r": SIZE,
    },
    "OSF": {"effective_rank": or_null(_ABOVE_ZERO)},
    "PEANUT": {
        "act_fn": FieldType(
            lambda x: isinstance(x, str) and x in _ACTIVATIONS,
            "an activation of transformers (relu, silu, …)",
        )
    },
    "POLY": {"n_skills": COUNT, "n_splits": COUNT, "poly_type": one_of(["poly"])},
    "PSOFT": {
        "ab_svd_init": one_of(["psoft_init", "pissa_init"]),
        "psoft_alpha": NUMBER,
        "psoft_dropout": _DROPOUT,
        "psoft_svd": one_of(["full", "lowrank"]),
    },
    "PVERA": {"d_initial": NUMBER, "generator_seed": or_null(_SEED), "pvera_dropout": _DROPOUT},
    "RANDLORA": {"randlora_dropout": _DROPOUT},
    "ROAD": {"group_size": _EVEN},
    "SHIRA": {"r": COUNT, "random_seed": or_null(_SEED)},
    "SUPERTUNING": {
        "lora_dropout": _BELOW_ONE,
        "save_precomputed_indices": FLAG,
        "select_top": FLAG,
        "sparsity": _BELOW_ONE,
    },
    "TINYLORA": {"tinylora_dropout": _DROPOUT, "u": COUNT, "weight_tying": _SHARE},
    "UNILORA": {
        "bias": one_of(["none", "all", "unilora_only"]),
        "init_theta_d_bound": _ABOVE_ZERO,
        "proj_seed": or_null(SIZE),
        "r": COUNT,
        "theta_d_length": COUNT,
        "unilora_dropout": _SHARE,
    },
    "VBLORA": {
        "init_logits_std": _FROM_ZERO,
        "init_vector_bank_bound": _FROM_ZERO,
        "num_vectors": COUNT,
        "r": COUNT,
        "vblora_dropout": _DROPOUT,
    },
    "VERA": {"d_initial": NUMBER, "vera_dropout": _DROPOUT},
    "WAVEFT": {
        "wavelet_family": FieldType(
            lambda x: isinstance(x, str) and x in _WAVELETS,
            "a wavelet that PEFT knows (db1, sym2, coif1, …)",
        )
    },
}
"""By ``peft_type``: fields of its own, or that it reads more strictly. One that is absent has PEFT's default."""

_NOT_NULL: Mapping[str, frozenset[str]] = {
    "alpha_pattern": frozenset(["LOHA", "LOKR", "LORA"]),
    "bias": frozenset(
        [
            "ADALORA",
            "BOFT",
            "C3A",
            "DEFT",
            "DELORA",
            "FOURIERFT",
            "FROD",
            "GLORA",
            "GRALORA",
            "HRA",
            "LORA",
            "MISS",
            "OFT",
            "PVERA",
            "RANDLORA",
            "TINYLORA",
            "VBLORA",
            "VERA",
            "WAVEFT",
        ]
    ),
    "block_size_pattern": frozenset(["C3A"]),
    "lambda_pattern": frozenset(["DELORA"]),
    "n_frequency_pattern": frozenset(["FOURIERFT", "WAVEFT"]),
    "r": frozenset(["MISS"]),
    "rank_pattern": frozenset(["DELORA", "HIRA", "LOHA", "LOKR", "LORA"]),
}
"""Fields that may be absent, and of which PEFT does not take null, by the families that read them."""


def family_problems(
    config: Mapping[str, Any], peft_type: str, needed: Collection[str] = ()
) -> Iterator[tuple[str, str]]:
    """Each field whose value the family's own config or layer refuses, and what was expected.

    ``needed`` must be there.

    >>> list(family_problems({"gralora_k": 0, "r": 8}, "GRALORA"))
    [('gralora_k', 'a whole number from 1 to 2147483647')]
    """
    for key, kind in {"task_type": TASK, **_OWN.get(peft_type, {})}.items():
        if (key in config or key in needed) and not kind.accepts(config.get(key)):
            yield key, kind.expected
    for key, types in _NOT_NULL.items():
        if peft_type in types and key in config and config[key] is None:
            yield key, "a value that is not null"


def problems_together(config: Mapping[str, Any], peft_type: str) -> Iterator[tuple[str, str]]:
    """Fields that do not go together, where each by itself is of the right type.

    >>> list(problems_together({"gralora_k": 3, "r": 8}, "GRALORA"))
    [('gralora_k', 'a number that divides r (8)')]
    """
    if peft_type == "GRALORA":
        if config["r"] % config.get("gralora_k", 2):
            yield "gralora_k", f"a number that divides r ({config['r']})"
    elif peft_type == "BOFT":
        yield from _one_of_two(config, "boft_block_size", "boft_block_num", (4, 0))
    elif peft_type == "OFT":
        yield from _one_of_two(config, "r", "oft_block_size", (0, 32))
    elif peft_type == "SUPERTUNING":
        if config.get("lora_alpha") is not None and config.get("r") is None:
            yield "lora_alpha", "null, since r is"
    elif peft_type == "IA3":
        forward, targets = config.get("feedforward_modules"), config.get("target_modules")
        if (
            isinstance(forward, list)
            and isinstance(targets, list)
            and not set(forward) <= set(targets)
        ):
            yield "feedforward_modules", "entries that target_modules has, too"
    elif peft_type == "ADALORA":
        yield from _budget(config)


def _one_of_two(
    config: Mapping[str, Any], first: str, second: str, defaults: Sequence[int]
) -> Iterator[tuple[str, str]]:
    """Two sizes of which one follows from the other: one of them is 0."""
    told = config.get(first, defaults[0]), config.get(second, defaults[1])
    if bool(told[0]) == bool(told[1]):
        yield second, f"0 or not 0, whichever {first} ({told[0]}) is not"


def _budget(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """AdaLoRA's schedule: steps must be left between its start and its end."""
    total = config.get("total_step")
    if total is None:
        yield "total_step", "a number above 0 (PEFT reads no AdaLoRA without it)"
        return
    start, end = config.get("tinit", 0), config.get("tfinal", 0)
    if start >= total - end:
        yield "tinit", f"a number below total_step - tfinal ({total - end})"
