"""Quantised experts: kept one by one where the loader reads them so, else refused by the method's name."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints.models import mixtral, write_folder
from checkpoints.quantised_samples import (
    CONFIG,
    CT,
    F8,
    F32,
    asymmetric,
    awq,
    bits,
    bnb4,
    bnb8,
    eetq,
    exl2,
    fp4,
    fp8,
    gptq,
    hqq,
    int8,
    method,
    modelopt,
    mxfp4,
    nvfp4,
    packed,
    per_channel,
    quantised,
    quanto,
    torchao,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import quantised_page

import regraft
from regraft.checkpoints.verify import verify
from regraft.errors import RefusedError
from regraft.storage.safetensors import open_tensors

V4, V5 = "transformers-v4", "transformers-v5"
KEPT = [
    (fp8, method("fp8", weight_block_size=[16, 16])),
    (fp8, CONFIG),
    (fp4, method("fp8", expert_dtype="fp4")),
    (per_channel, method(CT, format="float-quantized")),
    (packed, method(CT, format="pack-quantized")),
    (packed, CONFIG),
]
REFUSED = [
    (gptq, method("gptq", bits=4), "GPTQ"),
    (gptq, CONFIG, "GPTQ"),
    (awq, method("awq", bits=4), "AWQ"),
    (awq, CONFIG, "AWQ"),
    (asymmetric, method(CT, format="pack-quantized"), "zero points"),
    (nvfp4, method(CT, format="nvfp4-pack-quantized"), "nvfp4-pack-quantized"),
    (nvfp4, CONFIG, "second scale"),
    (mxfp4, method(CT, format="mxfp4-pack-quantized"), "mxfp4-pack-quantized"),
    (int8, method(CT, format="int-quantized"), "int-quantized"),
    (modelopt, method("modelopt", quant_algo="NVFP4"), "NVFP4"),
    (modelopt, CONFIG, "NVFP4"),
    (per_channel, method("fbgemm_fp8"), "FBGEMM FP8"),
    (per_channel, CONFIG, "no quantization_config"),
    (bnb4, method("bitsandbytes", load_in_4bit=True), "bitsandbytes, 4-bit"),
    (bnb4, CONFIG, "bitsandbytes, 4-bit"),
    (bnb8, method("bitsandbytes", load_in_8bit=True), "bitsandbytes, 8-bit"),
    (bnb8, CONFIG, "bitsandbytes, 8-bit"),
    (torchao, method("torchao"), "torchao"),
    (torchao, CONFIG, "torchao"),
    (hqq, method("hqq"), "HQQ"),
    (hqq, CONFIG, "HQQ"),
    (exl2, method("exl2"), "EXL2"),
    (exl2, CONFIG, "EXL2"),
    (eetq, method("eetq"), "EETQ"),
    (eetq, CONFIG, "EETQ"),
    (quanto, method("quanto"), "quanto"),
    (quanto, CONFIG, "quanto"),
]


def same(one, other):
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and one[k].tobytes() == other[k].tobytes() for k in one
    )


@pytest.mark.parametrize(("make", "config"), KEPT)
def test_experts_stay_one_by_one_where_the_loader_collects_them(tmp_path, make, config):
    tensors = quantised(make)
    src = write_folder(tmp_path / "src", tensors, config)
    report = regraft.convert(src, tmp_path / "out", to=V5)
    out = open_tensors(tmp_path / "out" / "model.safetensors")
    experts = {k: v for k, v in tensors.items() if "experts" in k}
    assert same({k: v for k, v in out.items() if "experts" in k}, experts)
    assert "model.layers.0.mlp.gate.weight" in out
    assert any("18 expert weights stay one by one" in note for note in report.notes)
    assert verify(src, tmp_path / "out").equal
    regraft.convert(tmp_path / "out", tmp_path / "back", to=V4)
    assert same(dict(open_tensors(tmp_path / "back" / "model.safetensors")), tensors)


@pytest.mark.parametrize("config", [CONFIG, method("fp8")])
def test_a_loader_must_be_told_of_the_method(config, tmp_path):
    src = write_folder(tmp_path / "src", quantised(fp8), config)
    report = regraft.convert(src, tmp_path / "out", to=V5)
    (note,) = (note for note in report.notes if "one by one" in note)
    assert ("config.json has none" in note) == (config is CONFIG)


def test_explain_says_that_they_stay(tmp_path):
    src = write_folder(tmp_path / "src", quantised(fp8), method("fp8"))
    key = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    explained = regraft.explain(src, key, to=V5)
    assert explained.fate == "carried"
    assert "one by one" in explained.rule
    assert regraft.explain(src, "lm_head.weight", to=V5).fate == "carried"
    assert explained.targets[0].keys == (key,)


def test_layers_that_are_not_quantised_are_stacked_beside_those_that_are(tmp_path):
    tensors = quantised(fp8) | {k: v for k, v in mixtral(32, 32).items() if "layers.1." in k}
    tensors = {k: v for k, v in tensors.items() if "layers.1." not in k or "scale" not in k}
    src = write_folder(tmp_path / "src", tensors, method("fp8"))
    regraft.convert(src, tmp_path / "out", to=V5)
    out = open_tensors(tmp_path / "out" / "model.safetensors")
    assert "model.layers.1.mlp.experts.gate_up_proj" in out
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight_scale_inv" in out
    regraft.convert(tmp_path / "out", tmp_path / "back", to=V4)
    assert same(dict(open_tensors(tmp_path / "back" / "model.safetensors")), tensors)


def test_an_expert_that_is_missing_is_an_error_although_they_stay(tmp_path):
    tensors = {
        k: v for k, v in quantised(fp8).items() if "1.block_sparse_moe.experts.1.w3" not in k
    }
    src = write_folder(tmp_path / "src", tensors, method("fp8"))
    with pytest.raises(regraft.BadInputError):
        regraft.convert(src, tmp_path / "out", to=V5)


@pytest.mark.parametrize(("make", "config", "title"), REFUSED)
def test_experts_that_no_loader_reads_are_refused_by_the_method(tmp_path, make, config, title):
    src = write_folder(tmp_path / "src", quantised(make), config)
    with pytest.raises(RefusedError, match="quantised with") as caught:
        regraft.convert(src, tmp_path / "out", to=V5)
    assert all(title in finding.message for finding in caught.value.findings)
    assert not (tmp_path / "out").exists()


ALL = [(make, config) for make, config in KEPT] + [(make, config) for make, config, _ in REFUSED]


@pytest.mark.parametrize(("make", "config"), ALL)
def test_modules_that_only_stay_or_are_renamed_are_exact_for_every_method(tmp_path, make, config):
    tensors = quantised(make, attention=True)
    src = write_folder(tmp_path / "src", tensors, config)
    regraft.convert(src, tmp_path / "out", to=V5)
    assert verify(src, tmp_path / "out").equal
    regraft.convert(tmp_path / "out", tmp_path / "back", to=V4)
    assert same(dict(open_tensors(tmp_path / "back" / "model.safetensors")), tensors)


@pytest.mark.parametrize("make", [gptq, awq, packed, hqq, fp8, quanto])
def test_packed_state_follows_its_module(tmp_path, make):
    tensors = mixtral(32, 32)
    router = {f"model.layers.{at}.block_sparse_moe.gate.": make(8, 32) for at in range(2)}
    tensors = {k: v for k, v in tensors.items() if "block_sparse_moe" not in k}
    whole = mixtral(32, 32, experts=8)
    tensors |= {k: v for k, v in whole.items() if "experts" in k}
    tensors |= {at + leaf: part for at, parts in router.items() for leaf, part in parts.items()}
    src = write_folder(tmp_path / "src", tensors, {**CONFIG, "num_local_experts": 8})
    regraft.convert(src, tmp_path / "out", to=V5)
    out = open_tensors(tmp_path / "out" / "model.safetensors")
    for leaf, part in router["model.layers.1.block_sparse_moe.gate."].items():
        assert np.array_equal(out[f"model.layers.1.mlp.gate.{leaf}"], part)
    regraft.convert(tmp_path / "out", tmp_path / "back", to=V4)
    assert same(dict(open_tensors(tmp_path / "back" / "model.safetensors")), tensors)


@pytest.mark.parametrize(("dtype", "bits_each"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)])
def test_elements_smaller_than_a_byte_are_not_cut_or_joined(tmp_path, dtype, bits_each):
    tensors = mixtral(32, 32)
    src = write_folder(tmp_path / "src", tensors, CONFIG)
    header, data, at = {}, b"", 0
    for name, tensor in tensors.items():
        count = tensor.size * (bits_each if "experts" in name else 32) // 8
        kind = dtype if "experts" in name else "F32"
        header[name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": (at, at + count)}
        data, at = data + tensor.tobytes()[:count], at + count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file = src / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(RefusedError) as caught:
        regraft.convert(src, tmp_path / "out", to=V5)
    assert {finding.code for finding in caught.value.findings} == {"packed"}
    assert dtype in caught.value.findings[0].message
    assert not (tmp_path / "out").exists()


def test_a_method_whose_metadata_names_tensors_is_not_renamed(tmp_path):
    tensors = mixtral(32, 32)
    for layer in range(2):
        at = f"model.layers.{layer}.block_sparse_moe.gate."
        del tensors[at + "weight"]
        tensors |= {at + leaf: part for leaf, part in torchao(3, 32).items()}
    src = write_folder(tmp_path / "src", tensors, method("torchao"))
    with pytest.raises(RefusedError, match=r"torchao.*metadata"):
        regraft.convert(src, tmp_path / "out", to=V5)


def test_stacked_scales_are_refused_where_the_target_is_no_modules_weight(tmp_path):
    """Version 4 keeps these experts stacked and turned, and its quantizer knows nothing of them."""
    text = {
        "model_type": "qwen3_vl_moe_text",
        "hidden_size": 16,
        "moe_intermediate_size": 16,
        "num_experts": 2,
        "num_hidden_layers": 1,
    }
    quantization = {"quant_method": "fp8"}
    config = {
        "model_type": "qwen3_vl_moe",
        "text_config": text,
        "quantization_config": quantization,
    }
    at = "model.language_model.layers.0.mlp.experts."
    tensors = {
        at + "gate_up_proj": bits(2, 16, 32, dtype=np.int8).astype(F8),
        at + "gate_up_proj_scale_inv": np.ones((2, 1, 2), F32),
        at + "down_proj": bits(2, 16, 16, dtype=np.int8).astype(F8),
        at + "down_proj_scale_inv": np.ones((2, 1, 1), F32),
    }
    src = write_folder(tmp_path / "src", tensors, config)
    with pytest.raises(RefusedError, match="quantised with FP8"):
        regraft.convert(src, tmp_path / "out", to=V5, source=V4)


@pytest.mark.parametrize(("make", "title"), [(fp8, "FP8"), (gptq, "GPTQ or AWQ"), (hqq, "HQQ")])
def test_in_memory_the_method_is_named(make, title):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {key: value for key, value in CONFIG.items() if isinstance(value, int)}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    state = {
        name: torch.zeros(part.shape) for name, part in quantised(make, attention=True).items()
    }
    with pytest.raises(regraft.UnmatchedKeysError, match=title) as caught:
        regraft.convert_state_dict(state, to=V5, model=model)
    assert any("regraft convert" in (finding.fix or "") for finding in caught.value.findings)


@pytest.mark.slow
def test_the_page_says_what_happens():
    assert quantised_page.PAGE.read_text(encoding="utf-8") == quantised_page.page(), (
        "run scripts/quantised_page.py"
    )
