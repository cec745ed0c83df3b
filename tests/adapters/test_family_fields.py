"""Values that PEFT's own config or layer refuses: a finding for each field, and PEFT is asked whether that is so."""

import warnings

import numpy as np
import peft
import pytest

from regraft.adapters.families.base import UnreadableError
from regraft.adapters.families.table import family_of
from regraft.dialects.peft.config_check import check_fields

CONFIGS = {
    "ADALORA": lambda: peft.AdaLoraConfig(target_r=2, init_r=3, total_step=10),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4),
    "C3A": lambda: peft.C3AConfig(block_size=4),
    "DEFT": lambda: peft.DeftConfig(r=2),
    "DELORA": lambda: peft.DeloraConfig(r=2),
    "FOURIERFT": lambda: peft.FourierFTConfig(n_frequency=3),
    "FROD": lambda: peft.FrodConfig(),
    "GLORA": lambda: peft.GloraConfig(r=2),
    "GRALORA": lambda: peft.GraloraConfig(r=4, gralora_k=2),
    "HIRA": lambda: peft.HiraConfig(r=2),
    "IA3": lambda: peft.IA3Config(target_modules=["q"], feedforward_modules=[]),
    "LILY": lambda: peft.LilyConfig(r=2),
    "LOHA": lambda: peft.LoHaConfig(r=2),
    "LOKR": lambda: peft.LoKrConfig(r=2),
    "LORA": lambda: peft.LoraConfig(r=2),
    "MISS": lambda: peft.MissConfig(r=2),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4),
    "OSF": lambda: peft.OSFConfig(effective_rank=2),
    "PEANUT": lambda: peft.PeanutConfig(r=2),
    "POLY": lambda: peft.PolyConfig(r=2),
    "PSOFT": lambda: peft.PsoftConfig(r=2),
    "PVERA": lambda: peft.PveraConfig(r=2),
    "RANDLORA": lambda: peft.RandLoraConfig(r=2),
    "ROAD": lambda: peft.RoadConfig(group_size=4),
    "SUPERTUNING": lambda: peft.SupertuningConfig(),
    "TINYLORA": lambda: peft.TinyLoraConfig(r=2, u=2),
    "UNILORA": lambda: peft.UniLoraConfig(r=2),
    "VBLORA": lambda: peft.VBLoRAConfig(r=2),
    "VERA": lambda: peft.VeraConfig(r=2),
    "WAVEFT": lambda: peft.WaveFTConfig(n_frequency=3),
}
REFUSED = [
    *((kind, "task_type", "TEXT_GENERATION") for kind in CONFIGS),
    ("ADALORA", "orth_reg_weight", -1),
    ("ADALORA", "tinit", 10),
    ("ADALORA", "total_step", None),
    ("ADALORA", "total_step", 0),
    ("ADALORA", "use_dora", True),
    ("BOFT", "boft_block_num", 4),
    ("BOFT", "boft_block_size", 0),
    ("DEFT", "decomposition_method", "svd"),
    ("FROD", "sparse_rate", 1.5),
    ("GLORA", "config_A_B", "constants"),
    ("GLORA", "config_C", "constant"),
    ("GLORA", "config_D_E", "lora"),
    ("GRALORA", "gralora_k", None),
    ("GRALORA", "gralora_k", 0),
    ("GRALORA", "gralora_k", 3),
    ("IA3", "feedforward_modules", ["v"]),
    ("LILY", "num_B", 1),
    ("LILY", "stride_A", None),
    ("OFT", "r", 4),
    ("PEANUT", "act_fn", "relu9"),
    ("PSOFT", "ab_svd_init", "svd"),
    ("PSOFT", "psoft_svd", None),
    ("ROAD", "group_size", 3),
    ("SUPERTUNING", "lora_alpha", 8),
    ("SUPERTUNING", "lora_dropout", 1.0),
    ("SUPERTUNING", "sparsity", 1.0),
    ("TINYLORA", "u", 0),
    ("TINYLORA", "weight_tying", 2),
    ("UNILORA", "bias", None),
    ("UNILORA", "init_theta_d_bound", 0),
    ("UNILORA", "theta_d_length", 0),
    ("UNILORA", "unilora_dropout", 1.5),
    ("WAVEFT", "wavelet_family", "db99"),
]
"""What PEFT refuses when it reads the config."""
FAILING = [
    ("ADALORA", "beta1", 1.0),
    ("ADALORA", "target_r", None),
    ("ADALORA", "tfinal", "x"),
    ("BOFT", "boft_dropout", None),
    ("C3A", "block_size_pattern", None),
    ("C3A", "init_weights", "normal"),
    ("DELORA", "lambda_pattern", None),
    ("FOURIERFT", "n_frequency_pattern", None),
    ("FOURIERFT", "random_loc_seed", None),
    ("GRALORA", "hybrid_r", None),
    ("HIRA", "init_weights", "pissa"),
    ("LOHA", "alpha_pattern", None),
    ("LOKR", "decompose_factor", None),
    ("LOKR", "rank_pattern", None),
    ("LORA", "alpha_pattern", None),
    ("LORA", "bias", None),
    ("LORA", "init_lora_weights", "mine"),
    ("LORA", "lora_dropout", None),
    ("LORA", "lora_dropout", 3),
    ("LORA", "rank_pattern", None),
    ("MISS", "miss_dropout", "x"),
    ("OFT", "module_dropout", None),
    ("POLY", "n_splits", 0),
    ("POLY", "poly_type", "x"),
    ("PVERA", "generator_seed", "x"),
    ("RANDLORA", "bias", None),
    ("VBLORA", "num_vectors", 0.5),
    ("VERA", "d_initial", None),
]
"""What fails in PEFT when it makes a layer (tried with 0.21.2 and, for the families that it has, 0.18.1)."""


