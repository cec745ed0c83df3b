"""Ranks, scales and targets resolve as PEFT resolves them."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_golden import GOLDEN

import regraft
from regraft.adapters.families.settings import Patterns
from regraft.adapters.scale import Scale
from regraft.dialects.peft.config import LoraConfig, targets_module, targets_parameter
from regraft.dialects.peft.targeting import Targeting
from regraft.storage.safetensors import open_tensors, write_tensors

ALPHAS = st.one_of(
    st.integers(0, 64), st.floats(0, 64, allow_subnormal=False).filter(lambda x: x == 0 or x > 1e-3)
)
SCALES = st.builds(Scale, st.integers(1, 64), ALPHAS, st.booleans())


@given(SCALES, st.integers(1, 64))
def test_a_scale_at_another_rank_is_the_same_scale(scale, rank):
    other = scale.at_rank(rank)
    assert other.rank == rank
    assert other.rslora == scale.rslora
    assert math.isclose(other.value, scale.value, rel_tol=1e-12)
    assert other.ratio_to(scale) == 1.0
    assert scale.ratio_to(other) == 1.0


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 64))
def test_alpha_stays_whole_where_it_can_be(rank, factor, other):
    moved = Scale(rank, rank * factor).at_rank(other)
    assert moved == Scale(other, other * factor)
    assert isinstance(moved.alpha, int)


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 16))
def test_rslora_alpha_stays_whole_where_the_root_is(rank, root, alpha):
    moved = Scale(rank, alpha, True).at_rank(rank * root * root)
    assert moved == Scale(rank * root * root, alpha * root, True)
    assert isinstance(moved.alpha, int)


@given(SCALES, SCALES)
def test_the_ratio_is_what_b_is_multiplied_by(one, other):
    if other.alpha != 0:
        assert math.isclose(one.ratio_to(other) * other.value, one.value, rel_tol=1e-9)
    if one.value == other.value and one.rslora == other.rslora:
        assert one.ratio_to(other) == 1.0


def test_scales_are_those_of_peft():
    assert LoraConfig({"r": 8, "lora_alpha": 16}).scale("x").value == 2
    assert LoraConfig({"r": 16, "lora_alpha": 8, "use_rslora": True}).scale("x").value == 2
    config = LoraConfig(
        {"r": 8, "lora_alpha": 8, "rank_pattern": {"q": 2}, "alpha_pattern": {"k": 4}}
    )
    assert [config.scale(p) for p in ("a.q", "a.k", "a.v")] == [
        Scale(2, 8),
        Scale(8, 4),
        Scale(8, 8),
    ]


SEGMENTS = st.sampled_from(
    ["model", "layers", "0", "1", "10", "self_attn", "q_proj", "v_proj", "mlp", "w1"]
)
PATHS = st.lists(SEGMENTS, min_size=1, max_size=5).map(".".join)
PATTERNS = st.one_of(
    PATHS,
    PATHS.map(lambda p: "^" + re.escape(p)),
    PATHS.map(lambda p: ".*" + p),
    st.sampled_from(
        [
            r"layers\.\d+\.mlp",
            r".*\.(0|1)\.w1",
            "q_proj|v_proj",
            r"(w1|q_proj)",
            r"layers.\d.*",
            "proj",
        ]
    ),
)


@st.composite
def paths_with_patterns(draw):
    """A path, and patterns in any order, many of which fit it."""
    path = draw(PATHS)
    segments = path.split(".")
    ends = [".".join(segments[at:]) for at in range(len(segments))]
    fitting = st.sampled_from([*ends, *(f".*{end}" for end in ends), *map(re.escape, ends)])
    keys = draw(st.lists(st.one_of(fitting, PATTERNS), max_size=4, unique=True))
    return path, {key: number for number, key in enumerate(draw(st.permutations(keys)), 1)}


@settings(max_examples=300)
@given(paths_with_patterns())
def test_the_pattern_that_counts_is_the_one_that_peft_takes(case):
    other = pytest.importorskip("peft.utils.other")
    path, patterns = case
    key = other.get_pattern_key(patterns.keys(), path)
    assert Patterns(patterns, "rank_pattern").find(path) == patterns.get(key)


@settings(max_examples=200)
@given(st.one_of(PATTERNS, st.lists(PATHS, max_size=4)), PATHS)
def test_a_module_is_targeted_where_peft_targets_it(targets, path):
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    config = peft.LoraConfig(target_modules=targets)
    assert targets_module(targets, path) == bool(check_target_module_exists(config, path))


@pytest.mark.parametrize(
    ("entries", "name", "named"),
    [
        (["experts.w"], "m.experts.w", True),
        (["experts.w"], "experts.w", True),
        (["experts.w"], "m.xexperts.w", False),
        (["w"], "m.experts.w", True),
        ([r".*\.w"], "m.experts.w", False),
        (["m.experts"], "m.experts.w", False),
        ([], "w", False),
        (None, "w", False),
    ],
)
def test_parameters_are_named_literally(entries, name, named):
    assert targets_parameter(entries, name) is named


@pytest.mark.parametrize(
    ("task", "path", "adapted"),
    [
        ("CAUSAL_LM", "lm_head", False),
        ("CAUSAL_LM", "embed_out", False),
        ("CAUSAL_LM", "cls.predictions.decoder", False),
        ("CAUSAL_LM", "score", True),
        ("SEQ_CLS", "score", False),
        ("SEQ_CLS", "classifier", False),
        ("SEQ_CLS", "model.layers.0.mlp.score", True),
        (None, "model.layers.0.q_proj", True),
    ],
)
def test_all_linear_leaves_out_what_peft_leaves_out(task, path, adapted):
    config = {"target_modules": "all-linear", "task_type": task}
    assert (Targeting(config).left_out_by(path) is None) == adapted


def test_what_peft_wraps_as_a_parameter_says_nothing_of_fan_in_and_out(tmp_path):
    """``ParamWrapper`` raises where it is set; a Linear only warns."""
    src = tmp_path / "src"
    shutil.copytree(GOLDEN / "cases" / "mixtral__only_gate", src)
    file = src / "adapter_config.json"
    before = json.loads(file.read_text()) | {"fan_in_fan_out": True}
    file.write_text(json.dumps(before))
    base = GOLDEN / "bases" / "mixtral"
    regraft.convert(src, tmp_path / "new", to="transformers-v5", model=base, verify=True)
    made = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert made["fan_in_fan_out"] is False
    regraft.convert(tmp_path / "new", tmp_path / "back", to="transformers-v4", model=base)
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text()) == before


def test_without_target_modules_peft_would_take_its_own(tmp_path):
    src = tmp_path / "src"
    shutil.copytree(GOLDEN / "cases" / "mixtral__only_gate", src)
    file = src / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["target_modules"]
    file.write_text(json.dumps(config))
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.convert(src, tmp_path / "new", to="transformers-v5")
    assert [(f.code, f.key) for f in caught.value.findings] == [("config", "target_modules")]


def test_inspect_tells_what_a_family_lacks(tmp_path):
    src = tmp_path / "src"
    shutil.copytree(GOLDEN / "cases" / "mixtral__dora", src)
    file = src / "adapter_model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in open_tensors(file).items()}
    del tensors[next(name for name in tensors if "lora_magnitude" in name)]
    write_tensors(file, tensors, {"format": "pt"})
    base = GOLDEN / "bases" / "mixtral"
    assert regraft.inspect(GOLDEN / "cases" / "mixtral__dora", model=base).problems == []
    assert [f.code for f in regraft.inspect(src, model=base).problems] == ["shape"]


def test_an_empty_tensor_of_a_family_is_an_error(tmp_path):
    src = tmp_path / "src"
    shutil.copytree(GOLDEN / "cases" / "mixtral__ia3_attn", src)
    file = src / "adapter_model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in open_tensors(file).items()}
    name = next(iter(tensors))
    tensors[name] = tensors[name][:0]
    write_tensors(file, tensors, {"format": "pt"})
    base = GOLDEN / "bases" / "mixtral"
    with pytest.raises(regraft.BadInputError) as caught:
        regraft.convert(src, tmp_path / "new", to="transformers-v5", model=base, via="dense")
    assert [f.code for f in caught.value.findings] == ["shape"]
