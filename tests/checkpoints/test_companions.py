"""Quantised weights and what belongs to them: exact or refused."""

import json

import ml_dtypes
import numpy as np
import pytest
from checkpoints.models import MIXTRAL, mixtral, write_folder

import regraft
from regraft.checkpoints.verify import verify
from regraft.errors import RefusedError
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


def expanded(weight, scale, block):
    scale = np.repeat(np.repeat(scale, block[0], axis=-2), block[1], axis=-1)
    return weight.astype(np.float32) * scale[..., : weight.shape[-2], : weight.shape[-1]]


@pytest.mark.parametrize("block", [(4, 4), (8, 16), (1, 16)])
def test_block_scales_follow_their_weights(tmp_path, block):
    config = {**CONFIG, "quantization_config": {"weight_block_size": list(block)}}
    tensors = quantised(block)
    src = write_folder(tmp_path / "src", tensors, config, shards=2)
    regraft.convert(src, tmp_path / "out", to=V5)
    out = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        out |= open_tensors(file)
    made = expanded(
        out[FUSED.format(1, "gate_up_proj")], out[FUSED.format(1, "gate_up_proj_scale_inv")], block
    )
    for expert in range(3):
        parts = [EXPERT.format(1, expert, w) for w in ("w1", "w3")]
        wanted = [expanded(tensors[p], tensors[p + "_scale_inv"], block) for p in parts]
        assert np.array_equal(made[expert], np.concatenate(wanted))
    regraft.convert(tmp_path / "out", tmp_path / "back", to=V4)
    assert verify(src, tmp_path / "back").equal
    assert verify(src, tmp_path / "out").equal


def test_a_block_that_would_be_cut_is_refused(tmp_path):
    config = {**CONFIG, "intermediate_size": 6}
    src = write_folder(tmp_path / "src", quantised((4, 4), config), config)
    with pytest.raises(RefusedError, match="a block would be cut"):
        regraft.convert(src, tmp_path / "out", to=V5)
    assert not (tmp_path / "out").exists()


def single(tensors, values):
    for layer in range(2):
        for expert in range(3):
            for w in ("w1", "w2", "w3"):
                key = EXPERT.format(layer, expert, w)
                tensors[key + "_scale_2"] = np.float32(values(expert, w)).reshape(())
                tensors[key.removesuffix("weight") + "input_scale"] = np.ones(1, np.float32)
    return tensors


def test_single_scales_are_copied_on_a_split_and_equal_on_a_join(tmp_path):
    tensors = single(quantised(), lambda expert, w: 2.0)
    src = write_folder(tmp_path / "src", tensors, CONFIG)
    regraft.convert(src, tmp_path / "out", to=V5)
    out = open_tensors(tmp_path / "out" / "model.safetensors")
    assert out[FUSED.format(0, "gate_up_proj_scale_2")].shape == ()
    assert out[FUSED.format(0, "down_proj_input_scale")].tolist() == [1.0]
    regraft.convert(tmp_path / "out", tmp_path / "back", to=V4)
    assert verify(src, tmp_path / "back").equal


def test_single_scales_that_differ_are_refused(tmp_path):
    tensors = single(quantised(), lambda expert, w: float(expert == 1 and w == "w3"))
    src = write_folder(tmp_path / "src", tensors, CONFIG)
    with pytest.raises(RefusedError, match="they are not equal") as caught:
        regraft.convert(src, tmp_path / "out", to=V5)
    assert "_scale_2" in caught.value.findings[0].key


def test_a_scale_that_is_missing_is_refused(tmp_path):
    tensors = quantised()
    del tensors[EXPERT.format(0, 1, "w1") + "_scale_inv"]
    src = write_folder(tmp_path / "src", tensors, CONFIG)
    with pytest.raises(RefusedError, match="some have not"):
        regraft.convert(src, tmp_path / "out", to=V5)


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
    with pytest.raises(RefusedError, match="packed weight"):
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
