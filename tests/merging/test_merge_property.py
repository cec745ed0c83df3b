"""Merging and extracting as laws: sums of any adapters are numpy's, and what was merged comes back."""

import json
import shutil
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import regraft
from regraft.storage.safetensors import open_tensors, write_tensors

MODULES = ("q_proj", "o_proj", "k_proj")
SIZES = {"q_proj": (8, 6), "o_proj": (6, 8), "k_proj": (4, 6)}


def key(module):
    return f"model.layers.0.self_attn.{module}"


@st.composite
def adapters(draw):
    """Which modules, of which rank and alpha, with which weight; whole numbers, so that products are exact."""
    modules = draw(st.sets(st.sampled_from(MODULES), min_size=1))
    rank, alpha = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3.5]))
    weight = draw(st.sampled_from([1.0, 0.5, -0.3, 2.0]))
    return sorted(modules), rank, alpha, weight, draw(st.integers(0, 2**31))


def make(folder, modules, rank, alpha, seed):
    random = np.random.default_rng(seed)
    tensors, deltas = {}, {}
    for module in modules:
        out, into = SIZES[module]
        a, b = random.integers(-3, 4, (rank, into)), random.integers(-3, 4, (out, rank))
        start = f"base_model.model.{key(module)}"
        tensors[f"{start}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"{start}.lora_B.weight"] = b.astype(np.float32)
        deltas[module] = (b * (alpha / rank)).astype(float) @ a.astype(float)
    folder.mkdir()
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def base_of(folder, dtype, seed):
    random = np.random.default_rng(seed)
    state = {f"{key(m)}.weight": random.integers(-9, 9, s).astype(dtype) for m, s in SIZES.items()}
    folder.mkdir()
    write_tensors(folder / "model.safetensors", state, {"format": "pt"})
    config = {"model_type": "mixtral", "hidden_size": 6, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return state


@settings(max_examples=6, deadline=None)
@given(
    st.lists(adapters(), min_size=1, max_size=3),
    st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    st.integers(0, 2**31),
)
def test_any_adapters_are_summed_and_rounded_once_and_come_back(some, dtype, seed):
    root = Path(tempfile.mkdtemp())
    try:
        before = base_of(root / "base", dtype, seed)
        total = dict.fromkeys(MODULES)
        given_ = []
        for number, (modules, rank, alpha, weight, own) in enumerate(some):
            deltas = make(root / f"a{number}", modules, rank, alpha, own)
            given_.append((root / f"a{number}", weight))
            for module, delta in deltas.items():
                added = delta * weight
                total[module] = added if total[module] is None else total[module] + added
        regraft.merge(root / "base", given_, root / "out")
        after = dict(open_tensors(root / "out" / "model.safetensors"))
        for module, delta in total.items():
            name = f"{key(module)}.weight"
            want = before[name]
            if delta is not None:
                want = np.where(delta == 0, want, (want.astype(float) + delta).astype(dtype))
            assert after[name].tobytes() == want.tobytes()
        changed = {n: after[n].astype(float) - before[n].astype(float) for n in before}
        if not any(x.any() for x in changed.values()):
            return
        report = regraft.extract(root / "base", root / "out", root / "lora", error=1e-5)
        regraft.merge(root / "base", [root / "lora"], root / "again", dtype="float32")
        again = open_tensors(root / "again" / "model.safetensors")
        for name, delta in changed.items():
            assert np.allclose(
                again[name] - before[name].astype(float), delta, atol=1e-3, rtol=1e-4
            )
        assert report.unchanged == sum(not x.any() for x in changed.values())
    finally:
        shutil.rmtree(root)
