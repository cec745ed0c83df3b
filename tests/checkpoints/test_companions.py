"""Quantised weights and what belongs to them: exact or refused."""

import json

import ml_dtypes
import numpy as np
import pytest
from checkpoints.models import MIXTRAL, mixtral, write_folder

import regraft
from regraft.checkpoints.verify import verify
from regraft.errors import RefusedError
from regraft.rules.book import load_book
from regraft.storage.safetensors import open_tensors

V4, V5 = "transformers-v4", "transformers-v5"
CONFIG = {
    **MIXTRAL,
    "hidden_size": 16,
    "intermediate_size": 8,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]},
}
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
FUSED = "model.layers.{}.mlp.experts.{}"


def quantised(block=(4, 4), config=CONFIG):
    tensors = mixtral(config["hidden_size"], config["intermediate_size"])
    random = np.random.default_rng(0)
    for name, tensor in list(tensors.items()):
        if tensor.ndim == 2 and ("experts" in name or "self_attn" in name):
            tensors[name] = (tensor % 200).astype(ml_dtypes.float8_e4m3fn)
            rows, columns = (-(-n // b) for n, b in zip(tensor.shape, block, strict=True))
            tensors[name + "_scale_inv"] = random.random((rows, columns)).astype(np.float32)
    return tensors


def stacked(tensors, suffixes):
    """The same with the experts stacked, companions and all."""
    out = {k: v for k, v in tensors.items() if ".experts." not in k}
    for layer in range(2):
        for suffix in suffixes:
            parts = [
                [tensors[EXPERT.format(layer, e, w) + suffix] for e in range(3)]
                for w in ("w1", "w3", "w2")
            ]
            gate, up, down = (np.stack(part) for part in parts)
            gate_up = np.concatenate([gate, up], axis=1)
            out[FUSED.format(layer, "gate_up_proj") + suffix] = gate_up
            out[FUSED.format(layer, "down_proj") + suffix] = down
    return {k.replace("block_sparse_moe.gate", "mlp.gate"): v for k, v in out.items()}


@pytest.mark.parametrize("block", [(4, 4), (8, 16), (1, 16)])
def test_block_scales_follow_their_weights(tmp_path, block):
    config = {**CONFIG, "quantization_config": {"weight_block_size": list(block)}}
    tensors = quantised(block)
    src = write_folder(tmp_path / "src", stacked(tensors, ("", "_scale_inv")), config, shards=2)
    regraft.convert(src, tmp_path / "out", to=V4)
    out = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        out |= open_tensors(file)
    assert out.keys() == tensors.keys()
    for name, wanted in tensors.items():
        assert np.array_equal(out[name], wanted), name
    assert verify(src, tmp_path / "out").equal


def test_a_block_that_would_be_cut_is_refused(tmp_path):
    config = {**CONFIG, "intermediate_size": 6}
    tensors = stacked(quantised((4, 4), config), ("", "_scale_inv"))
    for layer in range(2):
        scales = np.ones((3, 3, 4), np.float32)
        tensors[FUSED.format(layer, "gate_up_proj_scale_inv")] = scales
    src = write_folder(tmp_path / "src", tensors, config)
    with pytest.raises(RefusedError, match="a block would be cut") as caught:
        regraft.convert(src, tmp_path / "out", to=V4)
    assert "quantised with FP8" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_single_scales_are_copied_on_a_split(tmp_path):
    tensors = stacked(quantised(), ("", "_scale_inv"))
    for layer in range(2):
        tensors[FUSED.format(layer, "gate_up_proj_scale_2")] = np.float32(2.0).reshape(())
        tensors[FUSED.format(layer, "down_proj_input_scale")] = np.ones(1, np.float32)
    src = write_folder(tmp_path / "src", tensors, CONFIG)
    regraft.convert(src, tmp_path / "out", to=V4)
    out = open_tensors(tmp_path / "out" / "model.safetensors")
    for expert in range(3):
        assert out[EXPERT.format(0, expert, "w3") + "_scale_2"] == 2.0
        at = EXPERT.format(1, expert, "w2").removesuffix("weight")
        assert out[at + "input_scale"].tolist() == [1.0]


BOOK = """
name = "mine"
title = "Mine: q, k and v in one"
left = "apart"
right = "joined"
model_types = ["mine"]

[[equation]]
name = "qkv"
text = '''
a.{l}.q.weight : q i
a.{l}.k.weight : k i
    == a.{l}.qk.weight : (q + k) i
where q = k
'''
"""


def joined(tmp_path, scales):
    """Convert two weights with single scales into one."""
    (tmp_path / "mine.toml").write_text(BOOK)
    tensors = {}
    for name, scale in zip("qk", scales, strict=True):
        weight = np.full((2, 4), ord(name) % 7).astype(ml_dtypes.float8_e4m3fn)
        tensors[f"a.0.{name}.weight"] = weight
        tensors[f"a.0.{name}.weight_scale"] = np.array([scale], np.float32)
    src = write_folder(tmp_path / "src", tensors, {"model_type": "mine"})
    with regraft.only_books([load_book(tmp_path / "mine.toml")]):
        regraft.convert(src, tmp_path / "out", to="joined")
    return open_tensors(tmp_path / "out" / "model.safetensors")


def test_single_scales_are_joined_where_they_are_equal(tmp_path):
    out = joined(tmp_path, (2.0, 2.0))
    assert out["a.0.qk.weight_scale"].tolist() == [2.0]
    assert out["a.0.qk.weight"].shape == (4, 4)


def test_single_scales_that_differ_are_refused(tmp_path):
    with pytest.raises(RefusedError, match="they are not equal") as caught:
        joined(tmp_path, (2.0, 3.0))
    assert "_scale" in caught.value.findings[0].key


def test_a_scale_that_is_missing_is_refused(tmp_path):
    tensors = quantised()
    del tensors[EXPERT.format(0, 1, "w1") + "_scale_inv"]
    src = write_folder(tmp_path / "src", tensors, CONFIG)
    with pytest.raises(RefusedError, match="no scale_inv, while others") as caught:
        regraft.convert(src, tmp_path / "out", to=V5)
    assert caught.value.findings[0].key == EXPERT.format(0, 1, "w1")


def test_scales_are_not_cast(tmp_path):
    src = write_folder(tmp_path / "src", quantised(), CONFIG)
    regraft.convert(src, tmp_path / "out", to=V5, dtype="bfloat16")
    out = open_tensors(tmp_path / "out" / "model.safetensors")
    assert out["model.layers.0.self_attn.q_proj.weight_scale_inv"].dtype == np.float32
    assert out["lm_head.weight"].dtype == ml_dtypes.bfloat16
    assert out["model.layers.0.self_attn.q_proj.weight"].dtype == ml_dtypes.float8_e4m3fn


def bnb(tensors, names):
    for name in names:
        shape = tensors[name].shape
        tensors[name] = np.arange(np.prod(shape) // 2, dtype=np.uint8).reshape(-1, 1)
        tensors[name + ".absmax"] = np.ones(2, np.float32)
        tensors[name + ".quant_map"] = np.ones(16, np.float32)
        state = json.dumps({"quant_type": "nf4", "shape": list(shape)}).encode()
        tensors[name + ".quant_state.bitsandbytes__nf4"] = np.frombuffer(state, np.uint8)
    return tensors


def test_bitsandbytes_moves_whole_or_not_at_all(tmp_path):
    tensors = bnb(mixtral(), ["model.layers.0.self_attn.q_proj.weight"])
    src = write_folder(tmp_path / "src", tensors)
    regraft.convert(src, tmp_path / "out", to=V5)
    out = open_tensors(tmp_path / "out" / "model.safetensors")
    for name in tensors:
        if "self_attn" in name:
            assert np.array_equal(out[name], tensors[name])
    tensors = mixtral()
    bnb(tensors, [name for name in tensors if "experts" in name])
    src = write_folder(tmp_path / "experts", tensors)
    with pytest.raises(RefusedError, match="bitsandbytes, 4-bit"):
        regraft.convert(src, tmp_path / "no", to=V5)


def test_mxfp4_keeps_its_blocks(tmp_path):
    config = {
        "model_type": "gpt_oss",
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_local_experts": 2,
        "num_hidden_layers": 1,
    }
    at = "model.layers.0.mlp.experts."
    tensors = {
        "model.embed_tokens.weight": np.zeros((4, 64), np.float32),
        at + "gate_up_proj_blocks": np.arange(2 * 64 * 2 * 16, dtype=np.uint8).reshape(
            2, 64, 2, 16
        ),
        at + "gate_up_proj_scales": np.ones((2, 64, 2), np.uint8),
        at + "gate_up_proj_bias": np.zeros((2, 64), np.float32),
        at + "down_proj_blocks": np.arange(2 * 64 * 16, dtype=np.uint8).reshape(2, 64, 1, 16),
        at + "down_proj_scales": np.ones((2, 64, 1), np.uint8),
        at + "down_proj_bias": np.zeros((2, 64), np.float32),
    }
    src = write_folder(tmp_path / "src", tensors, config)
    regraft.convert(src, tmp_path / "out", to=V5)
    out = open_tensors(tmp_path / "out" / "model.safetensors")
    assert out.keys() == tensors.keys()
    assert all(np.array_equal(out[name], tensors[name]) for name in tensors)
