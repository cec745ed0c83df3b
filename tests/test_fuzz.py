"""The fuzz's oracle agrees with every conversion that is right, and notices those that are not."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import regraft
from regraft.storage.safetensors import open_tensors, write_tensors

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from dense import assert_same, blocks  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
BASE = GOLDEN / "bases" / "mixtral"
CASES = sorted(
    p.name
    for p in (GOLDEN / "cases").glob("mixtral__*")
    if not p.name.endswith(("__dora", "__lora_bias"))
)
EXPERTS = "base_model.model.model.layers.0.mlp.experts."


def converted(case, out):
    regraft.convert(GOLDEN / "cases" / case, out, to="transformers-v5", model=BASE)
    return GOLDEN / "cases" / case


def rewrite(folder, change):
    """Change the tensors of a folder's weights in place."""
    path = folder / "adapter_model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in open_tensors(path).items()}
    change(tensors)
    path.unlink()
    write_tensors(path, tensors, {})


@pytest.mark.parametrize("case", CASES)
def test_agrees(case, tmp_path):
    source = converted(case, tmp_path / "out")
    assert_same(source, tmp_path / "out")


def test_every_projection_of_every_expert_is_a_block():
    names = {name for name in blocks(GOLDEN / "cases" / "mixtral__gud_attn") if "experts" in name}
    assert len(names) == 2 * 4 * 3


def reverse_experts(tensors):
    """As a converter would that numbers experts the other way round, there and back."""
    a, b = EXPERTS + "lora_A.weight", EXPERTS + "lora_B.weight"
    rank = tensors[a].shape[0] // 4
    tensors[a] = tensors[a].reshape(4, rank, -1)[::-1].reshape(4 * rank, -1).copy()
    tensors[b] = tensors[b].reshape(-1, rank, 4)[:, :, ::-1].reshape(-1, 4 * rank).copy()


def stack_columns_by_expert(tensors):
    """As PEFT stacked factors before 0.19: experts the outer axis of B's columns."""
    b = EXPERTS + "lora_B.weight"
    rows, columns = tensors[b].shape
    tensors[b] = tensors[b].reshape(rows, columns // 4, 4).swapaxes(1, 2).reshape(rows, -1).copy()


def swap_gate_and_up(tensors):
    b = EXPERTS + "base_layer.lora_B.weight"
    tensors[b] = np.roll(tensors[b], len(tensors[b]) // 2, axis=0)


def change_one_number(tensors):
    tensors[EXPERTS + "lora_B.weight"][3, 5] *= 1.0001


@pytest.mark.parametrize(
    "change", [reverse_experts, stack_columns_by_expert, swap_gate_and_up, change_one_number]
)
def test_notices(change, tmp_path):
    source = converted("mixtral__gud_attn", tmp_path / "out")
    rewrite(tmp_path / "out", change)
    with pytest.raises(AssertionError, match=r"layers\.0\.mlp\.experts\.\d\.\w+ differs"):
        assert_same(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("alpha_pattern", {}, "differs"),
        ("rank_pattern", {}, "differs"),
        ("target_modules", ["q_proj"], "is no target"),
        ("exclude_modules", ["k_proj"], "is no target"),
    ],
)
def test_notices_what_the_config_says(field, value, what, tmp_path):
    source = converted("mixtral__gud_attn", tmp_path / "out")
    path = tmp_path / "out" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(AssertionError, match=what):
        assert_same(source, tmp_path / "out")


def test_notices_a_module_that_is_lost(tmp_path):
    source = converted("mixtral__gud_attn", tmp_path / "out")

    def lose(tensors):
        for name in [name for name in tensors if "layers.1.mlp.experts.lora" in name]:
            del tensors[name]

    rewrite(tmp_path / "out", lose)
    with pytest.raises(
        AssertionError, match=r"only one side has .*layers\.1\.mlp\.experts\.0\.down"
    ):
        assert_same(source, tmp_path / "out")


def test_lets_products_differ_that_float64_has_few_digits_for(tmp_path):
    source = tmp_path / "in"
    shutil.copytree(GOLDEN / "cases" / "mixtral__rslora", source)
    config = json.loads((source / "adapter_config.json").read_text())
    config["lora_alpha"] = 1e-320
    (source / "adapter_config.json").write_text(json.dumps(config))
    regraft.convert(source, tmp_path / "out", to="transformers-v5", model=BASE)
    assert_same(source, tmp_path / "out")
