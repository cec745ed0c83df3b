"""Random adapters in the internal form, written in each dialect and read back: what they add is the same."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regraft.adapters.form import Lora
from regraft.adapters.scale import Scale
from regraft.dialects.base import PlainFile, dialects
from regraft.errors import RefusedError
from regraft.testing import deltas_of, write_and_open

WRITERS = ("peft", "vllm", "sglang", "unsloth", "nemo")
MODULES = ("o_proj", "q_b_proj", "down_proj")
ONLY_ELSEWHERE = "fc1"
"""A module that SGLang has no buffers for, and refuses by name; the others take any module."""


@st.composite
def adapters(draw):
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    loras = {}
    rslora = draw(st.booleans())
    modules = MODULES + (ONLY_ELSEWHERE,) * draw(st.booleans())
    for layer in range(draw(st.integers(1, 2))):
        for name in draw(st.sets(st.sampled_from(modules), min_size=1)):
            rank, alpha = draw(st.integers(1, 5)), draw(st.sampled_from([0.5, 1, 3, 8, 16]))
            dtype = draw(st.sampled_from([np.float32, np.float16]))
            a = random.integers(-8, 9, (rank, 6)).astype(dtype)
            b = random.integers(-8, 9, (7, rank)).astype(dtype)
            loras[f"model.layers.{layer}.self_attn.{name}.weight"] = Lora(
                a, b, Scale(rank, alpha, rslora)
            )
    tensors = {f"{key}.{x}": getattr(lora, x) for key, lora in loras.items() for x in "ab"}
    return PlainFile("", "a random adapter", {}, tensors, loras)


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(adapters(), st.permutations(WRITERS))
def test_three_dialects_one_after_the_other(tmp_path_factory, source, order):
    want, opened = deltas_of(source), source
    if any(f".{ONLY_ELSEWHERE}." in key for key in want):
        with pytest.raises(RefusedError, match=f"SGLang takes no LoRA on {ONLY_ELSEWHERE}"):
            write_and_open(dialects()["sglang"], source, tmp_path_factory.mktemp("refused"))
        order = [name for name in order if name != "sglang"]
    for name in order[:3]:
        folder = tmp_path_factory.mktemp("made") / name
        opened = write_and_open(dialects()[name], opened, folder)
        got = deltas_of(opened)
        assert got.keys() == want.keys()
        for key, delta in want.items():
            most = max(float(np.abs(delta).max()), 1e-30)
            assert np.abs(got[key] - delta).max() <= 2e-6 * most, (name, key)
