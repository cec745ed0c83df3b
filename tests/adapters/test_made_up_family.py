"""A family that nobody has, in one file, through the public kit: what it takes to add one."""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import regraft
from regraft.adapters.families.base import (
    FAMILY,
    IN,
    LORA,
    OUT,
    RANK,
    Part,
    as_wide,
    cells,
    narrowed,
)
from regraft.adapters.families.low_rank import LowRank
from regraft.storage.safetensors import open_tensors, write_tensors
from regraft.testing import check_family, registered

BASE = Path(__file__).parents[1] / "golden/bases/mixtral"


class Twofold(LowRank):
    """Twice ``B A``."""

    types = ("TWOFOLD",)
    title = "Twofold"
    prefix = "twofold_"
    roles: ClassVar = {"twofold_A": (RANK, IN), "twofold_B": (OUT, RANK)}
    formula = "W + 2 B A"
    rank = "r"
    table = cells(stack=LORA, rest=FAMILY)

    def lora(self, part, weight):
        a, b = as_wide(part["twofold_A"], part["twofold_B"])
        return narrowed(a, part["twofold_A"]), narrowed(2 * b, part["twofold_B"])


def part(random, out=6, into=4, rank=2):
    tensors = {"twofold_A": (rank, into), "twofold_B": (out, rank)}
    made = {
        role: random.standard_normal(shape).astype(np.float32) for role, shape in tensors.items()
    }
    return Part(made, out, into)


def test_the_kit_passes_it():
    random = np.random.default_rng(0)
    follows = check_family(Twofold({}, {}), [part(random), part(random)])
    assert follows == ["take", "turn", "join out", "join in"]


def test_the_kit_notices_what_is_wrong():
    class Forgetful(Twofold):
        def turn(self, part):
            made = super().turn(part)
            return made.with_tensors(
                made.out, made.into, **{**made.tensors, "twofold_A": -made["twofold_A"]}
            )

    random = np.random.default_rng(0)
    with pytest.raises(AssertionError, match="turn"):
        check_family(Forgetful({}, {}), [part(random), part(random)])


def test_it_goes_to_another_layout_and_back(tmp_path):
    random, folder = np.random.default_rng(0), tmp_path / "adapter"
    folder.mkdir()
    tensors = {}
    for layer in (0, 1):
        for module, out, into in (("self_attn.q_proj", 16, 16), ("block_sparse_moe.gate", 4, 16)):
            for role, x in part(random, out, into).tensors.items():
                tensors[f"base_model.model.model.layers.{layer}.{module}.{role}"] = x
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "TWOFOLD", "r": 2, "target_modules": ["q_proj", "gate"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with registered(Twofold):
        there, back = tmp_path / "there", tmp_path / "back"
        report = regraft.convert(folder, there, to="transformers-v5", model=BASE, verify=True)
        assert report.adapters[0].verified == 4
        regraft.convert(there, back, to="transformers-v4", model=BASE, verify=True)
    made = open_tensors(back / "adapter_model.safetensors")
    assert made.keys() == tensors.keys()
    assert all(np.array_equal(made[name], tensors[name]) for name in made)
