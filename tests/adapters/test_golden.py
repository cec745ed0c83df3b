"""Genuine adapters of transformers 4.57.6 and peft 0.18.1, judged by the outputs of transformers 5 and PEFT.

``tests/golden`` holds each adapter with the outputs that it gave where it was trained, and without it.
"""

import json
import logging
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from making import quick_cases, same_bits

import regraft
from regraft.storage.safetensors import open_tensors, read_header

GOLDEN = Path(__file__).parent.parent / "golden"
INDEX = json.loads((GOLDEN / "index.json").read_text())

REFUSED = {
    "mixtral__dora": "DoRA on stacked experts, which PEFT cannot hold",
    "mixtral__lora_bias": "lora_bias on stacked experts, which PEFT cannot hold",
}
"""The cases that have no image, and why."""

FOLDED = {
    "mixtral__patterns_projection",
    "mixtral__patterns_expert",
    "qwen2_moe__patterns_projection",
    "deepseek_v3__patterns_projection",
}
"""Parts of one target have unequal scales: one is folded into B, so on the way back deltas count, not bits."""

NEEDS_MODEL = {
    "mixtral__subset_regex": "only some experts are adapted, so the adapter does not say how many there are",
    "llava_mixtral__language_regex": "its config names llava, which does not say what language model is inside",
    "jamba__all_linear_bias": "dt_proj is not called in transformers 5: its LoRA is added to the base's weight",
    "ernie4_5_moe__mts_router": "the saved router holds a bias of the base's in transformers 5",
}
"""The cases that cannot be converted without the base's config or weights, and why."""

CONVERTED = [name for name in INDEX if name not in REFUSED]


def adapter_of(name, folder):
    """A copy of a case's adapter, without the outputs."""
    adapter = folder / "adapter"
    adapter.mkdir()
    for file in (GOLDEN / "cases" / name).iterdir():
        if file.name != "reference.safetensors":
            (adapter / file.name).write_bytes(file.read_bytes())
    return adapter


def base_of(name):
    return GOLDEN / "bases" / INDEX[name]["base"]


def read(folder):
    file = folder / "adapter_model.safetensors"
    return open_tensors(file, read_header(file)), json.loads(
        (folder / "adapter_config.json").read_text()
    )


def outputs(model, inputs):
    import torch

    with torch.no_grad():
        result = model.eval()(**inputs)
    return result.logits.float()


@pytest.fixture
def quiet():
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", quick_cases(CONVERTED))
def test_the_converted_adapter_gives_the_outputs_it_was_trained_for(name, tmp_path, quiet):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5.0")
    peft = pytest.importorskip("peft", minversion="0.19")
    from safetensors.torch import load_file

    transformers.utils.logging.disable_progress_bar()
    report = regraft.convert(
        adapter_of(name, tmp_path), tmp_path / "new", to="transformers-v5", model=base_of(name)
    )
    assert report.written
    kept = load_file(GOLDEN / "cases" / name / "reference.safetensors")
    inputs = {key.removeprefix("input."): x for key, x in kept.items() if key.startswith("input.")}
    want, bare = kept["ref"], kept["ref_base"]
    model = getattr(transformers, INDEX[name]["model_class"]).from_pretrained(
        base_of(name), attn_implementation="eager", dtype=torch.float32
    )
    got = outputs(peft.PeftModel.from_pretrained(model, tmp_path / "new"), inputs)
    assert got.shape == want.shape
    effect = (want - bare).abs().max().item()
    tolerance = max(1e-4, 1e-4 * effect)
    assert effect > 10 * tolerance
    assert (got - want).abs().max().item() < tolerance


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_image_is_refused_and_nothing_is_written(name, tmp_path):
    with pytest.raises(regraft.RefusedError) as caught:
        regraft.convert(
            adapter_of(name, tmp_path), tmp_path / "new", to="transformers-v5", model=base_of(name)
        )
    assert REFUSED[name].split()[0] in str(caught.value)
    assert all(f.fix and f.key for f in caught.value.findings)
    assert not (tmp_path / "new").exists()


def factors(tensors):
    """{module: (A, B)} of the plain LoRA layers."""
    found = {}
    for key, tensor in tensors.items():
        at = re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])\.weight", key)
        if at:
            found.setdefault(at[1], {})[at[2]] = tensor.astype(np.float64)
    return {path: (pair["A"], pair["B"]) for path, pair in found.items()}


def resolved(patterns, path, default):
    return next(
        (v for k, v in sorted((patterns or {}).items()) if re.match(rf"(.*\.)?({k})$", path)),
        default,
    )


def scale(config, path):
    rank = resolved(config["rank_pattern"], path, config["r"])
    alpha = resolved(config["alpha_pattern"], path, config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


@pytest.mark.parametrize("name", quick_cases(CONVERTED))
def test_there_and_back_gives_the_same_adapter(name, tmp_path):
    source = adapter_of(name, tmp_path)
    there, back = tmp_path / "new", tmp_path / "old"
    regraft.convert(source, there, to="transformers-v5", model=base_of(name))
    report = regraft.convert(there, back, to="transformers-v4", model=base_of(name))
    assert report.written
    (before, config), (after, new_config) = read(source), read(back)
    assert after.keys() == before.keys()
    odd = [key for key in before if not same_bits(before[key], after[key])]
    if name not in FOLDED:
        assert odd == []
        if not config.get("target_parameters"):
            for path in factors(before):
                assert scale(config, path) == scale(new_config, path)
        return
    assert all(".experts." in key and ".lora_" in key for key in odd)
    assert new_config["target_parameters"] == config["target_parameters"]
    assert set(new_config["target_modules"]) == set(config["target_modules"])
    old, new = factors(before), factors(after)
    for path, (a, b) in old.items():
        delta = scale(config, path) * b @ a
        again = scale(new_config, path) * new[path][1] @ new[path][0]
        np.testing.assert_allclose(again, delta, rtol=0, atol=1e-6 * np.abs(delta).max())


@pytest.mark.parametrize("name", [n for n in CONVERTED if n in FOLDED])
def test_folding_is_needed_where_it_is_allowed_for(name, tmp_path):
    report = regraft.convert(
        adapter_of(name, tmp_path), tmp_path / "new", to="transformers-v5", model=base_of(name)
    )
    assert any(not target.exact for target in report.targets)


@pytest.mark.parametrize("name", quick_cases(CONVERTED))
def test_without_the_base_the_result_is_the_same_or_the_base_is_asked_for(name, tmp_path):
    source = adapter_of(name, tmp_path)
    if name in NEEDS_MODEL:
        with pytest.raises(regraft.RegraftError, match="--model"):
            regraft.convert(source, tmp_path / "without", to="transformers-v5")
        assert not (tmp_path / "without").exists()
        return
    regraft.convert(source, tmp_path / "with", to="transformers-v5", model=base_of(name))
    regraft.convert(source, tmp_path / "without", to="transformers-v5")
    (one, _), (other, _) = read(tmp_path / "with"), read(tmp_path / "without")
    assert one.keys() == other.keys()
    assert all(same_bits(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", quick_cases(CONVERTED))
def test_what_is_in_the_layout_already_is_copied_byte_for_byte(name, tmp_path):
    source = adapter_of(name, tmp_path)
    regraft.convert(source, tmp_path / "new", to="transformers-v5", model=base_of(name))
    report = regraft.convert(
        tmp_path / "new", tmp_path / "again", to="transformers-v5", model=base_of(name)
    )
    assert [a.copied for a in report.adapters] == [True]
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "new" / file).read_bytes()