def config_of(kind):
    with warnings.catch_warnings(action="ignore"):
        config = CONFIGS[kind]().to_dict()
    return {
        "target_modules": ["q"],
        **{name: x for name, x in config.items() if not isinstance(x, set)},
    }


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_as_peft_writes_it_is_sound(kind):
    assert check_fields(config_of(kind), "x") == []


@pytest.mark.parametrize(("kind", "field", "value"), [*REFUSED, *FAILING])
def test_each_field_has_its_finding(kind, field, value):
    config = {**config_of(kind), field: value}
    findings = check_fields(config, "x")
    assert findings and {finding.code for finding in findings} == {"config"}
    twins = {"boft_block_size": "boft_block_num", "r": "oft_block_size"}
    assert {finding.key for finding in findings} <= {field, twins.get(field)}


@pytest.mark.parametrize(("kind", "field", "value"), REFUSED)
def test_peft_refuses_them(kind, field, value):
    config = {**config_of(kind), field: value}
    del config["peft_type"]
    with warnings.catch_warnings(action="ignore"), pytest.raises((ValueError, TypeError)):
        type(CONFIGS[kind]())(**config)


def zeros(**shapes):
    return {name.replace("__", "."): np.zeros(shape, np.float32) for name, shape in shapes.items()}


TENSORS = {
    "ADALORA": (zeros(lora_A=(3, 8), lora_B=(4, 3), lora_E=(3, 1)), {"init_r": 3}, 2),
    "BOFT": (zeros(boft_R=(1, 2, 4, 4), boft_s=(6, 1)), {"boft_block_size": 4}, 2),
    "C3A": (zeros(c3a_kernel=(2, 3, 4)), {"block_size": 4}, 1),
    "FOURIERFT": (zeros(fourierft_spectrum=(3,)), {"n_frequency": 3}, 4),
    "GRALORA": (zeros(gralora_A=(2, 4, 4), gralora_B=(2, 4, 3)), {"r": 4, "gralora_k": 2}, 4),
    "LILY": (zeros(lily_A__weight=(2, 8), lily_B__weight=(4, 6)), {"r": 2, "num_B": 2}, 3),
    "LOKR": (zeros(lokr_w1=(2, 4), lokr_w2=(3, 4)), {"r": 2, "decompose_factor": -1}, 1),
    "OFT": (zeros(oft_R__weight=(2, 6)), {"r": 0, "oft_block_size": 4}, 2),
    "TINYLORA": (
        zeros(tinylora_A=(2, 8), tinylora_B=(4, 2), tinylora_P=(3, 2, 2)),
        {"r": 2, "u": 3, "projection_seed": 1},
        2,
    ),
    "WAVEFT": (zeros(waveft_spectrum=(3,)), {"n_frequency": 3}, 4),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_size_that_the_tensors_have_not(kind):
    tensors, config, other = TENSORS[kind]
    family = family_of({"peft_type": kind, **config})
    family({"peft_type": kind, **config}, {}).sizes(tensors, config)
    config = {**config, list(config)[-1 if kind != "TINYLORA" else 1]: other}
    with pytest.raises(UnreadableError, match=f"{other}"):
        family({"peft_type": kind, **config}, {}).sizes(tensors, config)


def test_the_lokr_of_a_convolution():
    """As PEFT makes it for Conv2d(3, 8, 4) with r=1: the second factor's columns are 3 channels of 4 x 4 cells."""
    tensors = zeros(lokr_w1=(2, 1), lokr_w2_a=(4, 1), lokr_w2_b=(1, 48))
    config = {"peft_type": "LOKR", "r": 1, "alpha": 1, "decompose_factor": -1}
    assert family_of(config)(config, {}).sizes(tensors, {"r": 1}) == (8, 48)
    with pytest.raises(UnreadableError, match="decompose_factor 4"):
        wrong = {**config, "decompose_factor": 4}
        family_of(wrong)(wrong, {}).sizes(tensors, {"r": 1})
