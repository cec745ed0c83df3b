"""Small quantised checkpoints: what each method writes for one module, and a Mixtral made of it."""

import json

import ml_dtypes
import numpy as np
from checkpoints.models import MIXTRAL, mixtral

CONFIG = {**MIXTRAL, "hidden_size": 32, "intermediate_size": 32}
F8, F32 = ml_dtypes.float8_e4m3fn, np.float32
BYTES = np.random.default_rng(0)


def bits(*shape, dtype=np.uint8):
    info = np.iinfo(dtype)
    return BYTES.integers(info.min, info.max, shape, dtype, endpoint=True)


def fp8(out, into):
    return {
        "weight": bits(out, into, dtype=np.int8).astype(F8),
        "weight_scale_inv": np.ones((-(-out // 16), -(-into // 16)), F32),
    }


def fp4(out, into):
    return {
        "weight": bits(out, into // 2, dtype=np.int8),
        "weight_scale_inv": np.ones((out, into // 32), ml_dtypes.float8_e8m0fnu),
    }


def per_channel(out, into):
    return {
        "weight": bits(out, into, dtype=np.int8).astype(F8),
        "weight_scale": np.ones((out, 1), F32),
    }


def gptq(out, into):
    return {
        "qweight": bits(into // 8, out, dtype=np.int32),
        "qzeros": bits(into // 8, out // 8, dtype=np.int32),
        "scales": np.ones((into // 8, out), np.float16),
        "g_idx": np.arange(into, dtype=np.int32),
    }


def awq(out, into):
    return {
        "qweight": bits(into, out // 8, dtype=np.int32),
        "qzeros": bits(into // 8, out // 8, dtype=np.int32),
        "scales": np.ones((into // 8, out), np.float16),
    }


def packed(out, into):
    return {
        "weight_packed": bits(out, into // 8, dtype=np.int32),
        "weight_scale": np.ones((out, into // 16), F32),
        "weight_shape": np.array([out, into], np.int64),
    }


def asymmetric(out, into):
    return {**packed(out, into), "weight_zero_point": bits(out // 8, into // 16, dtype=np.int32)}


def nvfp4(out, into):
    return {
        "weight_packed": bits(out, into // 2),
        "weight_scale": np.ones((out, into // 16), F8),
        "weight_global_scale": np.ones(1, F32),
        "input_global_scale": np.ones(1, F32),
    }


def mxfp4(out, into):
    return {
        "weight_packed": bits(out, into // 2),
        "weight_scale": np.full((out, into // 32), 127, np.uint8),
    }


def modelopt(out, into):
    return {
        "weight": bits(out, into // 2),
        "weight_scale": np.ones((out, into // 16), F8),
        "weight_scale_2": np.ones((), F32),
        "input_scale": np.ones((), F32),
    }


def int8(out, into):
    return {
        "weight": bits(out, into, dtype=np.int8),
        "weight_scale": np.ones((out, 1), F32),
    }


def bnb4(out, into):
    state = json.dumps({"quant_type": "nf4", "shape": [out, into]}).encode()
    return {
        "weight": bits(out * into // 2, 1),
        "weight.absmax": np.ones(out * into // 64, F32),
        "weight.quant_map": np.ones(16, F32),
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(state, np.uint8),
    }


def bnb8(out, into):
    return {
        "weight": bits(out, into, dtype=np.int8),
        "SCB": np.ones(out, F32),
        "weight_format": np.zeros((), np.uint8),
    }


def exl2(out, into):
    return {
        "q_weight": bits(into // 8, out, dtype=np.int32),
        "q_invperm": np.arange(into, dtype=np.int32),
        "q_scale": bits(1, out // 8, dtype=np.int32),
        "q_scale_max": np.ones(1, np.float16),
        "q_groups": np.array([4, 0], np.int16),
    }


def torchao(out, into):
    return {
        "_weight_qdata": bits(out, into, dtype=np.int8),
        "_weight_scale": np.ones((out, 1), F32),
    }


def hqq(out, into):
    return {
        "W_q": bits(out // 2, into),
        "scale": np.ones((out, 1), np.float16),
        "zero": np.ones((out, 1), np.float16),
        "shape": np.array([out, into], np.int64),
    }


def eetq(out, into):
    return {
        "weight": bits(into, out, dtype=np.int8),
        "weight_scales": np.ones(out, np.float16),
    }


def quanto(out, into):
    return {
        "weight._data": bits(out, into, dtype=np.int8),
        "weight._scale": np.ones((out, 1), F32),
        "input_scale": np.ones((), F32),
        "output_scale": np.ones((), F32),
    }


def quantised(make, *, attention=False):
    """A Mixtral whose experts, or whose attention, are quantised."""
    tensors = {}
    for name, tensor in mixtral(32, 32).items():
        if tensor.ndim == 2 and ("self_attn" if attention else "experts") in name:
            module = name.removesuffix("weight")
            out, into = tensor.shape
            tensors |= {module + leaf: part for leaf, part in make(out, into).items()}
        else:
            tensors[name] = tensor
    return tensors


def method(name, **more):
    return {**CONFIG, "quantization_config": {"quant_method": name, **more}}


GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_local_experts": 2,
    "num_hidden_layers": 1,
    "quantization_config": {"quant_method": "mxfp4"},
}


def gpt_oss():
    """A gpt-oss whose experts are in MXFP4, and where they are."""
    at = "model.layers.0.mlp.experts."
    scales = np.random.default_rng(3)
    return at, {
        "model.embed_tokens.weight": np.zeros((4, 64), np.float32),
        at + "gate_up_proj_blocks": bits(2, 64, 2, 16),
        at + "gate_up_proj_scales": scales.integers(90, 160, (2, 64, 2), np.uint8),
        at + "gate_up_proj_bias": np.zeros((2, 64), np.float32),
        at + "down_proj_blocks": bits(2, 64, 1, 16),
        at + "down_proj_scales": scales.integers(90, 160, (2, 64, 1), np.uint8),
        at + "down_proj_bias": np.zeros((2, 64), np.float32),
    }


CT = "compressed-tensors"
SAMPLES = {
    "FP8 in blocks": (fp8, method("fp8", weight_block_size=[16, 16])),
    "FP8, with experts in FP4": (fp4, method("fp8", expert_dtype="fp4")),
    "FBGEMM FP8": (per_channel, method("fbgemm_fp8")),
    "compressed-tensors, 8-bit floats": (per_channel, method(CT, format="float-quantized")),
    "compressed-tensors, packed integers": (packed, method(CT, format="pack-quantized")),
    "the same, with zero points": (asymmetric, method(CT, format="pack-quantized")),
    "compressed-tensors, 8-bit integers": (int8, method(CT, format="int-quantized")),
    "compressed-tensors, NVFP4": (nvfp4, method(CT, format="nvfp4-pack-quantized")),
    "compressed-tensors, MXFP4": (mxfp4, method(CT, format="mxfp4-pack-quantized")),
    "ModelOpt, NVFP4": (modelopt, method("modelopt", quant_algo="NVFP4")),
    "GPTQ": (gptq, method("gptq", bits=4)),
    "AWQ": (awq, method("awq", bits=4)),
    "bitsandbytes, 4-bit": (bnb4, method("bitsandbytes", load_in_4bit=True)),
    "bitsandbytes, 8-bit": (bnb8, method("bitsandbytes", load_in_8bit=True)),
    "torchao": (torchao, method("torchao")),
    "EXL2": (exl2, method("exl2")),
    "HQQ": (hqq, method("hqq")),
    "EETQ": (eetq, method("eetq")),
    "quanto": (quanto, method("quanto")),
}
"""For each method what it writes, and a config that names it."""
